// How the strip kernels hold a piece of a 2-D map in shared memory, and how they bring it there.
//
// A map is one dilation group of one head: tokens (row, column) in positions of that group, so that dilation is only a larger
// stride and nothing below knows of it. A tile is ROWS x COLUMNS tokens, [row][column][channel], 2-byte channels.
//
//   TokenLayout      where a 16-byte chunk of a token lies (swizzle)
//   StripPlace       which batch entry, head, dilation group and tile a block works on
//   MapView, load_map_tiles    cp.async of a tile with zeros around the map, several tensors at once
//   first_key        window arithmetic of these kernels: not causal, stride 1
#pragma once

#include "fastna/primitives.cuh"
#include "fastna/window.cuh"

namespace fastna {

// The rows (along axis 1) of queries that one warp-wide matrix product takes, and the columns: 8 x 2 = 16 matrix rows.
constexpr int QUERY_ROWS = 8;
constexpr int QUERY_COLUMNS = 2;
// Keys of one row that one product takes.
constexpr int KEY_COLUMNS = 8;

// Chunks of 16 bytes are permuted inside a token by its number, so that these touch every bank once, whatever the first token:
//   ldmatrix (also .trans): 8 consecutive tokens, one chunk number;
//   a 16-byte load: lane 4 g + q takes chunk q (or q + 4 i) of consecutive token g. All 8 lanes of a phase fill 128 bytes.
// A row of a tile must start at an even token number: an even COLUMNS makes its offset a compile-time term, free of the swizzle.
template <int HEAD_DIM>
struct TokenLayout {
  static_assert(HEAD_DIM == 32 || HEAD_DIM == 64 || HEAD_DIM == 128, "the swizzle needs 4, 8 or 16 chunks");
  static constexpr int BYTES = HEAD_DIM * 2;
  static constexpr int CHUNKS = HEAD_DIM / 8;

  FASTNA_DEVICE static u32 swizzle(u32 token) {
    if constexpr (CHUNKS >= 8) return ((token & 1) << 2) | ((token >> 1) & 3);
    return (token >> 1) & 3;
  }
  FASTNA_DEVICE static u32 offset(u32 token, u32 chunk) { return token * BYTES + ((chunk ^ swizzle(token)) << 4); }
};

// First key of the window of the query at `position`: window_at for a stride of 1 and no causality.
template <int WINDOW>
FASTNA_DEVICE int first_key(int position, int length) {
  return minimum(maximum(position - WINDOW / 2, 0), length - WINDOW);
}

// First of the `count` consecutive keys that are multiplied for the query at `position`: they hold its window, and lie inside the map
// unless the map itself is shorter.
template <int WINDOW>
FASTNA_DEVICE int first_product_key(int position, int length, int count) {
  return minimum(maximum(position - WINDOW / 2, 0), maximum(length - count, 0));
}

// Blocks are numbered heads fastest, then tiles along a row, strips, dilation groups, batch: what runs at the same time shares
// sectors of DRAM and the halo in L2.
// A divisor that the host prepared: of numbers below 2^31.
struct Divisor {
  u32 divisor, multiplier;
  int shift;

  FASTNA_DEVICE u32 quotient(u32 n) const { return static_cast<u32>(static_cast<u64>(n) * multiplier >> shift); }
};
// Its members count what the longest dilation group needs.
struct StripGrid {
  Divisor heads, tiles, strips, column_groups, row_groups;
};
struct StripPlace {
  int head, tile, strip, column_group, row_group, batch;
  int rows, columns;  // of this dilation group's map
};

FASTNA_DEVICE StripPlace strip_place(u32 block, const Geometry& geometry, const StripGrid& grid) {
  StripPlace place;
  const auto digit = [&block](const Divisor& base) {
    const u32 quotient = base.quotient(block);
    const int remainder = static_cast<int>(block - quotient * base.divisor);
    block = quotient;
    return remainder;
  };
  place.head = digit(grid.heads);
  place.tile = digit(grid.tiles);
  place.strip = digit(grid.strips);
  place.column_group = digit(grid.column_groups);
  place.row_group = digit(grid.row_groups);
  place.batch = static_cast<int>(block);
  // group_length of both axes
  place.rows = grid.row_groups.quotient(geometry.axis[1].length - place.row_group + geometry.axis[1].dilation - 1);
  place.columns = grid.column_groups.quotient(geometry.axis[2].length - place.column_group + geometry.axis[2].dilation - 1);
  return place;
}

// One head of one dilation group of a tensor: address of position (0, 0), strides in elements between positions.
template <class T>
struct MapView {
  T* origin;
  int row, column;

  FASTNA_DEVICE T* at(int r, int c) const { return origin + static_cast<i64>(r) * row + static_cast<i64>(c) * column; }
};

template <class T>
FASTNA_DEVICE MapView<T> map_view(const TensorArguments& tensor, const Geometry& geometry, const StripPlace& place, int batch,
                                  int head) {
  return {element<T>(tensor, batch, 0, place.row_group, place.column_group, head),
          static_cast<int>(tensor.axis[1] * geometry.axis[1].dilation),
          static_cast<int>(tensor.axis[2] * geometry.axis[2].dilation)};
}

// Issues the copies of ROWS x COLUMNS tokens from (row0, column0) of each view; tile k goes to shared address `shared[k]`. Only tile
// rows in `rows` and tile columns below `columns` are read, the rest becomes zero: what a mask will suppress must not be NaN, since
// 0 x NaN is NaN. All THREADS threads of the block call, a warp a row: then only the row's address changes from copy to copy. The
// caller commits and waits.
template <int THREADS, int HEAD_DIM, int ROWS, int COLUMNS, int COUNT, class T>
FASTNA_DEVICE void load_map_tiles(const MapView<T> (&views)[COUNT], const u32 (&shared)[COUNT], int row0, int column0,
                                  Interval rows, int columns) {
  using Layout = TokenLayout<HEAD_DIM>;
  static_assert(COLUMNS % 2 == 0, "see TokenLayout");
  constexpr int STEP = WARP / Layout::CHUNKS;  // tokens of one copy; the swizzle of the next ones differs by FLIP, in every second copy
  constexpr int PASSES = (COLUMNS + STEP - 1) / STEP;
  constexpr u32 FLIP = STEP == 4 ? 2 << 4 : 0;
  static_assert(STEP == 4 || STEP == 8, "see FLIP");
  const int warp = warp_index(), chunk = lane_index() % Layout::CHUNKS, first = lane_index() / Layout::CHUNKS;
  const T* sources[COUNT];
  FASTNA_UNROLL
  for (int k = 0; k < COUNT; ++k) sources[k] = views[k].at(row0 + warp, column0 + first) + chunk * 8;
  u32 at = warp * (COLUMNS * Layout::BYTES) + Layout::offset(first, chunk);
#pragma unroll 1
  for (int row = warp; row < ROWS; row += THREADS / WARP, at += THREADS / WARP * COLUMNS * Layout::BYTES) {
    const int seen = rows.contains(row) ? columns : 0;
    FASTNA_UNROLL
    for (int pass = 0; pass < PASSES; ++pass) {
      const int column = first + pass * STEP;
      if ((pass + 1) * STEP <= COLUMNS || column < COLUMNS) {
        FASTNA_UNROLL
        for (int k = 0; k < COUNT; ++k) {
          copy_async<16>(shared[k] + (at ^ (pass % 2 * FLIP)) + pass * STEP * Layout::BYTES, sources[k] + static_cast<i64>(pass * STEP) * views[k].column,
                         column < seen);
        }
      }
    }
    FASTNA_UNROLL
    for (int k = 0; k < COUNT; ++k) sources[k] += static_cast<i64>(THREADS / WARP) * views[k].row;
  }
}

}  // namespace fastna
