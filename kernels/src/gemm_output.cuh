// Neighbourhood-neighbourhood (arXiv 2403.04690): weights gathered for a tile of queries, times the values around it, as one GEMM.
// With ds and key it is the query's gradient.
//
// The keys that any query of the tile sees come in runs of 32, additional keys last. A warp gathers the weights of its own 16 queries,
// lane by key; the next run's weights and values are under way while this one is multiplied.
#pragma once

#include "fastna/gemm_product.cuh"
#include "fastna/gemm_tile.cuh"

namespace fastna {

struct GemmOutputArguments {
  Geometry geometry;
  GemmTiles tiles;
  const void* weights;                   // [batch, tokens, heads, pitch]: weights, or ds
  TensorArguments value, additional;     // or key and additional keys
  void* output;                          // [batch, tokens, heads, channels]
  i64 pitch;
  int channels;
  float factor;                          // 1, or the scale
};

// CHANNELS of the output per block: a part of them where there are more.
template <class T_, bool TF32_, int RANK_, int CHANNELS_>
struct GemmOutputConfig : GemmType<T_, TF32_> {
  static constexpr int RANK = RANK_, CHANNELS = CHANNELS_;
};

template <class Config>
FASTNA_DEVICE void gemm_output(const GemmOutputArguments& args) {
  using T = typename Config::T;
  constexpr int RANK = Config::RANK, CHANNELS = Config::CHANNELS;
  constexpr int A_PITCH = k_pitch<T>(GEMM_RUN), B_PITCH = row_pitch(CHANNELS), ROWS = GEMM_TILE * WARP / GEMM_THREADS;
  const Geometry& geometry = args.geometry;
  const int parts = ceil_div(args.channels, CHANNELS);
  const GemmTile tile = tile_of_block<RANK>(geometry, args.tiles, geometry.heads, parts);
  if (tile.empty) return;

  T* values = dynamic_shared<T>();                       // two runs
  T* gathered = values + 2 * GEMM_RUN * B_PITCH;         // two
  GemmQuery* queries = reinterpret_cast<GemmQuery*>(gathered + 2 * GEMM_TILE * A_PITCH);
  GemmKey* keys = reinterpret_cast<GemmKey*>(queries + GEMM_TILE);    // two runs

  const int thread = thread_index(), lane = lane_index(), warp = warp_index();
  const int key_head = tile.head / heads_per_key(geometry), first_channel = tile.part * CHANNELS;
  const Box box = keys_of_tile<RANK>(geometry, tile);
  const int window_runs = ceil_div(volume<RANK>(box.size), GEMM_RUN);
  const int runs = window_runs + ceil_div(geometry.additional, GEMM_RUN);

  const auto describe_keys = [&](int run) {
    if (thread >= GEMM_RUN) return;
    const bool additional = run >= window_runs;
    const int index = (run - (additional ? window_runs : 0)) * GEMM_RUN + thread;
    keys[run % 2 * GEMM_RUN + thread] =
        key_of_run<T, RANK>(geometry, tile, box, index, additional, args.value, args.additional, key_head);
  };
  T own[ROWS];
  const auto fetch = [&](int run) {
    const GemmKey* run_keys = keys + run % 2 * GEMM_RUN;
    copy_rows<T, GEMM_RUN, CHANNELS, B_PITCH>(values + run % 2 * GEMM_RUN * B_PITCH, first_channel, args.channels,
                                              [&](int row) { return run_keys[row].data; });
    commit_copies();
    const GemmKey key = run_keys[lane];
    FASTNA_UNROLL
    for (int row = 0; row < ROWS; ++row) {
      const GemmQuery& query = queries[warp * ROWS + row];
      const int column = column_of_pair<RANK>(query, key, run >= window_runs);
      own[row] = column < 0 ? from_float<T>(0.f) : load_readonly(static_cast<const T*>(args.weights) + query.weights + column);
    }
  };

  if (thread < GEMM_TILE) {
    GemmQuery query = no_query();
    if (thread < volume<RANK>(tile.size))
      query = query_at<RANK>(geometry, tile, position_in<RANK>(tile.first, tile.size, thread), args.pitch, tile.head);
    queries[thread] = query;
  }
  describe_keys(0);
  sync_threads();
  fetch(0);

  Accumulator<CHANNELS> sum = {};
  for (int run = 0; run < runs; ++run) {
    T* weights = gathered + (run % 2 * GEMM_TILE + warp * ROWS) * A_PITCH;
    FASTNA_UNROLL
    for (int row = 0; row < ROWS; ++row) weights[row * A_PITCH + lane] = own[row];
    if (run + 1 < runs) describe_keys(run + 1);
    wait_copies<0>();
    sync_threads();
    if (run + 1 < runs) fetch(run + 1);
    multiply_tiles<Config, Major::K, Major::ROW, CHANNELS, GEMM_RUN, A_PITCH, B_PITCH>(sum, weights,
                                                                                      values + run % 2 * GEMM_RUN * B_PITCH);
  }

  FASTNA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + lane / 4;
    if (row >= volume<RANK>(tile.size)) continue;
    T* output = static_cast<T*>(args.output) + queries[row].weights / args.pitch * args.channels;
    FASTNA_UNROLL
    for (int n = 0; n < CHANNELS / 8; ++n) {
      const int channel = first_channel + n * 8 + lane % 4 * 2;
      if (channel < args.channels) store_pair<T>(output + channel, sum[n][2 * half] * args.factor, sum[n][2 * half + 1] * args.factor);
    }
  }
}

}  // namespace fastna
