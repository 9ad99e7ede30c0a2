// drpb[h, o] = sum of ds over every (query, key) pair at offset o, as partial sums in a fixed order, without atomics.
//
// A block owns one head, one run of offsets (one per thread) and one share of the queries. Threads of a warp have consecutive offsets,
// hence read consecutive columns of a query's row.
#pragma once

#include "fastna/weights.cuh"

namespace fastna {

struct WeightsBiasGradientArguments {
  Geometry geometry;
  const void* gradients;      // ds, [batch, tokens, heads, pitch]
  float* partials;            // [shares, heads, offsets]
  i64 pitch;
  i64 queries_per_share;      // of the batch * tokens queries
  int runs;                   // ceil(offsets / THREADS)
};

template <class T_, int RANK_, int THREADS_>
struct WeightsBiasGradientConfig {
  using T = T_;
  static constexpr int RANK = RANK_, THREADS = THREADS_;
};

// One query as this kernel needs it: the place in its window of offset o is o + shift.
struct BiasQuery {
  const void* row;
  Point shift, size;
};

template <class Config>
FASTNA_DEVICE void weights_bias_gradient(const WeightsBiasGradientArguments& args) {
  using T = typename Config::T;
  constexpr int RANK = Config::RANK, THREADS = Config::THREADS;
  const Geometry& geometry = args.geometry;
  BiasQuery* queries = dynamic_shared<BiasQuery>();

  const int run = static_cast<int>(block_index() % args.runs), head = static_cast<int>(block_index() / args.runs % geometry.heads);
  const int share = static_cast<int>(block_index() / args.runs / geometry.heads);
  const int offsets = bias_size(geometry), entry = run * THREADS + thread_index();
  const Point offset = unravel<RANK>(entry, 2 * geometry.axis[1].window - 1, 2 * geometry.axis[2].window - 1);
  const int column = window_column<RANK>(geometry, offset);

  const int tokens = token_count(geometry);
  const i64 first = share * args.queries_per_share;
  const i64 last = minimum(first + args.queries_per_share, static_cast<i64>(geometry.batch) * tokens);
  float sum = 0.f;
  for (i64 base = first; base < last; base += THREADS) {
    const int count = static_cast<int>(minimum(last - base, static_cast<i64>(THREADS)));
    sync_threads();
    if (thread_index() < count) {
      const i64 index = base + thread_index();
      const Grouped at = grouped<RANK>(
          geometry, unravel<RANK>(static_cast<int>(index % tokens), geometry.axis[1].length, geometry.axis[2].length));
      const Box keys = window_box<RANK>(geometry, at.group, at.position);
      BiasQuery query;
      FASTNA_UNROLL
      for (int i = 0; i < 3; ++i)
        query.shift.at[i] = at.position.at[i] - (geometry.axis[i].window - 1) - keys.begin.at[i];
      query.size = keys.size;
      query.row = static_cast<const T*>(args.gradients) + (index * geometry.heads + head) * args.pitch;
      queries[thread_index()] = query;
    }
    sync_threads();
    if (entry < offsets) {
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const BiasQuery& query = queries[i];
        Point place;
        FASTNA_UNROLL
        for (int a = 0; a < 3; ++a) place.at[a] = offset.at[a] + query.shift.at[a];
        if (in_box<RANK>({{0, 0, 0}}, query.size, place))
          sum += to_float(load_readonly(static_cast<const T*>(query.row) + column + window_column<RANK>(geometry, query.shift)));
      }
    }
  }
  if (entry < offsets) args.partials[(static_cast<i64>(share) * geometry.heads + head) * offsets + entry] = sum;
}

}  // namespace fastna
