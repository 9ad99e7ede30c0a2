// What both directions of LayerNorm share: which lanes hold which channels of which rows.
//
// A row is CHANNELS numbers in a line of contiguous memory. LANES neighbouring lanes of a block hold it in registers, in vectors of UNIT
// channels: lane l has vectors l, l + LANES, ... Such a group of lanes takes ROWS rows at once, GROUPS rows apart, so that enough loads
// are under way. Rows of more than a warp's lanes add up through shared memory.
#pragma once

#include "fastna/weights.cuh"

namespace fastna {

// X, Y, W: the types of the input, of the output, of weight and bias. All arithmetic is in float.
template <class X_, class Y_, class W_, int CHANNELS_, int LANES_, int ROWS_, int THREADS_>
struct LayerNormConfig {
  using X = X_;
  using Y = Y_;
  using W = W_;
  static constexpr int CHANNELS = CHANNELS_, LANES = LANES_, ROWS = ROWS_, THREADS = THREADS_;
  // Vectors of 16 bytes; where types of 2 and 4 bytes meet, of 8 and 16, so that neighbouring lanes leave no gaps.
  static constexpr int UNIT = sizeof(X) == 2 && sizeof(Y) == 2 ? 8 : 4;
  static constexpr int VECTORS = CHANNELS / UNIT;                    // of a row
  static constexpr int COUNT = (VECTORS + LANES - 1) / LANES;        // of a lane
  static constexpr int GROUPS = THREADS / LANES;                     // of lanes, in a block
  static constexpr int BLOCK_ROWS = GROUPS * ROWS;
  static constexpr int WARPS = THREADS / WARP;
  static_assert(CHANNELS % UNIT == 0 && THREADS % LANES == 0 && (LANES & (LANES - 1)) == 0, "");
};

// A lane's channels of one row.
template <class Config>
using LaneChannels = float[Config::COUNT][Config::UNIT];

// The same as memory holds them.
template <class Config, class T>
struct RawChannels {
  static constexpr int WORDS = Config::UNIT * sizeof(T) / 4;
  u32 words[Config::COUNT][WORDS];
};

template <int WORDS>
FASTNA_DEVICE void load_words(u32 (&words)[WORDS], const void* from) {
  if constexpr (WORDS == 2) {
    const uint2 raw = *static_cast<const uint2*>(from);
    words[0] = raw.x, words[1] = raw.y;
  } else {
    FASTNA_UNROLL
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 raw = load_global_16(static_cast<const u32*>(from) + i);
      words[i] = raw.x, words[i + 1] = raw.y, words[i + 2] = raw.z, words[i + 3] = raw.w;
    }
  }
}

template <class T, int UNIT>
FASTNA_DEVICE void store_channels(T* to, const float (&values)[UNIT]) {
  if constexpr (UNIT * sizeof(T) == 8) {
    *reinterpret_cast<uint2*>(to) = {pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3])};
  } else {
    FASTNA_UNROLL
    for (int i = 0; i < UNIT; i += VECTOR<T>) {
      float part[VECTOR<T>];
      FASTNA_UNROLL
      for (int j = 0; j < VECTOR<T>; ++j) part[j] = values[i + j];
      store_global_16(to + i, pack_vector<T>(part));
    }
  }
}

template <class Config>
FASTNA_DEVICE int lane_in_row() {
  return thread_index() % Config::LANES;
}
template <class Config>
FASTNA_DEVICE int group_in_block() {
  return thread_index() / Config::LANES;
}

// Channel at which vector i of this lane begins. Whether there is one: only the last may be missing.
template <class Config>
FASTNA_DEVICE int first_channel(int i) {
  return (lane_in_row<Config>() + i * Config::LANES) * Config::UNIT;
}
template <class Config>
FASTNA_DEVICE bool has_vector(int i) {
  return Config::VECTORS % Config::LANES == 0 || i + 1 < Config::COUNT || first_channel<Config>(i) < Config::CHANNELS;
}

// A lane's channels of the row at `row`; zeros where there are none, or no row.
template <class Config, class T>
FASTNA_DEVICE void load_raw(RawChannels<Config, T>& raw, const T* row, bool valid) {
  constexpr int WORDS = RawChannels<Config, T>::WORDS;
  FASTNA_UNROLL
  for (int i = 0; i < Config::COUNT; ++i) {
    FASTNA_UNROLL
    for (int w = 0; w < WORDS; ++w) raw.words[i][w] = 0;
    if (valid && has_vector<Config>(i)) load_words<WORDS>(raw.words[i], row + first_channel<Config>(i));
  }
}

template <class Config, class T>
FASTNA_DEVICE void unpack_row(LaneChannels<Config>& values, const RawChannels<Config, T>& raw) {
  FASTNA_UNROLL
  for (int i = 0; i < Config::COUNT; ++i) {
    FASTNA_UNROLL
    for (int w = 0; w < RawChannels<Config, T>::WORDS; ++w) {
      if constexpr (sizeof(T) == 4) {
        values[i][w] = bits_float(raw.words[i][w]);
      } else {
        const float2 pair = unpack2<T>(raw.words[i][w]);
        values[i][2 * w] = pair.x;
        values[i][2 * w + 1] = pair.y;
      }
    }
  }
}

// Weight or bias, which begin at `weights`; `otherwise` where there are none.
template <class Config, class T>
FASTNA_DEVICE void load_weights(LaneChannels<Config>& values, const T* weights, float otherwise) {
  RawChannels<Config, T> raw;
  load_raw<Config>(raw, weights, weights != nullptr);
  unpack_row<Config, T>(values, raw);
  if (weights != nullptr) return;
  FASTNA_UNROLL
  for (int i = 0; i < Config::COUNT; ++i) {
    FASTNA_UNROLL
    for (int j = 0; j < Config::UNIT; ++j) values[i][j] = otherwise;
  }
}

template <class Config, class T>
FASTNA_DEVICE void store_row(T* row, const LaneChannels<Config>& values) {
  FASTNA_UNROLL
  for (int i = 0; i < Config::COUNT; ++i)
    if (has_vector<Config>(i)) store_channels<T, Config::UNIT>(row + first_channel<Config>(i), values[i]);
}

// Each of N numbers summed over the lanes of a row, in every lane, always in the same order. The whole block calls. `exchange`, for
// rows of more than a warp, holds WARPS * N floats, which nothing else touches until a barrier has followed.
template <class Config, int N>
FASTNA_DEVICE void sum_over_row(float (&sums)[N], float* exchange) {
  constexpr int LANES = Config::LANES;
  FASTNA_UNROLL
  for (int mask = minimum(LANES, WARP) / 2; mask > 0; mask /= 2) {
    FASTNA_UNROLL
    for (int i = 0; i < N; ++i) sums[i] += shuffle_xor(sums[i], mask);
  }
  if constexpr (LANES > WARP) {
    constexpr int SHARERS = LANES / WARP;
    const int warp = thread_index() / WARP;
    if (lane_index() == 0) {
      FASTNA_UNROLL
      for (int i = 0; i < N; ++i) exchange[warp * N + i] = sums[i];
    }
    sync_threads();
    FASTNA_UNROLL
    for (int i = 0; i < N; ++i) {
      sums[i] = 0.f;
      FASTNA_UNROLL
      for (int w = 0; w < SHARERS; ++w) sums[i] += exchange[(warp / SHARERS * SHARERS + w) * N + i];
    }
  }
}

}  // namespace fastna
