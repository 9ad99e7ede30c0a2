// The last step of hopper_joint: grad_query = scale * the sums, in the query's type. A thread takes 8 channels of a query.
#pragma once

#include "src/hopper_joint.cuh"

namespace fastna {

struct HopperSumsArguments {
  Geometry geometry;
  const float* sums;  // see HopperSums
  void* grad_query;   // [batch, *space, heads, head_dim], contiguous
  i64 chunks;         // of 8 channels, in all
};

template <class T_, int HEAD_DIM_, int THREADS_>
struct HopperSumsConfig {
  using T = T_;
  static constexpr int CHUNKS = HEAD_DIM_ / 8, THREADS = THREADS_;
};

template <class Config>
FASTNA_DEVICE void hopper_sums(const HopperSumsArguments& args) {
  using T = typename Config::T;
  const Geometry& geometry = args.geometry;
  const i64 index = static_cast<i64>(block_index()) * Config::THREADS + thread_index();
  if (index >= args.chunks) return;
  const int chunk = index % Config::CHUNKS;
  i64 rest = index / Config::CHUNKS;
  const int head = rest % geometry.heads;
  rest /= geometry.heads;
  int group[3], position[3];
  FASTNA_UNROLL
  for (int a = 2; a >= 0; --a) {
    const int token = rest % geometry.axis[a].length;
    rest /= geometry.axis[a].length;
    group[a] = group_of(geometry.axis[a], token);
    position[a] = position_of(geometry.axis[a], token);
  }
  const i64 row = HopperSums::row(geometry, static_cast<int>(rest), head, group, position);
  const auto* from = reinterpret_cast<const float4*>(args.sums + (row * Config::CHUNKS + HopperSums::chunk(chunk, position[2])) * 8);
  const float4 low = load_readonly(from), high = load_readonly(from + 1);
  const float scale = geometry.scale;
  store_global_16(static_cast<T*>(args.grad_query) + index * 8, {pack2<T>(low.x * scale, low.y * scale), pack2<T>(low.z * scale, low.w * scale),
                                                               pack2<T>(high.x * scale, high.y * scale), pack2<T>(high.z * scale, high.w * scale)});
}

}  // namespace fastna
