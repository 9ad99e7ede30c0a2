// Gradient of the bias without atomics: the same call twice gives the same bits.
//
// The gradients of a tile of scores go to shared memory. Every thread then owns some of the tile's offsets (key - query), adds up the
// pairs at each in a fixed order, and adds the sum to its block's own table, which the host sums over blocks.
#pragma once

#include "fastna/flash_config.cuh"

namespace fastna {

template <BiasKind KIND, class Queries, class Keys>
struct BiasGradient {
  static constexpr int PITCH = Keys::SIZE + 2;  // of the tile in shared memory
  static constexpr int TILE = Queries::SIZE * PITCH;
  float* tile;
  float* table;
  float* partial;
  int entries;

  // `buffer`: TILE floats, then the table where it is shared. `partial`: the block's table in global memory, zeros at first.
  FASTNA_DEVICE void start(float* buffer, float* partial_, int entries_, int threads) {
    if constexpr (KIND == BiasKind::NONE) return;
    tile = buffer;
    partial = partial_;
    entries = entries_;
    table = KIND == BiasKind::SHARED ? buffer + TILE : partial;
    if constexpr (KIND == BiasKind::SHARED) {
      for (int i = thread_index(); i < entries; i += threads) table[i] = 0.0f;
    }
  }

  // All threads, with a barrier of the block between two calls.
  template <int NT>
  FASTNA_DEVICE void add(const float (&ds)[NT][4], const TilePlace& place, const int (&origin)[3], const Geometry& geometry, int warp) {
    if constexpr (KIND == BiasKind::NONE) return;
    float* row = tile + (warp * 16 + (lane_index() >> 2)) * PITCH + (lane_index() & 3) * 2;
    FASTNA_UNROLL
    for (int j = 0; j < NT; ++j) {
      *reinterpret_cast<float2*>(row + 8 * j) = float2{ds[j][0], ds[j][1]};
      *reinterpret_cast<float2*>(row + 8 * PITCH + 8 * j) = float2{ds[j][2], ds[j][3]};
    }
    sync_threads();

    constexpr int OFFSETS[3] = {Queries::extent(0) + Keys::extent(0) - 1, Queries::extent(1) + Keys::extent(1) - 1,
                                Queries::extent(2) + Keys::extent(2) - 1};
    constexpr int THREADS = Queries::SIZE / 16 * WARP;
    for (int o = thread_index(); o < OFFSETS[0] * OFFSETS[1] * OFFSETS[2]; o += THREADS) {
      const int at[3] = {o / (OFFSETS[1] * OFFSETS[2]), o / OFFSETS[2] % OFFSETS[1], o % OFFSETS[2]};
      int entry = 0, shift[3], begin[3], end[3];
      bool inside = true;
      FASTNA_UNROLL
      for (int i = 0; i < 3; ++i) {
        const int window = geometry.axis[i].window;
        shift[i] = at[i] - (Queries::extent(i) - 1);  // of the key against the query, both counted from their tile's corner
        begin[i] = maximum(0, -shift[i]);
        end[i] = minimum(Queries::extent(i), Keys::extent(i) - shift[i]);
        const int offset = origin[i] - place.origin[i] + shift[i] + window - 1;
        inside &= offset >= 0 && offset < 2 * window - 1;
        entry = entry * (2 * window - 1) + offset;
      }
      if (!inside) continue;
      float sum = 0.0f;
      for (int a0 = begin[0]; a0 < end[0]; ++a0) {
        for (int a1 = begin[1]; a1 < end[1]; ++a1) {
          const int query_row = (a0 * Queries::extent(1) + a1) * Queries::extent(2);
          const int key_row = ((a0 + shift[0]) * Keys::extent(1) + a1 + shift[1]) * Keys::extent(2) + shift[2];
          for (int a2 = begin[2]; a2 < end[2]; ++a2) sum += tile[(query_row + a2) * PITCH + key_row + a2];
        }
      }
      table[entry] += sum;
    }
  }

  FASTNA_DEVICE void finish(int threads) {
    if constexpr (KIND == BiasKind::SHARED) {
      sync_threads();
      for (int i = thread_index(); i < entries; i += threads) partial[i] = table[i];
    }
  }
};

}  // namespace fastna
