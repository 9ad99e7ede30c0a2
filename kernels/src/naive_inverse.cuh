// Inverse neighbourhood: every key gathers from the queries that see it, one thread per four bytes of gradient.
// With ds and query it is the key's gradient, with the weights and grad_output the value's. Heads that share a key head are added.
#pragma once

#include "fastna/naive_pair.cuh"
#include "fastna/weights.cuh"

namespace fastna {

struct NaiveInverseArguments {
  Geometry geometry;
  const void* weights;       // [batch, tokens, heads, pitch]: ds, or weights
  TensorArguments source;    // query, or grad_output
  void* gradient;            // [batch, tokens, key_heads, channels]
  i64 pitch;
  float factor;              // the scale, or 1
  Chunks chunks;             // rows: tokens * key_heads, columns: channels of 4 bytes
};

template <class T_, int RANK_, int THREADS_>
struct NaiveInverseConfig {
  using T = T_;
  static constexpr int RANK = RANK_, THREADS = THREADS_;
};

template <class Config>
FASTNA_DEVICE void naive_inverse(const NaiveInverseArguments& args) {
  using T = typename Config::T;
  constexpr int RANK = Config::RANK;
  const Geometry& geometry = args.geometry;
  const MatrixElement at = element_of_thread<Config::THREADS>(args.chunks);
  if (!at.valid) return;

  const int token = at.row / geometry.key_heads, key_head = at.row - token * geometry.key_heads;
  const int channel = at.column * PAIR<T>, shared_by = heads_per_key(geometry);
  const Grouped key =
      grouped<RANK>(geometry, unravel<RANK>(token, geometry.axis[1].length, geometry.axis[2].length));
  Interval queries[3] = {{0, 1}, {0, 1}, {0, 1}};
  int length[3] = {1, 1, 1};
  FASTNA_UNROLL
  for (int i = 3 - RANK; i < 3; ++i) {
    length[i] = group_length(geometry.axis[i], key.group.at[i]);
    queries[i] = queries_at(geometry.axis[i], key.position.at[i], length[i]);
  }

  // Place of the key in the window of the query at `position`, along one axis.
  const auto place = [&](int i, int position) {
    return key.position.at[i] - window_at(geometry.axis[i], position, length[i]).begin;
  };
  Pair sum;
  for (int head = key_head * shared_by; head < (key_head + 1) * shared_by; ++head) {
    for (int p0 = queries[0].begin; p0 < queries[0].end; ++p0) {
      const int place0 = RANK > 2 ? place(0, p0) : 0;
      for (int p1 = queries[1].begin; p1 < queries[1].end; ++p1) {
        const int place1 = RANK > 1 ? place(1, p1) : 0;
        for (int p2 = queries[2].begin; p2 < queries[2].end; ++p2) {
          const Point query = token_point<RANK>(geometry, key.group, {{p0, p1, p2}});
          const i64 row = row_index(geometry, at.batch, token_index<RANK>(geometry, query), geometry.heads, head);
          const int column = window_column<RANK>(geometry, {{place0, place1, place(2, p2)}});
          const float weight = to_float(static_cast<const T*>(args.weights)[row * args.pitch + column]);
          sum.add(weight, channels_at<T>(args.source, at.batch, query, head) + channel);
        }
      }
    }
  }
  const i64 row = static_cast<i64>(at.batch) * args.chunks.rows + at.row;
  sum.store(static_cast<T*>(args.gradient) + (row * args.chunks.columns + at.column) * PAIR<T>, args.factor);
}

}  // namespace fastna
