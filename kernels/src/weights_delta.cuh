// delta = sum(grad_output * output) - grad_lse of every query: what the softmax's gradient subtracts, gradient of lse included.
#pragma once

#include "fastna/weights.cuh"

namespace fastna {

struct WeightsDeltaArguments {
  Geometry geometry;
  TensorArguments output, grad_output;
  const float* grad_lse;    // [batch, tokens, heads], or null for 0
  float* delta;             // [batch, tokens, heads]
  int channels;
  int blocks;               // per batch entry
};

template <class T_, int RANK_, int LANES_, int THREADS_>
struct WeightsDeltaConfig {
  using T = T_;
  static constexpr int RANK = RANK_, LANES = LANES_, THREADS = THREADS_;
};

template <class Config>
FASTNA_DEVICE void weights_delta(const WeightsDeltaArguments& args) {
  using T = typename Config::T;
  constexpr int LANES = Config::LANES, ROWS = Config::THREADS / LANES;
  const Geometry& geometry = args.geometry;

  const int rows = token_count(geometry) * geometry.heads;
  const int batch = static_cast<int>(block_index() / args.blocks);
  const int row = static_cast<int>(block_index() - batch * args.blocks) * ROWS + thread_index() / LANES;
  const bool valid = row < rows;
  float sum = 0.f;
  if (valid) {
    const int token = row / geometry.heads, head = row - token * geometry.heads;
    const Point at = unravel<Config::RANK>(token, geometry.axis[1].length, geometry.axis[2].length);
    const T* output = channels_at<T>(args.output, batch, at, head);
    const T* gradient = channels_at<T>(args.grad_output, batch, at, head);
    for (int c = thread_index() % LANES * VECTOR<T>; c < args.channels; c += LANES * VECTOR<T>)
      sum = dot_vector<T>(load_global_16(output + c), load_global_16(gradient + c), sum);
  }
  FASTNA_UNROLL
  for (int mask = LANES / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (!valid || thread_index() % LANES != 0) return;
  const i64 index = static_cast<i64>(batch) * rows + row;
  args.delta[index] = args.grad_lse ? sum - args.grad_lse[index] : sum;
}

}  // namespace fastna
