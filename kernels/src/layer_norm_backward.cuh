// The gradients of LayerNorm. With n = (x - mean) * rstd and g = grad_output * weight, of every row
//   grad_x = rstd * (g - (sum(g) + n * sum(g * n)) / CHANNELS),
// and over all rows grad_weight = sum(grad_output * n), grad_bias = sum(grad_output): every block leaves its part of these two, of
// rows that depend on nothing but the grid; layer_norm_sums adds them up in order.
#pragma once

#include "fastna/layer_norm.cuh"

namespace fastna {

struct LayerNormBackwardArguments {
  const void* grad_output;    // [rows, CHANNELS], of the output's type
  const void* x;              // [rows, CHANNELS]
  const void* weight;         // [CHANNELS], or null for 1
  const float* mean;          // [rows]
  const float* rstd;          // [rows]
  void* grad_x;               // [rows, CHANNELS], of x's type
  float* parts;               // [blocks, 2, CHANNELS]: of weight and of bias; or null
  int rows;
};

// Floats of shared memory: sum_over_row's, twice, then the sums of every warp, or of the warps that share a row.
template <class Config>
constexpr int LAYER_NORM_KEPT = Config::THREADS / (Config::LANES > WARP ? Config::LANES : WARP);

// What a lane needs of its rows of one step. Rows past the last are zeros, whose gradients add nothing.
template <class Config>
struct LayerNormStep {
  RawChannels<Config, typename Config::X> x[Config::ROWS];
  RawChannels<Config, typename Config::Y> gradient[Config::ROWS];
  float mean[Config::ROWS], rstd[Config::ROWS];

  FASTNA_DEVICE void load(const LayerNormBackwardArguments& args, int start) {
    using X = typename Config::X;
    using Y = typename Config::Y;
    FASTNA_UNROLL
    for (int r = 0; r < Config::ROWS; ++r) {
      const i64 row = start + group_in_block<Config>() + r * Config::GROUPS;
      const bool valid = row < args.rows;
      load_raw<Config>(x[r], static_cast<const X*>(args.x) + row * Config::CHANNELS, valid);
      load_raw<Config>(gradient[r], static_cast<const Y*>(args.grad_output) + row * Config::CHANNELS, valid);
      mean[r] = valid ? args.mean[row] : 0.f;
      rstd[r] = valid ? args.rstd[row] : 0.f;
    }
  }
};

template <class Config>
FASTNA_DEVICE void layer_norm_backward(const LayerNormBackwardArguments& args) {
  using X = typename Config::X;
  using Y = typename Config::Y;
  using W = typename Config::W;
  constexpr int ROWS = Config::ROWS, COUNT = Config::COUNT, UNIT = Config::UNIT, CHANNELS = Config::CHANNELS;
  constexpr int LANES = Config::LANES, KEPT = LAYER_NORM_KEPT<Config>;
  constexpr bool AHEAD = ROWS * COUNT * UNIT <= 16;  // a step is loaded while the last is computed, where registers allow
  float* shared = dynamic_shared<float>();

  LaneChannels<Config> weight_sum, bias_sum;
  FASTNA_UNROLL
  for (int i = 0; i < COUNT; ++i) {
    FASTNA_UNROLL
    for (int j = 0; j < UNIT; ++j) weight_sum[i][j] = bias_sum[i][j] = 0.f;
  }

  const int stride = static_cast<int>(block_count()) * Config::BLOCK_ROWS;
  int turn = 0;  // the exchange is double: a warp may be a step ahead of another
  LayerNormStep<Config> step;
  if constexpr (AHEAD) step.load(args, static_cast<int>(block_index()) * Config::BLOCK_ROWS);
  for (int start = static_cast<int>(block_index()) * Config::BLOCK_ROWS; start < args.rows; start += stride, turn ^= 1) {
    LaneChannels<Config> x[ROWS], gradient[ROWS], weight;
    float mean[ROWS], rstd[ROWS], sums[2 * ROWS];
    if constexpr (!AHEAD) step.load(args, start);
    // From the L1 cache in every step: there are no registers to keep it in.
    load_weights<Config>(weight, static_cast<const W*>(args.weight), 1.f);
    FASTNA_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      unpack_row<Config, X>(x[r], step.x[r]);
      unpack_row<Config, Y>(gradient[r], step.gradient[r]);
      mean[r] = step.mean[r];
      rstd[r] = step.rstd[r];
    }
    if constexpr (AHEAD) step.load(args, start + stride);
    FASTNA_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      sums[2 * r] = sums[2 * r + 1] = 0.f;
      FASTNA_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        FASTNA_UNROLL
        for (int j = 0; j < UNIT; ++j) {
          x[r][i][j] = (x[r][i][j] - mean[r]) * rstd[r];
          weight_sum[i][j] += gradient[r][i][j] * x[r][i][j];
          bias_sum[i][j] += gradient[r][i][j];
          gradient[r][i][j] *= weight[i][j];  // a missing vector's gradient is 0
          sums[2 * r] += gradient[r][i][j];
          sums[2 * r + 1] += gradient[r][i][j] * x[r][i][j];
        }
      }
    }
    sum_over_row<Config>(sums, shared + turn * (2 * ROWS * Config::WARPS));
    FASTNA_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const i64 row = start + group_in_block<Config>() + r * Config::GROUPS;
      if (row >= args.rows) continue;
      const float shift = sums[2 * r] * (1.f / CHANNELS), slope = sums[2 * r + 1] * (1.f / CHANNELS);
      FASTNA_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        FASTNA_UNROLL
        for (int j = 0; j < UNIT; ++j) x[r][i][j] = rstd[r] * (gradient[r][i][j] - shift - x[r][i][j] * slope);
      }
      store_row<Config>(static_cast<X*>(args.grad_x) + row * CHANNELS, x[r]);
    }
  }
  if (args.parts == nullptr) return;

  // Over the rows of a warp by shuffles, then over warps by shared memory.
  FASTNA_UNROLL
  for (int i = 0; i < COUNT; ++i) {
    FASTNA_UNROLL
    for (int j = 0; j < UNIT; ++j) {
      FASTNA_UNROLL
      for (int mask = LANES; mask < WARP; mask *= 2) {
        weight_sum[i][j] += shuffle_xor(weight_sum[i][j], mask);
        bias_sum[i][j] += shuffle_xor(bias_sum[i][j], mask);
      }
    }
  }
  float* kept = shared + 4 * ROWS * Config::WARPS;  // [KEPT, 2, CHANNELS]
  if (LANES >= WARP || lane_index() < LANES) {
    float* mine = kept + thread_index() / (LANES > WARP ? LANES : WARP) * (2 * CHANNELS);
    store_row<Config>(mine, weight_sum);
    store_row<Config>(mine + CHANNELS, bias_sum);
  }
  sync_threads();
  for (int c = thread_index(); c < 2 * CHANNELS; c += Config::THREADS) {
    float sum = 0.f;
    FASTNA_UNROLL
    for (int k = 0; k < KEPT; ++k) sum += kept[k * (2 * CHANNELS) + c];
    args.parts[static_cast<i64>(block_index()) * (2 * CHANNELS) + c] = sum;
  }
}

}  // namespace fastna
