// Gradient of the additional keys (ds and query) or values (weights and grad_output): every query sees them, so the queries are shared
// out, and one thread per channel adds up its share. The shares are added in a fixed order afterwards.
#pragma once

#include "fastna/weights.cuh"

namespace fastna {

struct NaiveAdditionalArguments {
  Geometry geometry;
  const void* weights;        // [batch, tokens, heads, pitch]: ds, or weights
  TensorArguments source;     // query, or grad_output
  float* partials;            // [shares, batch, additional, key_heads, channels]
  i64 pitch;
  float factor;               // the scale, or 1
  int tokens_per_share;
  Chunks chunks;              // a matrix per share and batch entry; rows: additional * key_heads, columns: channels
};

template <class T_, int RANK_, int THREADS_>
struct NaiveAdditionalConfig {
  using T = T_;
  static constexpr int RANK = RANK_, THREADS = THREADS_;
};

template <class Config>
FASTNA_DEVICE void naive_additional(const NaiveAdditionalArguments& args) {
  using T = typename Config::T;
  constexpr int RANK = Config::RANK;
  const Geometry& geometry = args.geometry;
  const MatrixElement at = element_of_thread<Config::THREADS>(args.chunks);
  if (!at.valid) return;

  const int share = at.batch / geometry.batch, batch = at.batch - share * geometry.batch;
  const int index = at.row / geometry.key_heads, key_head = at.row - index * geometry.key_heads;
  const int shared_by = heads_per_key(geometry), column = window_size(geometry) + index;
  const int first = share * args.tokens_per_share;
  const int last = minimum(first + args.tokens_per_share, token_count(geometry));
  float sum = 0.f;
  for (int token = first; token < last; ++token) {
    const Point query = unravel<RANK>(token, geometry.axis[1].length, geometry.axis[2].length);
    for (int head = key_head * shared_by; head < (key_head + 1) * shared_by; ++head) {
      const i64 row = row_index(geometry, batch, token, geometry.heads, head);
      const float weight = to_float(static_cast<const T*>(args.weights)[row * args.pitch + column]);
      sum += weight * to_float(channels_at<T>(args.source, batch, query, head)[at.column]);
    }
  }
  args.partials[(static_cast<i64>(at.batch) * args.chunks.rows + at.row) * args.chunks.columns + at.column] = sum * args.factor;
}

}  // namespace fastna
