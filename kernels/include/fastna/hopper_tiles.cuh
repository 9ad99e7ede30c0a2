// How the Hopper kernels cut a problem: rows stay in a block (queries, or keys for their own gradients), columns stream past them in boxes.
//
// A block has WARPGROUPS boxes of 64 rows of one head and dilation group. Boxes of columns cover the union of what its rows see, starting
// where that union starts. A warpgroup works on a box only if it meets the union of its own rows' windows; a box inside all of these
// windows needs no mask.
#pragma once

#include "fastna/hopper.cuh"
#include "fastna/window.cuh"

namespace fastna {

// R: rows of one warpgroup along each axis, 64 in all. W: warpgroups along each axis. C: columns of a box along each axis.
// INVERSE: rows are keys, columns the queries that see them.
template <class T, int HEAD_DIM_, bool INVERSE_, int R0, int R1, int R2, int W0, int W1, int W2, int C0, int C1, int C2, int STAGES_>
struct HopperTiles {
  using Element = T;
  static constexpr bool INVERSE = INVERSE_;
  static constexpr int HEAD_DIM = HEAD_DIM_, STAGES = STAGES_;
  static constexpr int R[3] = {R0, R1, R2}, W[3] = {W0, W1, W2}, C[3] = {C0, C1, C2};
  static constexpr int WARPGROUPS = W0 * W1 * W2, COLUMNS = C0 * C1 * C2;
  static constexpr int ROW_BYTES = HEAD_DIM % 64 == 0 ? 128 : HEAD_DIM % 32 == 0 ? 64 : 32;  // of a slice of channels, and its swizzle
  static constexpr int SLICE = ROW_BYTES / 2, SLICES = HEAD_DIM / SLICE;
  static constexpr int ROWS_BYTES = 64 * HEAD_DIM * 2, BOX_BYTES = COLUMNS * HEAD_DIM * 2;
  static_assert(C1 <= 32, "rows of a box are hidden by the bits of one word");
  static_assert(R0 * R1 * R2 == 64, "a warpgroup multiplies 64 rows");
  static_assert(C2 % 8 == 0 && COLUMNS % 16 == 0 && COLUMNS <= 256, "eight columns of a box lie side by side; wgmma takes 16 to 256");
  static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head_dim is a multiple of 16 up to 256");
};

// Bits [begin, end) of 32; what lies outside them is cut off.
FASTNA_DEVICE u32 bits(int begin, int end) {
  const auto below = [](int i) { return i <= 0 ? 0u : i >= 32 ? ~0u : (1u << i) - 1; };
  return below(end) & ~below(begin);
}

// Chunk `c` of 16 bytes of row `r` in a slice with rows of ROW_BYTES: where TMA and wgmma expect it.
template <int ROW_BYTES>
FASTNA_DEVICE u32 swizzled_chunk(int r, int c) {
  constexpr int mask = ROW_BYTES / 16 - 1;
  return r * ROW_BYTES + ((c ^ ((r * ROW_BYTES >> 7) & mask)) << 4);
}

// A block's place, and its walk over the boxes of columns.
template <class Tiles>
struct HopperPlace {
  using Windows = Interval[3][64];  // of a warpgroup's rows, per axis

  const Geometry& geometry;
  int batch, head;                     // of the rows
  int origin[3], group[3], length[3];  // the block's first row, its dilation group and that group's length
  int start[3], boxes[3];              // first column that the block's rows see, and boxes along each axis
  bool empty;                          // the dilation group is shorter than the longest one, and ends before this block

  FASTNA_DEVICE HopperPlace(const Geometry& geometry_, const int (&tiles)[3], int heads) : geometry(geometry_) {
    u32 index = block_index();
    const auto next = [&](int count) {
      const int value = index % static_cast<u32>(count);
      index /= static_cast<u32>(count);
      return value;
    };
    // Tiles first: blocks that run together share columns in the L2 cache.
    FASTNA_UNROLL
    for (int a = 2; a >= 0; --a) origin[a] = next(tiles[a]) * Tiles::R[a] * Tiles::W[a];
    FASTNA_UNROLL
    for (int a = 2; a >= 0; --a) group[a] = next(geometry.axis[a].dilation);
    head = next(heads);
    batch = index;
    empty = false;
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) {
      length[a] = group_length(geometry.axis[a], group[a]);
      empty |= origin[a] >= length[a];
      const int last = minimum(origin[a] + Tiles::R[a] * Tiles::W[a], length[a]) - 1;
      start[a] = seen(a, minimum(origin[a], last)).begin;
      boxes[a] = ceil_div(seen(a, last).end - start[a], Tiles::C[a]);
    }
  }

  FASTNA_DEVICE Interval seen(int a, int position) const {
    if constexpr (Tiles::INVERSE) return queries_at(geometry.axis[a], position, length[a]);
    else return window_at(geometry.axis[a], position, length[a]);
  }
  FASTNA_DEVICE int token(int a, int position) const { return position * geometry.axis[a].dilation + group[a]; }

  // ---- Boxes of columns, the last axis fastest; the same in every warpgroup. `head` counts the heads that share the rows.
  struct Walk {
    int step, at[3], head;
  };
  FASTNA_DEVICE void advance(Walk& walk) const {
    ++walk.step;
    if (++walk.at[2] < boxes[2]) return;
    walk.at[2] = 0;
    if (++walk.at[1] < boxes[1]) return;
    walk.at[1] = 0;
    if (++walk.at[0] < boxes[0] || !Tiles::INVERSE) return;
    walk.at[0] = 0;
    ++walk.head;
  }
  FASTNA_DEVICE int steps() const { return boxes[0] * boxes[1] * boxes[2]; }
  FASTNA_DEVICE int box_begin(const Walk& walk, int a) const { return start[a] + walk.at[a] * Tiles::C[a]; }

  // The box at positions `first`, `rows` tokens in all, channels from `channel`: one copy per slice of channels.
  FASTNA_DEVICE void copy_slices(u8* to, int rows, const TensorMap& map, MemoryBarrier& full, int channel, const int (&first)[3]) const {
    FASTNA_UNROLL
    for (int s = 0; s < Tiles::SLICES; ++s)
      copy_box(to + s * rows * Tiles::ROW_BYTES, map, full, channel + s * Tiles::SLICE, token(2, first[2]), token(1, first[1]), token(0, first[0]), batch);
  }

  // ---- The rows of warpgroup `w`
  FASTNA_DEVICE void own_origin(int w, int (&first)[3]) const {
    first[0] = origin[0] + w / (Tiles::W[1] * Tiles::W[2]) * Tiles::R[0];
    first[1] = origin[1] + w / Tiles::W[2] % Tiles::W[1] * Tiles::R[1];
    first[2] = origin[2] + w % Tiles::W[2] * Tiles::R[2];
  }
  // Position of a row along axis `a`, from the warpgroup's first.
  static FASTNA_DEVICE int row_offset(int row, int a) {
    return a == 2 ? row % Tiles::R[2] : a == 1 ? row / Tiles::R[2] % Tiles::R[1] : row / (Tiles::R[1] * Tiles::R[2]);
  }
  // Token of a row of the warpgroup that begins at `own`; false beyond the end of the dilation group.
  FASTNA_DEVICE bool locate(const int (&own)[3], int row, int (&at)[3]) const {
    bool inside = true;
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) {
      const int position = own[a] + row_offset(row, a);
      inside &= position < length[a];
      at[a] = token(a, position);
    }
    return inside;
  }

  // Of a token and the block's head in [batch, *space, heads], where rows are queries.
  FASTNA_DEVICE i64 query_index(const int (&at)[3]) const {
    i64 index = batch;
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) index = index * geometry.axis[a].length + at[a];
    return index * geometry.heads + head;
  }

  // Sums for the rows of warpgroup `w`, as accumulators hold them, times `factor`. `slot`: rows in shared memory that are no longer needed.
  FASTNA_DEVICE void store(int w, const int (&own)[3], int thread, const float (&sums)[Tiles::HEAD_DIM / 2], float factor, u8* slot,
                           const TensorArguments& to) const {
    using T = typename Tiles::Element;
    constexpr int D = Tiles::HEAD_DIM, SLICE = Tiles::SLICE, ROW = Tiles::ROW_BYTES, CHUNKS = D / 8;
    const int row = thread / 32 * 16 + lane_index() / 4, quad = lane_index() & 3;
    FASTNA_UNROLL
    for (int i = 0; i < D / 4; ++i) {
      const int n = i / 2, half_ = i % 2;
      const u32 at = n * 8 / SLICE * 64 * ROW + swizzled_chunk<ROW>(row + 8 * half_, n * 8 % SLICE / 8) + quad * 4;
      *reinterpret_cast<u32*>(slot + at) = pack2<T>(sums[2 * i] * factor, sums[2 * i + 1] * factor);
    }
    named_barrier(1 + w, 128);
    for (int i = thread; i < 64 * CHUNKS; i += 128) {
      const int r = i / CHUNKS, chunk = i % CHUNKS;
      int at[3];
      if (!locate(own, r, at)) continue;
      const u32 from = chunk * 8 / SLICE * 64 * ROW + swizzled_chunk<ROW>(r, chunk % (SLICE / 8));
      store_global_16(element<T>(to, batch, at[0], at[1], at[2], head) + chunk * 8, load_global_16(slot + from));
    }
  }
};

// What the rows of one warpgroup see: the union of their windows and the intersection.
template <class Tiles>
struct HopperSight {
  using Place = HopperPlace<Tiles>;
  using Walk = typename Place::Walk;

  const Place& place;
  const typename Place::Windows& windows;
  bool idle;  // no row lies inside the dilation group
  Interval any[3], all[3];

  // Threads of the warpgroup fill `table`; a barrier among them must follow.
  FASTNA_DEVICE HopperSight(const Place& place_, const int (&own)[3], int thread, typename Place::Windows& table)
      : place(place_), windows(table), idle(false) {
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) {
      const int end = place.length[a];
      idle |= own[a] >= end;
      const Interval head = place.seen(a, minimum(own[a], end - 1)), tail = place.seen(a, minimum(own[a] + Tiles::R[a], end) - 1);
      any[a] = {head.begin, tail.end};
      all[a] = {tail.begin, head.end};
      if (thread < 64) table[a][thread] = place.seen(a, minimum(own[a] + Place::row_offset(thread, a), end - 1));
    }
  }

  FASTNA_DEVICE bool needs(const Walk& walk) const {
    bool meets = !idle;
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) {
      const int begin = place.box_begin(walk, a);
      meets &= begin < any[a].end && begin + Tiles::C[a] > any[a].begin;
    }
    return meets;
  }
  FASTNA_DEVICE bool inside(const Walk& walk, int a) const {
    const int begin = place.box_begin(walk, a);
    return begin >= all[a].begin && begin + Tiles::C[a] <= all[a].end;
  }

  // Scores of columns that `row` and `row + 8` do not see become -infinity.
  FASTNA_DEVICE void hide(float (&scores)[Tiles::COLUMNS / 2], const Walk& walk, int row, int quad) const {
    if (!inside(walk, 0) || !inside(walk, 1)) hide_lines(scores, walk, row);
    if (!inside(walk, 2)) hide_columns(scores, walk, row, quad);
  }

 private:
  // Along the first two axes.
  FASTNA_DEVICE void hide_lines(float (&scores)[Tiles::COLUMNS / 2], const Walk& walk, int row) const {
    FASTNA_UNROLL
    for (int half_ = 0; half_ < 2; ++half_) {
      const Interval planes = windows[0][row + 8 * half_], lines = windows[1][row + 8 * half_];
      const int plane = place.box_begin(walk, 0), line = place.box_begin(walk, 1);
      const u32 visible = bits(lines.begin - line, lines.end - line);
      FASTNA_UNROLL
      for (int c0 = 0; c0 < Tiles::C[0]; ++c0) {
        const u32 in_plane = planes.contains(plane + c0) ? visible : 0;
        FASTNA_UNROLL
        for (int c1 = 0; c1 < Tiles::C[1]; ++c1) {
          FASTNA_UNROLL
          for (int n = 0; n < Tiles::C[2] / 8; ++n) {
            float* score = scores + ((c0 * Tiles::C[1] + c1) * (Tiles::C[2] / 8) + n) * 4 + half_ * 2;
            if (!(in_plane >> c1 & 1)) score[0] = score[1] = -infinity();
          }
        }
      }
    }
  }
  FASTNA_DEVICE void hide_columns(float (&scores)[Tiles::COLUMNS / 2], const Walk& walk, int row, int quad) const {
    FASTNA_UNROLL
    for (int half_ = 0; half_ < 2; ++half_) {
      const Interval columns = windows[2][row + 8 * half_];
      const int first = place.box_begin(walk, 2) + 2 * quad;
      FASTNA_UNROLL
      for (int n = 0; n < Tiles::C[2] / 8; ++n) {
        const int word = n / 4 * 32;
        const u32 visible = bits(columns.begin - first - word, columns.end - first - word);
        FASTNA_UNROLL
        for (int c = 0; c < 2; ++c) {
          FASTNA_UNROLL
          for (int r = 0; r < Tiles::C[0] * Tiles::C[1]; ++r)
            if (!(visible >> (n * 8 + c - word) & 1)) scores[(r * (Tiles::C[2] / 8) + n) * 4 + half_ * 2 + c] = -infinity();
        }
      }
    }
  }
};

}  // namespace fastna
