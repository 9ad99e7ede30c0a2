// What hopper_gradient needs of every query besides its vectors, in 16 bytes that a tensor copy can move:
// lse * log2(e), and delta = sum(grad_output * output) - grad_lse.
#pragma once

#include "fastna/weights.cuh"

namespace fastna {

struct HopperStatisticsArguments {
  Geometry geometry;
  TensorArguments output, grad_output;
  const float* lse;       // [batch, tokens, heads], natural logarithm
  const float* grad_lse;  // the same, or null for 0
  float4* statistics;     // [batch, tokens, heads] of {lse * log2(e), delta, 0, 0}
  int blocks;             // per batch entry
};

template <class T_, int HEAD_DIM_, int THREADS_>
struct HopperStatisticsConfig {
  using T = T_;
  static constexpr int CHUNKS = HEAD_DIM_ / 8, THREADS = THREADS_;  // of 16 bytes
  static constexpr int LANES = CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;  // per query
  static_assert(HEAD_DIM_ % 16 == 0 && HEAD_DIM_ <= 256, "head_dim is a multiple of 16 up to 256");
};

template <class Config>
FASTNA_DEVICE void hopper_statistics(const HopperStatisticsArguments& args) {
  using T = typename Config::T;
  const Geometry& geometry = args.geometry;
  const int rows = token_count(geometry) * geometry.heads;
  const int batch = static_cast<int>(block_index() / args.blocks);
  const int row = static_cast<int>(block_index() - batch * args.blocks) * (Config::THREADS / Config::LANES) + thread_index() / Config::LANES;
  const int chunk = thread_index() % Config::LANES;
  const bool valid = row < rows;
  float sum = 0.0f;
  if (valid && chunk < Config::CHUNKS) {
    const int token = row / geometry.heads, head = row - token * geometry.heads;
    const Point at = unravel<3>(token, geometry.axis[1].length, geometry.axis[2].length);
    sum = dot_vector<T>(load_global_16(channels_at<T>(args.output, batch, at, head) + chunk * 8),
                        load_global_16(channels_at<T>(args.grad_output, batch, at, head) + chunk * 8), 0.0f);
  }
  FASTNA_UNROLL
  for (int mask = Config::LANES / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (!valid || chunk != 0) return;
  const i64 index = static_cast<i64>(batch) * rows + row;
  args.statistics[index] = {args.lse[index] * LOG2_E, args.grad_lse ? sum - args.grad_lse[index] : sum, 0.0f, 0.0f};
}

}  // namespace fastna
