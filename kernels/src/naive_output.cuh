// Weights times value over the window, one thread per four bytes of output: the output, and with ds and key the query's gradient.
#pragma once

#include "fastna/naive_pair.cuh"
#include "fastna/weights.cuh"

namespace fastna {

struct NaiveOutputArguments {
  Geometry geometry;
  const void* weights;                   // [batch, tokens, heads, pitch]: weights, or ds
  TensorArguments value, additional;     // or key and additional keys
  void* output;                          // [batch, tokens, heads, channels]
  i64 pitch;
  float factor;                          // 1, or the scale
  Chunks chunks;                         // rows: tokens * heads, columns: channels of 4 bytes
};

template <class T_, int RANK_, int THREADS_>
struct NaiveOutputConfig {
  using T = T_;
  static constexpr int RANK = RANK_, THREADS = THREADS_;
};

template <class Config>
FASTNA_DEVICE void naive_output(const NaiveOutputArguments& args) {
  using T = typename Config::T;
  constexpr int RANK = Config::RANK;
  const Geometry& geometry = args.geometry;
  const MatrixElement at = element_of_thread<Config::THREADS>(args.chunks);
  if (!at.valid) return;

  const int token = at.row / geometry.heads, head = at.row - token * geometry.heads;
  const int key_head = head / heads_per_key(geometry), channel = at.column * PAIR<T>;
  const Grouped query =
      grouped<RANK>(geometry, unravel<RANK>(token, geometry.axis[1].length, geometry.axis[2].length));
  const Box keys = window_box<RANK>(geometry, query.group, query.position);
  const i64 row = static_cast<i64>(at.batch) * args.chunks.rows + at.row;
  const T* weights = static_cast<const T*>(args.weights) + row * args.pitch;
  const T* corner =
      channels_at<T>(args.value, at.batch, token_point<RANK>(geometry, query.group, keys.begin), key_head) + channel;
  i64 step[3];
  FASTNA_UNROLL
  for (int i = 0; i < 3; ++i) step[i] = args.value.axis[i] * geometry.axis[i].dilation;

  Pair sum;
  for (int i0 = 0; i0 < keys.size.at[0]; ++i0) {
    for (int i1 = 0; i1 < keys.size.at[1]; ++i1) {
      const T* value = corner + i0 * step[0] + i1 * step[1];
      const T* line = weights + window_column<RANK>(geometry, {{i0, i1, 0}});
#pragma unroll 4
      for (int i2 = 0; i2 < keys.size.at[2]; ++i2, value += step[2]) sum.add(to_float(line[i2]), value);
    }
  }
  const T* extra = weights + window_size(geometry);
  for (int i = 0; i < geometry.additional; ++i)
    sum.add(to_float(extra[i]), additional_at<T>(args.additional, at.batch, i, key_head) + channel);
  sum.store(static_cast<T*>(args.output) + (row * args.chunks.columns + at.column) * PAIR<T>, args.factor);
}

}  // namespace fastna
