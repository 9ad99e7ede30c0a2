// Additional keys in the Hopper kernels whose rows are queries: every query sees them, in boxes behind those of its window.
#pragma once

#include "fastna/hopper_tiles.cuh"

namespace fastna {

// The boxes of keys that a block of queries walks over. PRESENT: there are additional keys; else only those of the window.
template <class Tiles, bool PRESENT>
struct HopperBoxes {
  using Place = HopperPlace<Tiles>;
  static constexpr int N = Tiles::COLUMNS;

  const Place& place;

  FASTNA_DEVICE int steps() const { return place.steps() + (PRESENT ? ceil_div(place.geometry.additional, N) : 0); }
  FASTNA_DEVICE bool is_additional(int step) const { return PRESENT && step >= place.steps(); }
  FASTNA_DEVICE int first_additional(int step) const { return (step - place.steps()) * N; }

  FASTNA_DEVICE bool needs(const HopperSight<Tiles>& sight, const typename Place::Walk& walk) const {
    return is_additional(walk.step) ? !sight.idle : sight.needs(walk);
  }

  // A box of the window at positions `first`; a box of `additional`, a map of one axis, is a row of as many tokens.
  FASTNA_DEVICE void copy(u8* to, int step, const TensorMap& map, const TensorMap& additional, MemoryBarrier& full, int channel,
                          const int (&first)[3]) const {
    if (!is_additional(step)) return place.copy_slices(to, N, map, full, channel, first);
    FASTNA_UNROLL
    for (int s = 0; s < Tiles::SLICES; ++s)
      copy_box(to + s * N * Tiles::ROW_BYTES, additional, full, channel + s * Tiles::SLICE, first_additional(step), 0, 0, place.batch);
  }

  // Scores of an additional box times `factor`; -infinity behind the last key.
  FASTNA_DEVICE void hide(float (&scores)[N / 2], int step, int quad, float factor) const {
    const int left = place.geometry.additional - first_additional(step);
    FASTNA_UNROLL
    for (int i = 0; i < N / 2; ++i) scores[i] = i / 4 * 8 + 2 * quad + i % 2 < left ? scores[i] * factor : -infinity();
  }
};

}  // namespace fastna
