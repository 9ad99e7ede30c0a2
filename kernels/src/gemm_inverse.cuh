// Inverse neighbourhood (arXiv 2403.04690): weights gathered for a tile of keys from the queries that see them, times those queries' rows.
// With ds and query it is the key's gradient, with the weights and grad_output the value's. Heads that share a key head are added.
//
// Queries come in runs of 32. A warp gathers the weights of 8 queries, lane by key, since neighbouring keys are neighbours in a query's
// row; the next run's weights and rows are under way while this one is multiplied.
//
// ADDITIONAL: the tile is of additional keys, which every query sees. A block takes a share of the tokens and leaves a partial sum;
// the shares are added in a fixed order afterwards.
#pragma once

#include "fastna/gemm_product.cuh"
#include "fastna/gemm_tile.cuh"

namespace fastna {

struct GemmInverseArguments {
  Geometry geometry;
  GemmTiles tiles;
  const void* weights;       // [batch, tokens, heads, pitch]: ds, or weights
  TensorArguments source;    // query, or grad_output
  void* gradient;            // [batch, tokens, key_heads, channels]; float [shares, batch, additional, key_heads, channels] if ADDITIONAL
  i64 pitch;
  int channels;
  float factor;              // the scale, or 1
  int tokens_per_share;      // if ADDITIONAL
};

// CHANNELS of the gradient per block: a part of them where there are more.
template <class T_, bool TF32_, int RANK_, int CHANNELS_, bool ADDITIONAL_>
struct GemmInverseConfig : GemmType<T_, TF32_> {
  static constexpr int RANK = RANK_, CHANNELS = CHANNELS_;
  static constexpr bool ADDITIONAL = ADDITIONAL_;
};

// 64 additional keys and a share of the tokens. Parts fastest, then key heads, tiles, batch, shares.
struct AdditionalTile {
  int part, head, first, batch, share;
};

FASTNA_DEVICE AdditionalTile additional_tile_of_block(const Geometry& geometry, int parts) {
  AdditionalTile tile;
  const int tiles = ceil_div(geometry.additional, GEMM_TILE);
  int rest = static_cast<int>(block_index());
  tile.part = rest % parts;
  rest /= parts;
  tile.head = rest % geometry.key_heads;
  rest /= geometry.key_heads;
  tile.first = rest % tiles * GEMM_TILE;
  rest /= tiles;
  tile.batch = rest % geometry.batch;
  tile.share = rest / geometry.batch;
  return tile;
}

template <class Config>
FASTNA_DEVICE void gemm_inverse(const GemmInverseArguments& args) {
  using T = typename Config::T;
  constexpr int RANK = Config::RANK, CHANNELS = Config::CHANNELS;
  constexpr bool ADDITIONAL = Config::ADDITIONAL;
  constexpr int A_PITCH = row_pitch(GEMM_TILE), B_PITCH = row_pitch(CHANNELS), ROWS = GEMM_RUN * WARP / GEMM_THREADS;
  const Geometry& geometry = args.geometry;
  const int parts = ceil_div(args.channels, CHANNELS), shared_by = heads_per_key(geometry);

  GemmTile tile = {};
  AdditionalTile additional = {};
  Box box = {{{0, 0, 0}}, {{1, 1, 1}}};
  int queries_per_head;
  if constexpr (ADDITIONAL) {
    additional = additional_tile_of_block(geometry, parts);
    tile.batch = additional.batch;
    tile.head = additional.head;
    tile.part = additional.part;
    queries_per_head = minimum(args.tokens_per_share, token_count(geometry) - additional.share * args.tokens_per_share);
  } else {
    tile = tile_of_block<RANK>(geometry, args.tiles, geometry.key_heads, parts);
    if (tile.empty) return;
    box = queries_of_tile<RANK>(geometry, tile);
    queries_per_head = volume<RANK>(box.size);
  }

  T* sources = dynamic_shared<T>();                      // two runs
  T* gathered = sources + 2 * GEMM_RUN * B_PITCH;        // two
  GemmQuery* queries = reinterpret_cast<GemmQuery*>(gathered + 2 * GEMM_RUN * A_PITCH);    // two runs

  const int thread = thread_index(), lane = lane_index(), warp = warp_index();
  const int first_channel = tile.part * CHANNELS;
  const int runs_per_head = ceil_div(queries_per_head, GEMM_RUN), runs = runs_per_head * shared_by;

  const auto query_of = [&](int index, int head) {
    if constexpr (ADDITIONAL) {
      const int token = additional.share * args.tokens_per_share + index;
      GemmQuery query = no_query();
      query.size.at[2] = 1;
      query.weights = row_index(geometry, tile.batch, token, geometry.heads, head) * args.pitch;
      query.data = channels_at<T>(args.source, tile.batch,
                                  unravel<RANK>(token, geometry.axis[1].length, geometry.axis[2].length), head);
      return query;
    } else {
      const Point position = position_in<RANK>(box.begin, box.size, index);
      GemmQuery query = query_at<RANK>(geometry, tile, position, args.pitch, head);
      query.data = channels_at<T>(args.source, tile.batch, token_point<RANK>(geometry, tile.group, position), head);
      return query;
    }
  };
  const auto describe_queries = [&](int run) {
    if (thread >= GEMM_RUN) return;
    const int of_head = run / runs_per_head, index = (run - of_head * runs_per_head) * GEMM_RUN + thread;
    queries[run % 2 * GEMM_RUN + thread] =
        index < queries_per_head ? query_of(index, tile.head * shared_by + of_head) : no_query();
  };
  const auto key_of = [&](int row) {
    if constexpr (ADDITIONAL) {
      const int index = additional.first + row;
      GemmKey key = no_key();
      if (index < geometry.additional) {
        key.position = {{0, 0, 0}};
        key.column = window_size(geometry) + index;
      }
      return key;
    } else {
      return row < volume<RANK>(tile.size) ? key_at<RANK>(geometry, position_in<RANK>(tile.first, tile.size, row)) : no_key();
    }
  };
  const GemmKey keys[2] = {key_of(lane), key_of(lane + WARP)};
  T own[ROWS][2];
  const auto fetch = [&](int run) {
    const GemmQuery* run_queries = queries + run % 2 * GEMM_RUN;
    copy_rows<T, GEMM_RUN, CHANNELS, B_PITCH>(sources + run % 2 * GEMM_RUN * B_PITCH, first_channel, args.channels,
                                              [&](int row) { return run_queries[row].data; });
    commit_copies();
    FASTNA_UNROLL
    for (int row = 0; row < ROWS; ++row) {
      const GemmQuery& query = run_queries[warp * ROWS + row];
      FASTNA_UNROLL
      for (int side = 0; side < 2; ++side) {
        const int column = column_of_pair<RANK>(query, keys[side], ADDITIONAL);
        own[row][side] =
            column < 0 ? from_float<T>(0.f) : load_readonly(static_cast<const T*>(args.weights) + query.weights + column);
      }
    }
  };

  describe_queries(0);
  sync_threads();
  fetch(0);
  Accumulator<CHANNELS> sum = {};
  for (int run = 0; run < runs; ++run) {
    T* weights = gathered + run % 2 * GEMM_RUN * A_PITCH;
    FASTNA_UNROLL
    for (int row = 0; row < ROWS; ++row) {
      weights[(warp * ROWS + row) * A_PITCH + lane] = own[row][0];
      weights[(warp * ROWS + row) * A_PITCH + lane + WARP] = own[row][1];
    }
    if (run + 1 < runs) describe_queries(run + 1);
    wait_copies<0>();
    sync_threads();
    if (run + 1 < runs) fetch(run + 1);
    multiply_tiles<Config, Major::ROW, Major::ROW, CHANNELS, GEMM_RUN, A_PITCH, B_PITCH>(sum, weights + warp * 16,
                                                                                        sources + run % 2 * GEMM_RUN * B_PITCH);
  }

  FASTNA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + lane / 4;
    i64 target;
    if constexpr (ADDITIONAL) {
      const int index = additional.first + row;
      if (index >= geometry.additional) continue;
      const i64 matrix = static_cast<i64>(additional.share) * geometry.batch + tile.batch;
      target = (matrix * geometry.additional + index) * geometry.key_heads + tile.head;
    } else {
      if (row >= volume<RANK>(tile.size)) continue;
      const Point token = token_point<RANK>(geometry, tile.group, position_in<RANK>(tile.first, tile.size, row));
      target = row_index(geometry, tile.batch, token_index<RANK>(geometry, token), geometry.key_heads, tile.head);
    }
    using Result = typename Select<ADDITIONAL, float, T>::Type;
    Result* gradient = static_cast<Result*>(args.gradient) + target * args.channels;
    FASTNA_UNROLL
    for (int n = 0; n < CHANNELS / 8; ++n) {
      const int channel = first_channel + n * 8 + lane % 4 * 2;
      if (channel < args.channels)
        store_pair<Result>(gradient + channel, sum[n][2 * half] * args.factor, sum[n][2 * half + 1] * args.factor);
    }
  }
}

}  // namespace fastna
