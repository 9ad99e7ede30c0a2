// Boxes of tokens as tiles of a matrix product: which tokens a tile holds, what each row of it sees, how it is loaded and stored.
//
// A tile is a box of positions inside one dilation group, so that dilation is only a larger stride. Rows and columns of a product
// are boxes of queries and keys: rows stay in the block, columns stream past it. In a query-stationary kernel a row sees the keys of
// its window (window_at); in a key-stationary one a row is seen by the queries of the inverse window (queries_at).
#pragma once

#include "fastna/tile_gemm.cuh"
#include "fastna/window.cuh"

namespace fastna {

// N0 x N1 x N2 positions, powers of two: coordinates of a sum of disjoint bits add without carry, which splits every index into
// what a lane knows and what is known at compile time. The leading 3 - RANK axes have length 1 and cost nothing.
template <int RANK, int N0, int N1, int N2>
struct TileBox {
  static constexpr int SIZE = N0 * N1 * N2;
  static constexpr int FIRST = 3 - RANK;  // first axis that is there
  static_assert((RANK > 2 || N0 == 1) && (RANK > 1 || N1 == 1), "no extent along an axis that is not there");
  static FASTNA_DEVICE constexpr int extent(int axis) { return axis == 0 ? N0 : axis == 1 ? N1 : N2; }
  static FASTNA_DEVICE constexpr int coordinate(int index, int axis) {
    return axis == 2 ? index % N2 : axis == 1 ? index / N2 % N1 : index / (N2 * N1);
  }
  // Extent of the box that 16 consecutive rows, those of a warp, make.
  static FASTNA_DEVICE constexpr int warp_extent(int axis) {
    return axis == 2 ? minimum(N2, 16) : axis == 1 ? minimum(N1, 16 / minimum(N2, 16)) : 16 / minimum(N2 * N1, 16);
  }
};

// Where a tile of rows lies.
struct TilePlace {
  int batch, head, group[3], length[3], origin[3];  // length: of the dilation group
};

// Tiles are numbered with the head fastest, then along the axes from the last, then dilation groups, then the batch. False where a
// dilation group is shorter than others and the tile lies behind its end.
template <class Box>
FASTNA_DEVICE bool place_tile(TilePlace& place, const Geometry& geometry, const int (&tiles)[3], int heads, u32 index) {
  u32 rest = index / heads;
  place.head = static_cast<int>(index - rest * heads);
  place.origin[0] = place.origin[1] = place.group[0] = place.group[1] = 0;
  place.length[0] = place.length[1] = 1;
  FASTNA_UNROLL
  for (int i = 2; i >= Box::FIRST; --i) {
    const u32 next = rest / tiles[i];
    place.origin[i] = static_cast<int>(rest - next * tiles[i]) * Box::extent(i);
    rest = next;
  }
  bool holds_tokens = true;
  FASTNA_UNROLL
  for (int i = 2; i >= Box::FIRST; --i) {
    const u32 next = rest / geometry.axis[i].dilation;
    place.group[i] = static_cast<int>(rest - next * geometry.axis[i].dilation);
    place.length[i] = group_length(geometry.axis[i], place.group[i]);
    holds_tokens &= place.origin[i] < place.length[i];
    rest = next;
  }
  place.batch = static_cast<int>(rest);
  return holds_tokens;
}

// What the rows of a tile see, along every axis. Shared memory holds what single rows and warps see: registers are scarce.
template <class Box, bool INVERSE>
struct RowWindows {
  static constexpr int WARPS = Box::SIZE / 16;
  static constexpr int TABLE = 3 * (Box::SIZE + 2 * WARPS);  // intervals in shared memory
  Interval tile[3];         // of all rows together
  const Interval* of_rows;  // [axis][row], from the warp's first row on
  const Interval* of_warp;  // [axis][2]: what any row of the warp sees, empty where none is a token; what each of them sees

  static FASTNA_DEVICE Interval seen(const AxisArguments& axis, int position, int length) {
    if constexpr (INVERSE) return queries_at(axis, position, length);
    return window_at(axis, position, length);
  }

  // All threads of the block; `buffer` holds TABLE intervals.
  FASTNA_DEVICE void place(const Geometry& geometry, const TilePlace& place, int warp, Interval* buffer) {
    const int first_row = warp * 16;
    Interval* warp_buffer = buffer + 3 * Box::SIZE + warp * 6;
    of_rows = buffer + first_row;
    of_warp = warp_buffer;
    FASTNA_UNROLL
    for (int i = 0; i < 3; ++i) {
      if (i < Box::FIRST) {
        tile[i] = {0, 1};
        continue;
      }
      const AxisArguments& axis = geometry.axis[i];
      const int length = place.length[i], last = length - 1;
      // Both ends of a window grow with the row's position: the outermost rows decide for all.
      const Interval low = seen(axis, place.origin[i], length);
      const Interval high = seen(axis, minimum(place.origin[i] + Box::extent(i) - 1, last), length);
      tile[i] = {low.begin, high.end};
      const int first = place.origin[i] + Box::coordinate(first_row, i);
      const Interval warp_low = seen(axis, minimum(first, last), length);
      const Interval warp_high = seen(axis, minimum(first + Box::warp_extent(i) - 1, last), length);
      const Interval any = {warp_low.begin, warp_high.end}, each = {warp_high.begin, warp_low.end}, empty = {0, 0};
      if (lane_index() == 0) {
        // A row that is no token needs its mask: its bias would come from outside the table.
        warp_buffer[2 * i] = first <= last ? any : empty;
        warp_buffer[2 * i + 1] = first + Box::warp_extent(i) - 1 <= last ? each : empty;
      }
      if (lane_index() < 16) {
        const int position = place.origin[i] + Box::coordinate(first_row + lane_index(), i);
        buffer[i * Box::SIZE + first_row + lane_index()] = position <= last ? seen(axis, position, length) : empty;
      }
    }
    sync_warp();
  }

  // Row g (r = 0) or g + 8 (r = 1) of the lane. Empty along some axis where the row is no token.
  FASTNA_DEVICE Interval of_row(int r, int axis) const { return of_rows[axis * Box::SIZE + (lane_index() >> 2) + 8 * r]; }
  FASTNA_DEVICE bool is_token(int r) const {
    bool result = true;
    FASTNA_UNROLL
    for (int i = Box::FIRST; i < 3; ++i) result &= of_row(r, i).end > 0;
    return result;
  }

  // Whether any row of the warp may see a column of the tile at `origin`, and whether every row sees all of them.
  template <class Columns>
  FASTNA_DEVICE bool touches(const int (&origin)[3]) const {
    bool result = true;
    FASTNA_UNROLL
    for (int i = Box::FIRST; i < 3; ++i) {
      const Interval any = of_warp[2 * i];
      result &= origin[i] < any.end && origin[i] + Columns::extent(i) > any.begin;
    }
    return result;
  }
  template <class Columns>
  FASTNA_DEVICE bool sees_all(const int (&origin)[3]) const {
    bool result = true;
    FASTNA_UNROLL
    for (int i = Box::FIRST; i < 3; ++i) {
      const Interval each = of_warp[2 * i + 1];
      result &= origin[i] >= each.begin && origin[i] + Columns::extent(i) <= each.end;
    }
    return result;
  }
};

// Position of row g (r = 0) or g + 8 (r = 1) of the calling lane.
template <class Box>
FASTNA_DEVICE int row_position(const TilePlace& place, int warp, int r, int axis) {
  return place.origin[axis] + Box::coordinate(warp * 16 + (lane_index() >> 2) + 8 * r, axis);
}

// The tiles that cover a box of positions, starting at its corner, last axis fastest.
template <class Box>
struct TileCursor {
  int origin[3];

  FASTNA_DEVICE void start(const Interval (&range)[3]) {
    FASTNA_UNROLL
    for (int i = 0; i < 3; ++i) origin[i] = range[i].begin;
  }
  static FASTNA_DEVICE int count(const Interval (&range)[3]) {
    int result = 1;
    FASTNA_UNROLL
    for (int i = Box::FIRST; i < 3; ++i) result *= ceil_div(range[i].size(), Box::extent(i));
    return result;
  }
  FASTNA_DEVICE void advance(const Interval (&range)[3]) {
    origin[2] += Box::extent(2);
    FASTNA_UNROLL
    for (int i = 2; i > Box::FIRST; --i) {
      if (origin[i] >= range[i].end) {
        origin[i] = range[i].begin;
        origin[i - 1] += Box::extent(i - 1);
      }
    }
  }
  FASTNA_DEVICE void seek(const Interval (&range)[3], int index) {
    start(range);
    FASTNA_UNROLL
    for (int i = 2; i > Box::FIRST; --i) {
      const int tiles = ceil_div(range[i].size(), Box::extent(i));
      origin[i] = range[i].begin + index % tiles * Box::extent(i);
      index /= tiles;
    }
    origin[Box::FIRST] = range[Box::FIRST].begin + index * Box::extent(Box::FIRST);
  }
};

// One head of one dilation group of a tensor: the address of position 0, and elements from a position to the next.
template <int FIRST, class T>
struct GroupView {
  T* data;
  i64 step[3];

  FASTNA_DEVICE GroupView(const TensorArguments& tensor, const Geometry& geometry, const TilePlace& place, int head) {
    data = element<T>(tensor, place.batch, place.group[0], place.group[1], place.group[2], head);
    FASTNA_UNROLL
    for (int i = FIRST; i < 3; ++i) step[i] = geometry.axis[i].dilation * tensor.axis[i];
  }
  // Additional tokens [batch, additional, head, channel] lie along the last axis.
  FASTNA_DEVICE GroupView(const TensorArguments& tensor, int batch, int head) {
    data = element<T>(tensor, batch, 0, 0, 0, head);
    step[2] = tensor.axis[2];
  }
  FASTNA_DEVICE T* at(const int (&position)[3]) const {
    T* result = data;
    FASTNA_UNROLL
    for (int i = FIRST; i < 3; ++i) result += position[i] * step[i];
    return result;
  }
};

// Sends for a tile: zeros where a position is not below `length`. VECTOR is the number of bytes that every address is aligned to:
// 16, 8 or 4 are copied asynchronously; with 2, the tile is written at once and needs the barrier after the wait all the same.
template <class Box, int CHANNELS, int THREADS, int VECTOR, class T>
FASTNA_DEVICE void load_tile(T* tile, const GroupView<Box::FIRST, T>& view, const int (&origin)[3], const int (&length)[3]) {
  constexpr int ELEMENTS = VECTOR / static_cast<int>(sizeof(T));
  constexpr int CHUNKS = CHANNELS / ELEMENTS;
  constexpr int LANES = minimum(CHUNKS & -CHUNKS, 8);  // neighbouring threads that share a row: a power of two
  constexpr int ROWS = THREADS / LANES;                // rows that all threads take at a time
  constexpr int PITCH = tile_pitch<T>(CHANNELS);
  const int row = thread_index() / LANES, chunk = thread_index() % LANES;
  if (Box::SIZE < ROWS && row >= Box::SIZE) return;

  const T* source = view.at(origin) + chunk * ELEMENTS;
  int room[3];
  FASTNA_UNROLL
  for (int i = Box::FIRST; i < 3; ++i) {
    const int coordinate = Box::coordinate(row, i);
    source += coordinate * view.step[i];
    room[i] = length[i] - origin[i] - coordinate;
  }
  T* target = tile + row * PITCH + chunk * ELEMENTS;
  FASTNA_UNROLL
  for (int pass = 0; pass < Box::SIZE; pass += ROWS) {
    // From pass to pass there are but a few different steps; an offset of its own for every pass would cost registers.
    bool valid = true;
    FASTNA_UNROLL
    for (int i = Box::FIRST; i < 3; ++i) {
      valid &= Box::coordinate(pass, i) < room[i];
      const int moved = pass == 0 ? 0 : Box::coordinate(pass, i) - Box::coordinate(pass - ROWS, i);
      if (moved != 0) source += moved * view.step[i];
    }
    FASTNA_UNROLL
    for (int c = 0; c < CHUNKS / LANES; ++c) {
      T* to = target + pass * PITCH + c * LANES * ELEMENTS;
      const T* from = source + c * LANES * ELEMENTS;
      if constexpr (VECTOR >= 4) {
        copy_async<VECTOR>(shared_address(to), from, valid);
      } else {
        *to = valid ? load_readonly(from) : T{0};
      }
    }
  }
}

// Channels between CHANNELS and the next multiple of 16 are zero once and for all: copies never write them.
template <int CHANNELS, int THREADS, class T>
FASTNA_DEVICE void clear_padding(T* tile, int rows) {
  constexpr int PADDING = padded_channels(CHANNELS) - CHANNELS;
  if constexpr (PADDING > 0) {
    for (int i = thread_index(); i < rows * PADDING; i += THREADS) {
      tile[i / PADDING * tile_pitch<T>(CHANNELS) + CHANNELS + i % PADDING] = from_float<T>(0.0f);
    }
  }
}

// Writes the 16 rows that a warp holds, through shared memory of its own (16 rows of the tile's pitch), so that neighbouring lanes
// store neighbouring 16 bytes. Rows that are no token are not written. Output tensors are contiguous and aligned.
template <class Arithmetic, class Box, int CHANNELS, class Output, int DT>
FASTNA_DEVICE void store_rows(Output* buffer, const float (&d)[DT][4], float factor0, float factor1, const GroupView<Box::FIRST, Output>& view,
                              const int (&origin)[3], const int (&length)[3], int warp) {
  constexpr int PITCH = tile_pitch<Output>(CHANNELS);
  constexpr int ELEMENTS = 16 / static_cast<int>(sizeof(Output));
  constexpr int CHUNKS = CHANNELS / ELEMENTS;
  const int lane = lane_index(), g = lane >> 2, q = lane & 3;
  FASTNA_UNROLL
  for (int c = 0; c < DT; ++c) {
    const int channel = Arithmetic::channel(c, q);
    FASTNA_UNROLL
    for (int r = 0; r < 2; ++r) {
      Output* to = buffer + (g + 8 * r) * PITCH + channel;
      const float low = d[c][2 * r] * (r == 0 ? factor0 : factor1), high = d[c][2 * r + 1] * (r == 0 ? factor0 : factor1);
      if constexpr (sizeof(Output) == 2) {
        *reinterpret_cast<u32*>(to) = pack2<Output>(low, high);
      } else {
        *reinterpret_cast<float2*>(to) = float2{low, high};
      }
    }
  }
  sync_warp();
  for (int i = lane; i < 16 * CHUNKS; i += WARP) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    int position[3];
    bool valid = true;
    FASTNA_UNROLL
    for (int a = Box::FIRST; a < 3; ++a) {
      position[a] = origin[a] + Box::coordinate(warp * 16 + row, a);
      valid &= position[a] < length[a];
    }
    if (valid) {
      const uint4 value = *reinterpret_cast<const uint4*>(buffer + row * PITCH + chunk * ELEMENTS);
      store_global_16(view.at(position) + chunk * ELEMENTS, value);
    }
  }
  sync_warp();
}

}  // namespace fastna
