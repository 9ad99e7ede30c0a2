// Relative positional bias in the Hopper kernels: tables [2 K0 - 1, 2 K1 - 1, 2 K2 - 1] in shared memory, times log2(e), of the rows' head
// or, where rows are keys, of all query heads that share them.
//
// A thread's scores are two rows of a box of columns, and a pair's entry is affine in both places: one address per box, and from there
// constants. So a score costs one load of 4 bytes and one multiply-add, and neither index arithmetic nor registers. Eight rows that lie
// along the last axis read 14 neighbouring words: without bank conflicts.
#pragma once

#include "fastna/hopper_tiles.cuh"

namespace fastna {

struct NoBias {
  static constexpr bool PRESENT = false;
};

// Rpb: the tensor's type. K: the window along each axis. HEADS: tables.
template <class Rpb_, int K0, int K1, int K2, int HEADS_>
struct HopperBias {
  static constexpr bool PRESENT = true;
  using Rpb = Rpb_;
  static constexpr int K[3] = {K0, K1, K2};
  static constexpr int PITCH[3] = {(2 * K1 - 1) * (2 * K2 - 1), 2 * K2 - 1, 1};
  static constexpr int HEADS = HEADS_, ENTRIES = (2 * K0 - 1) * PITCH[0];
};

template <class Bias, class Tiles>
struct HopperBiasTable {
  using Place = HopperPlace<Tiles>;
  static constexpr int SIGN = Tiles::INVERSE ? -1 : 1;  // of a column's coordinates: an entry is that of key - query
  // A box holds pairs that no window joins. They are hidden after they have read up to so many entries before a table, or behind it.
  static constexpr int MARGIN = (Tiles::R[0] + Tiles::C[0] - 2) * Bias::PITCH[0] + (Tiles::R[1] + Tiles::C[1] - 2) * Bias::PITCH[1] +
                                (Tiles::R[2] + Tiles::C[2] - 2) * Bias::PITCH[2];
  static_assert((Tiles::R[0] & (Tiles::R[0] - 1)) == 0 && (Tiles::R[1] & (Tiles::R[1] - 1)) == 0 && (Tiles::R[2] & (Tiles::R[2] - 1)) == 0,
                "row + 8 lies a constant away from row");

  float* table;   // MARGIN, HEADS * ENTRIES, MARGIN
  int own_entry;  // of `row` and this lane's first column, were the box at position 0

  static FASTNA_DEVICE int row_entry(int row) {
    return Place::row_offset(row, 0) * Bias::PITCH[0] + Place::row_offset(row, 1) * Bias::PITCH[1] + Place::row_offset(row, 2) * Bias::PITCH[2];
  }

  // own: of the warpgroup's first row; row: this thread's first one.
  FASTNA_DEVICE HopperBiasTable(float* table_, const int (&own)[3], int row, int quad) : table(table_) {
    own_entry = MARGIN + SIGN * (2 * quad - row_entry(row));
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) own_entry += (Bias::K[a] - 1 - SIGN * own[a]) * Bias::PITCH[a];
  }

  // `threads` threads of the block, this one `thread` of them; a barrier among them must follow.
  FASTNA_DEVICE void load(const void* rpb, int first_head, int thread, int threads) const {
    const auto* from = static_cast<const typename Bias::Rpb*>(rpb) + static_cast<i64>(first_head) * Bias::ENTRIES;
    for (int i = thread; i < Bias::HEADS * Bias::ENTRIES; i += threads) table[MARGIN + i] = to_float(load_readonly(from + i)) * LOG2_E;
  }

  // scores = scores * scale + bias
  FASTNA_DEVICE void add(float (&scores)[Tiles::COLUMNS / 2], const Place& place, const typename Place::Walk& walk, float scale) const {
    constexpr int NEXT_ROW = -SIGN * (Tiles::R[2] > 8 ? 8 * Bias::PITCH[2] : Tiles::R[1] * Tiles::R[2] > 8 ? 8 / Tiles::R[2] * Bias::PITCH[1] : 8 / (Tiles::R[1] * Tiles::R[2]) * Bias::PITCH[0]);
    int entry = own_entry + (Bias::HEADS > 1 ? walk.head * Bias::ENTRIES : 0);
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) entry += SIGN * place.box_begin(walk, a) * Bias::PITCH[a];
    const float* first = table + entry;
    FASTNA_UNROLL
    for (int i = 0; i < Tiles::COLUMNS / 2; ++i) {
      const int tile = i / 4, line = tile / (Tiles::C[2] / 8);  // 8 columns; those along the last axis
      const int column = line / Tiles::C[1] * Bias::PITCH[0] + line % Tiles::C[1] * Bias::PITCH[1] + tile % (Tiles::C[2] / 8) * 8 + i % 2;
      scores[i] = scores[i] * scale + first[SIGN * column + (i >> 1 & 1) * NEXT_ROW];
    }
  }
};

template <class Tiles>
struct HopperBiasTable<NoBias, Tiles> {
  FASTNA_DEVICE HopperBiasTable(float*, const int (&)[3], int, int) {}
};

}  // namespace fastna
