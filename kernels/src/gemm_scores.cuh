// Pointwise-neighbourhood (arXiv 2403.04690): a tile of queries times the keys around it as one GEMM, scattered into the weights.
//
// Also grad_output times value. The keys that any query of the tile sees come in runs of 64, additional keys last; channels in chunks of
// 32. A step is one chunk of one run; the next step's chunk is under way while this one is multiplied.
#pragma once

#include "fastna/gemm_product.cuh"
#include "fastna/gemm_tile.cuh"

namespace fastna {

struct GemmScoresArguments {
  Geometry geometry;
  GemmTiles tiles;
  TensorArguments query, key, additional;    // grad_output, value and additional values for the gradient
  void* weights;                             // [batch, tokens, heads, pitch]; the gradient replaces the weights
  const float* rpb;                          // [heads, offsets], or null
  const float* statistic;                    // lse, or delta for the gradient: [batch, tokens, heads]
  i64 pitch;
  int channels;
  int resident;                              // whether shared memory holds all channels of the queries
};

template <class T_, bool TF32_, int RANK_, ScoreMode MODE_>
struct GemmScoresConfig : GemmType<T_, TF32_> {
  static constexpr int RANK = RANK_;
  static constexpr ScoreMode MODE = MODE_;
};

template <class Config>
FASTNA_DEVICE void gemm_scores(const GemmScoresArguments& args) {
  using T = typename Config::T;
  constexpr int RANK = Config::RANK, PITCH = k_pitch<T>(GEMM_DEPTH), CHUNK = GEMM_TILE * PITCH;
  constexpr ScoreMode MODE = Config::MODE;
  constexpr int STAGED = 8, STAGED_PITCH = row_pitch(GEMM_TILE);
  const Geometry& geometry = args.geometry;
  const GemmTile tile = tile_of_block<RANK>(geometry, args.tiles, geometry.heads, 1);
  if (tile.empty) return;

  const int chunks = ceil_div(args.channels, GEMM_DEPTH);
  T* key_chunks = dynamic_shared<T>();                       // two
  T* query_chunks = key_chunks + 2 * CHUNK;                  // all of them, or two
  float* staged = reinterpret_cast<float*>(query_chunks + (args.resident ? chunks : 2) * CHUNK);
  GemmQuery* queries = reinterpret_cast<GemmQuery*>(staged + GEMM_THREADS / WARP * STAGED * STAGED_PITCH);
  GemmKey* keys = reinterpret_cast<GemmKey*>(queries + GEMM_TILE);    // three runs: one read late, one in use, one to come

  const int thread = thread_index(), lane = lane_index(), warp = warp_index();
  const int key_head = tile.head / heads_per_key(geometry);
  const Box box = keys_of_tile<RANK>(geometry, tile);
  const int window_runs = ceil_div(volume<RANK>(box.size), GEMM_TILE);
  const int runs = window_runs + ceil_div(geometry.additional, GEMM_TILE), steps = runs * chunks;
  const float* rpb = MODE != ScoreMode::GRADIENT && args.rpb ? args.rpb + static_cast<i64>(tile.head) * bias_size(geometry) : nullptr;

  const auto describe_keys = [&](int run) {
    if (thread >= GEMM_TILE) return;
    const bool additional = run >= window_runs;
    const int index = (run - (additional ? window_runs : 0)) * GEMM_TILE + thread;
    keys[run % 3 * GEMM_TILE + thread] =
        key_of_run<T, RANK>(geometry, tile, box, index, additional, args.key, args.additional, key_head);
  };
  const auto copy_step = [&](int run, int chunk, int step) {
    const GemmKey* run_keys = keys + run % 3 * GEMM_TILE;
    copy_rows<T, GEMM_TILE, GEMM_DEPTH, PITCH>(key_chunks + step % 2 * CHUNK, chunk * GEMM_DEPTH, args.channels,
                                               [&](int row) { return run_keys[row].data; });
    if (!args.resident || run == 0)
      copy_rows<T, GEMM_TILE, GEMM_DEPTH, PITCH>(query_chunks + (args.resident ? chunk : step % 2) * CHUNK, chunk * GEMM_DEPTH,
                                                 args.channels, [&](int row) { return queries[row].data; });
    commit_copies();
  };

  if (thread < GEMM_TILE) {
    GemmQuery query = no_query();
    if (thread < volume<RANK>(tile.size)) {
      const Point position = position_in<RANK>(tile.first, tile.size, thread);
      const Point token = token_point<RANK>(geometry, tile.group, position);
      query = query_at<RANK>(geometry, tile, position, args.pitch, tile.head);
      query.data = channels_at<T>(args.query, tile.batch, token, tile.head);
      if (MODE != ScoreMode::SCORE)
        query.statistic = args.statistic[row_index(geometry, tile.batch, token_index<RANK>(geometry, token), geometry.heads, tile.head)];
    }
    queries[thread] = query;
  }
  describe_keys(0);
  sync_threads();
  copy_step(0, 0, 0);

  Accumulator<GEMM_TILE> sum = {};
  for (int run = 0, chunk = 0, step = 0; step < steps; ++step) {
    const bool last = chunk + 1 == chunks;
    const int next_run = last ? run + 1 : run, next_chunk = last ? 0 : chunk + 1;
    if (last && next_run < runs) describe_keys(next_run);
    wait_copies<0>();
    sync_threads();
    if (step + 1 < steps) copy_step(next_run, next_chunk, step + 1);

    const T* query_chunk = query_chunks + (args.resident ? chunk : step % 2) * CHUNK + warp * 16 * PITCH;
    multiply_tiles<Config, Major::K, Major::K, GEMM_TILE, GEMM_DEPTH, PITCH, PITCH>(sum, query_chunk, key_chunks + step % 2 * CHUNK);

    if (last) {
      // Through shared memory, eight rows at a time, so that a warp writes consecutive keys of one query.
      float* rows = staged + warp * STAGED * STAGED_PITCH;
      const bool additional = run >= window_runs;
      const GemmKey* run_keys = keys + run % 3 * GEMM_TILE;
      const GemmKey own[2] = {run_keys[lane], run_keys[lane + WARP]};
      FASTNA_UNROLL
      for (int half = 0; half < 2; ++half) {
        sync_warp();
        FASTNA_UNROLL
        for (int n = 0; n < GEMM_TILE / 8; ++n) {
          float* pair = rows + lane / 4 * STAGED_PITCH + n * 8 + lane % 4 * 2;
          *reinterpret_cast<float2*>(pair) = {sum[n][2 * half], sum[n][2 * half + 1]};
          sum[n][2 * half] = sum[n][2 * half + 1] = 0.f;
        }
        sync_warp();
#pragma unroll 2
        for (int row = 0; row < STAGED; ++row) {
          const GemmQuery& query = queries[warp * 16 + half * STAGED + row];
          FASTNA_UNROLL
          for (int side = 0; side < 2; ++side) {
            const int column = column_of_pair<RANK>(query, own[side], additional);
            if (column < 0) continue;
            const float bias = rpb && !additional ? rpb[own[side].entry - query.entry] : 0.f;
            score_value<T, MODE>(static_cast<T*>(args.weights) + query.weights + column,
                                 rows[row * STAGED_PITCH + lane + side * WARP], geometry.scale, bias, query.statistic);
          }
        }
      }
    }
    run = next_run;
    chunk = next_chunk;
  }
}

}  // namespace fastna
