// From a product of queries and keys to scores: scale, bias, mask. In base 2: s = (scale q.k + bias) log2(e), -infinity where unseen.
#pragma once

#include "fastna/flash_tile.cuh"

namespace fastna {

enum class BiasKind { NONE, SHARED, GLOBAL };

// The bias of one head, [2 k0 - 1, 2 k1 - 1, 2 k2 - 1]: a copy in shared memory, already times log2(e), or the tensor itself.
template <BiasKind KIND, class Rpb>
struct BiasTable {
  const float* shared;
  const Rpb* global;
  int pitch[3];

  FASTNA_DEVICE static int size(const Geometry& geometry) {
    int entries = 1;
    FASTNA_UNROLL
    for (int i = 0; i < 3; ++i) entries *= 2 * geometry.axis[i].window - 1;
    return entries;
  }

  FASTNA_DEVICE void set_pitches(const Geometry& geometry) {
    pitch[2] = 1;
    pitch[1] = 2 * geometry.axis[2].window - 1;
    pitch[0] = pitch[1] * (2 * geometry.axis[1].window - 1);
  }

  // All threads of the block; a shared table may be read after the next barrier.
  FASTNA_DEVICE void select_head(const Geometry& geometry, const void* rpb, int head, float* buffer, int threads) {
    if constexpr (KIND == BiasKind::NONE) return;
    set_pitches(geometry);
    const int entries = size(geometry);
    global = static_cast<const Rpb*>(rpb) + static_cast<i64>(head) * entries;
    if constexpr (KIND == BiasKind::SHARED) {
      shared = buffer;
      for (int i = thread_index(); i < entries; i += threads) buffer[i] = to_float(load_readonly(global + i)) * LOG2_E;
    }
  }

  FASTNA_DEVICE float at(int entry) const {
    if constexpr (KIND == BiasKind::SHARED) return shared[entry];
    return to_float(load_readonly(global + entry)) * LOG2_E;
  }
};

// Scores of a tile whose columns are the box at `origin`: keys, or queries where INVERSE, which turns the sign of the bias' offsets.
// Where every row sees every column, no mask is computed.
template <class Rows, class Columns, BiasKind KIND, bool INVERSE, int NT, class Rpb>
FASTNA_DEVICE void finish_scores(float (&s)[NT][4], const RowWindows<Rows, INVERSE>& rows, const TilePlace& place, int warp,
                                 const int (&origin)[3], float scale, const BiasTable<KIND, Rpb>& bias, const Geometry& geometry) {
  const int q = lane_index() & 3;
  const bool full = rows.template sees_all<Columns>(origin);
  FASTNA_UNROLL
  for (int r = 0; r < 2; ++r) {
    // The bias' entry of the lane's first column, and how it grows with a column's coordinates.
    int entry[2] = {0, 0}, growth[3] = {0, 0, 0};
    if constexpr (KIND != BiasKind::NONE) {
      FASTNA_UNROLL
      for (int i = Columns::FIRST; i < 3; ++i) {
        const int ahead = origin[i] - row_position<Rows>(place, warp, r, i);
        growth[i] = INVERSE ? -bias.pitch[i] : bias.pitch[i];
        FASTNA_UNROLL
        for (int e = 0; e < 2; ++e)
          entry[e] += (geometry.axis[i].window - 1) * bias.pitch[i] + (ahead + Columns::coordinate(2 * q + e, i)) * growth[i];
      }
    }
    // How far the lane's first column lies behind the begin of the row's window, and how wide that is.
    int behind[2][3];
    u32 width[3];
    if (!full) {
      FASTNA_UNROLL
      for (int i = Columns::FIRST; i < 3; ++i) {
        const Interval seen = rows.of_row(r, i);
        width[i] = static_cast<u32>(seen.size());
        FASTNA_UNROLL
        for (int e = 0; e < 2; ++e) behind[e][i] = origin[i] + Columns::coordinate(2 * q + e, i) - seen.begin;
      }
    }
    auto score = [&](float product, int j, int e) {
      float result = product * scale;
      if constexpr (KIND != BiasKind::NONE) {
        int at = entry[e];
        FASTNA_UNROLL
        for (int i = Columns::FIRST; i < 3; ++i) at += Columns::coordinate(8 * j, i) * growth[i];
        result += bias.at(at);
      }
      return result;
    };
    if (full) {
      FASTNA_UNROLL
      for (int j = 0; j < NT; ++j) {
        FASTNA_UNROLL
        for (int e = 0; e < 2; ++e) s[j][2 * r + e] = score(s[j][2 * r + e], j, e);
      }
    } else {
      FASTNA_UNROLL
      for (int j = 0; j < NT; ++j) {
        FASTNA_UNROLL
        for (int e = 0; e < 2; ++e) {
          bool seen = true;
          FASTNA_UNROLL
          for (int i = Columns::FIRST; i < 3; ++i) seen &= static_cast<u32>(behind[e][i] + Columns::coordinate(8 * j, i)) < width[i];
          s[j][2 * r + e] = seen ? score(s[j][2 * r + e], j, e) : -infinity();
        }
      }
    }
  }
}

// Scores of additional keys: every row sees them all, and none has a bias. Columns from `count` on are not there.
template <int NT>
FASTNA_DEVICE void finish_additional_scores(float (&s)[NT][4], int count, float scale) {
  const int q = lane_index() & 3;
  FASTNA_UNROLL
  for (int j = 0; j < NT; ++j) {
    FASTNA_UNROLL
    for (int e = 0; e < 4; ++e) s[j][e] = 8 * j + 2 * q + (e & 1) < count ? s[j][e] * scale : -infinity();
  }
}

// Sum and maximum over the four lanes that share a row.
FASTNA_DEVICE float sum_of_row(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}
FASTNA_DEVICE float maximum_of_row(float value) {
  value = maximum(value, shuffle_xor(value, 1));
  return maximum(value, shuffle_xor(value, 2));
}

// Softmax of rows that arrive tile by tile (Milakov and Gimelshein, arXiv 1805.02867), in base 2. Sums stay partial in each lane.
struct OnlineSoftmax {
  float highest[2], sum[2];

  FASTNA_DEVICE void start() {
    highest[0] = highest[1] = -infinity();
    sum[0] = sum[1] = 0.0f;
  }

  // Scores become weights relative to the highest score so far; what was accumulated before is rescaled to it.
  template <int NT, int DT>
  FASTNA_DEVICE void add(float (&s)[NT][4], float (&accumulated)[DT][4]) {
    FASTNA_UNROLL
    for (int r = 0; r < 2; ++r) {
      float top = highest[r];
      FASTNA_UNROLL
      for (int j = 0; j < NT; ++j) top = maximum(top, maximum(s[j][2 * r], s[j][2 * r + 1]));
      top = maximum_of_row(top);
      // A row that has seen nothing yet keeps -infinity as its maximum; -infinity minus -infinity must not arise.
      const float base = top == -infinity() ? 0.0f : top;
      const float shrink = exp2_approx(highest[r] - base);
      highest[r] = top;
      sum[r] *= shrink;
      FASTNA_UNROLL
      for (int j = 0; j < NT; ++j) {
        FASTNA_UNROLL
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          s[j][e] = exp2_approx(s[j][e] - base);
          sum[r] += s[j][e];
        }
      }
      FASTNA_UNROLL
      for (int c = 0; c < DT; ++c) {
        accumulated[c][2 * r] *= shrink;
        accumulated[c][2 * r + 1] *= shrink;
      }
    }
  }

  FASTNA_DEVICE void finish() {
    sum[0] = sum_of_row(sum[0]);
    sum[1] = sum_of_row(sum[1]);
  }
};

}  // namespace fastna
