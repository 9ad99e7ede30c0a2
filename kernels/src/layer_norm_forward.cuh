// LayerNorm: output = (x - mean) * rstd * weight + bias of every row, rstd = 1 / sqrt(variance + eps). Mean first, then variance.
#pragma once

#include "fastna/layer_norm.cuh"

namespace fastna {

struct LayerNormForwardArguments {
  const void* x;         // [rows, CHANNELS]
  const void* weight;    // [CHANNELS], or null for 1
  const void* bias;      // [CHANNELS], or null for 0
  void* output;          // [rows, CHANNELS]
  float* mean;           // [rows], or null, with rstd, where no gradient will be asked for
  float* rstd;
  int rows;
  float eps;
};

template <class Config>
FASTNA_DEVICE void layer_norm_forward(const LayerNormForwardArguments& args) {
  using X = typename Config::X;
  using Y = typename Config::Y;
  using W = typename Config::W;
  constexpr int ROWS = Config::ROWS, COUNT = Config::COUNT, UNIT = Config::UNIT, CHANNELS = Config::CHANNELS;
  float* exchange = dynamic_shared<float>();  // two of sum_over_row's

  const int first = static_cast<int>(block_index()) * Config::BLOCK_ROWS + group_in_block<Config>();
  RawChannels<Config, X> raw[ROWS];
  LaneChannels<Config> x[ROWS], weight, bias;
  FASTNA_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const i64 row = first + r * Config::GROUPS;
    load_raw<Config>(raw[r], static_cast<const X*>(args.x) + row * CHANNELS, row < args.rows);
  }
  load_weights<Config>(weight, static_cast<const W*>(args.weight), 1.f);
  load_weights<Config>(bias, static_cast<const W*>(args.bias), 0.f);

  float mean[ROWS], rstd[ROWS];
  FASTNA_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    unpack_row<Config, X>(x[r], raw[r]);
    mean[r] = 0.f;
    FASTNA_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      FASTNA_UNROLL
      for (int j = 0; j < UNIT; ++j) mean[r] += x[r][i][j];
    }
  }
  sum_over_row<Config>(mean, exchange);
  FASTNA_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    mean[r] /= CHANNELS;  // times the rounded inverse it would be off to the same side in every row, which sums over rows show
    rstd[r] = 0.f;
    FASTNA_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      if (!has_vector<Config>(i)) continue;
      FASTNA_UNROLL
      for (int j = 0; j < UNIT; ++j) {
        x[r][i][j] -= mean[r];
        rstd[r] += x[r][i][j] * x[r][i][j];
      }
    }
  }
  sum_over_row<Config>(rstd, exchange + Config::WARPS * ROWS);

  FASTNA_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const i64 row = first + r * Config::GROUPS;
    if (row >= args.rows) continue;
    rstd[r] = rsqrt_approx(rstd[r] * (1.f / CHANNELS) + args.eps);
    FASTNA_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      FASTNA_UNROLL
      for (int j = 0; j < UNIT; ++j) x[r][i][j] = x[r][i][j] * rstd[r] * weight[i][j] + bias[i][j];
    }
    store_row<Config>(static_cast<Y*>(args.output) + row * CHANNELS, x[r]);
    if (args.mean != nullptr && lane_in_row<Config>() == 0) {
      args.mean[row] = mean[r];
      args.rstd[row] = rstd[r];
    }
  }
}

}  // namespace fastna
