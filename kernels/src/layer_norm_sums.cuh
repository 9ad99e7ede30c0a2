// The last step of layer_norm_backward: the blocks' parts of the gradients of weight and bias, added up in a fixed order.
#pragma once

#include "fastna/primitives.cuh"

namespace fastna {

struct LayerNormSumsArguments {
  const float* parts;    // [count, 2, channels]
  void* grad_weight;     // [channels], or null
  void* grad_bias;       // [channels], or null
  int count;
  int channels;
};

template <class T_, int THREADS_>
struct LayerNormSumsConfig {
  using T = T_;
  static constexpr int THREADS = THREADS_, WARPS = THREADS_ / WARP;
};

// A block has 32 columns of [2, channels], one a lane; its warps share the parts.
template <class Config>
FASTNA_DEVICE void layer_norm_sums(const LayerNormSumsArguments& args) {
  using T = typename Config::T;
  constexpr int WARPS = Config::WARPS;
  float* shared = dynamic_shared<float>();  // [WARPS, WARP]
  const int columns = 2 * args.channels, column = static_cast<int>(block_index()) * WARP + lane_index();
  const bool valid = column < columns;
  float sum = 0.f;
  if (valid) {
    const float* from = args.parts + column;
#pragma unroll 4
    for (int part = thread_index() / WARP; part < args.count; part += WARPS) sum += from[static_cast<i64>(part) * columns];
  }
  shared[thread_index()] = sum;
  sync_threads();
  if (thread_index() >= WARP || !valid) return;
  FASTNA_UNROLL
  for (int w = 1; w < WARPS; ++w) sum += shared[w * WARP + thread_index()];
  void* const gradient = column < args.channels ? args.grad_weight : args.grad_bias;
  if (gradient != nullptr) static_cast<T*>(gradient)[column % args.channels] = from_float<T>(sum);
}

}  // namespace fastna
