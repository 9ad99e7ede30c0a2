// Gradient of the query and of the bias, for every problem: query-stationary tiles. Also delta, which flash_key_gradient reads.
//
//   delta = sum(grad_output * output) - grad_lse    p = exp(s - lse)    ds = p * (grad_output value^T - delta)
//   grad_query = scale * ds key                     grad_rpb[o] = sum of ds over the pairs at offset o
#pragma once

#include "fastna/flash_bias_gradient.cuh"

namespace fastna {

struct FlashQueryGradientArguments {
  Geometry geometry;
  TensorArguments query, key, value, additional_keys, additional_values, output, lse, grad_output, grad_lse, grad_query, delta;
  const void* rpb;
  float* rpb_partials;  // [blocks, entries of one head's bias]: block b works on head b % heads
  int tiles[3];         // tiles of queries along every axis of a dilation group
  int all_tiles;        // of all groups, heads and batch entries; the grid is a multiple of heads
};

// delta of the two rows of a lane, from the tile of grad_output in shared memory and the output in global memory.
template <class Config, class T>
FASTNA_DEVICE float row_delta(const T* grad_row, const T* output_row) {
  constexpr int ELEMENTS = 16 / static_cast<int>(sizeof(T));
  float sum = 0.0f;
  FASTNA_UNROLL
  for (int c = 0; c < Config::VALUE_DIM; c += 4 * ELEMENTS) {
    const int channel = c + (lane_index() & 3) * ELEMENTS;
    if (channel < Config::VALUE_DIM) {
      sum += dot_chunk<T>(*reinterpret_cast<const uint4*>(grad_row + channel), load_global_16(output_row + channel));
    }
  }
  return sum_of_row(sum);
}

template <class Config>
FASTNA_DEVICE void flash_query_gradient(const FlashQueryGradientArguments& args) {
  using Arithmetic = typename Config::Arithmetic;
  using T = typename Arithmetic::Element;
  using Queries = typename Config::Rows;
  using Keys = typename Config::Columns;
  using View = GroupView<Queries::FIRST, T>;
  using FloatView = GroupView<Queries::FIRST, float>;
  constexpr int HEAD_DIM = Config::HEAD_DIM, VALUE_DIM = Config::VALUE_DIM, THREADS = Config::THREADS;
  constexpr int HEAD_PITCH = tile_pitch<T>(HEAD_DIM), VALUE_PITCH = tile_pitch<T>(VALUE_DIM);
  constexpr int NT = Keys::SIZE / 8, DT = padded_channels(HEAD_DIM) / 8;
  constexpr int KEY_TILE = Keys::SIZE * HEAD_PITCH, STAGE = KEY_TILE + Keys::SIZE * VALUE_PITCH;
  const Geometry& geometry = args.geometry;
  const int warp = warp_index();

  // Shared memory: stages of keys and values; queries, through which their gradient passes; grad_output; windows; bias; bias gradient.
  T* stages = dynamic_shared<T>();
  T* query_tile = stages + Config::STAGES * STAGE;
  T* grad_tile = query_tile + Queries::SIZE * HEAD_PITCH;
  Interval* windows = reinterpret_cast<Interval*>(grad_tile + Queries::SIZE * VALUE_PITCH);
  float* bias_buffer = reinterpret_cast<float*>(windows + RowWindows<Queries, false>::TABLE);
  BiasTable<Config::BIAS, typename Config::Rpb> bias;
  BiasGradient<Config::BIAS_GRADIENT, Queries, Keys> bias_gradient;
  const int head = static_cast<int>(block_index() % geometry.heads), key_head = head / (geometry.heads / geometry.key_heads);
  bias.select_head(geometry, args.rpb, head, bias_buffer, THREADS);
  const int entries = Config::BIAS == BiasKind::NONE ? 0 : BiasTable<Config::BIAS, typename Config::Rpb>::size(geometry);
  bias_gradient.start(bias_buffer + (Config::BIAS == BiasKind::SHARED ? round_up(entries, 2) : 0),
                      args.rpb_partials + static_cast<i64>(block_index()) * entries, entries, THREADS);
  clear_padding<HEAD_DIM, THREADS>(query_tile, Queries::SIZE);
  clear_padding<VALUE_DIM, THREADS>(grad_tile, Queries::SIZE);
  FASTNA_UNROLL
  for (int stage = 0; stage < Config::STAGES; ++stage) {
    clear_padding<HEAD_DIM, THREADS>(stages + stage * STAGE, Keys::SIZE);
    clear_padding<VALUE_DIM, THREADS>(stages + stage * STAGE + KEY_TILE, Keys::SIZE);
  }

  for (u32 tile = block_index(); tile < static_cast<u32>(args.all_tiles); tile += block_count()) {
    TilePlace place;
    if (!place_tile<Queries>(place, geometry, args.tiles, geometry.heads, tile)) continue;
    sync_threads();  // everyone is done with the tile before

    RowWindows<Queries, false> rows;
    rows.place(geometry, place, warp, windows);
    const View key(args.key, geometry, place, key_head), value(args.value, geometry, place, key_head);
    const int window_tiles = TileCursor<Keys>::count(rows.tile);
    const int all_tiles = window_tiles + (Config::ADDITIONAL ? ceil_div(geometry.additional, Keys::SIZE) : 0);
    auto load_keys = [&](int index, const TileCursor<Keys>& cursor) {
      T* keys = stages + index % Config::STAGES * STAGE;
      if (!Config::ADDITIONAL || index < window_tiles) {
        load_tile<Keys, HEAD_DIM, THREADS, Config::VECTOR>(keys, key, cursor.origin, place.length);
        load_tile<Keys, VALUE_DIM, THREADS, Config::VECTOR>(keys + KEY_TILE, value, cursor.origin, place.length);
      } else {
        load_additional<Config, HEAD_DIM>(keys, args.additional_keys, geometry, place.batch, key_head, index - window_tiles);
        load_additional<Config, VALUE_DIM>(keys + KEY_TILE, args.additional_values, geometry, place.batch, key_head,
                                           index - window_tiles);
      }
      commit_copies();
    };

    load_tile<Queries, HEAD_DIM, THREADS, Config::VECTOR>(query_tile, View(args.query, geometry, place, head), place.origin,
                                                          place.length);
    load_tile<Queries, VALUE_DIM, THREADS, Config::VECTOR>(grad_tile, View(args.grad_output, geometry, place, head), place.origin,
                                                           place.length);
    commit_copies();
    TileCursor<Keys> cursor;
    cursor.start(rows.tile);
    if constexpr (Config::STAGES == 2) {
      load_keys(0, cursor);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    sync_threads();

    typename Arithmetic::template Rows<HEAD_DIM, Config::RESIDENT> queries;
    typename Arithmetic::template Rows<VALUE_DIM, Config::RESIDENT> grads;
    queries.read(query_tile + warp * 16 * HEAD_PITCH);
    grads.read(grad_tile + warp * 16 * VALUE_PITCH);
    float lse[2], delta[2];  // lse in base 2
    FASTNA_UNROLL
    for (int r = 0; r < 2; ++r) {
      lse[r] = infinity();  // p = 0 in rows that are no token
      delta[r] = 0.0f;
      const bool is_token = rows.is_token(r);
      const int position[3] = {row_position<Queries>(place, warp, r, 0), row_position<Queries>(place, warp, r, 1),
                               row_position<Queries>(place, warp, r, 2)};
      const View output(args.output, geometry, place, head);
      const T* grad_row = grad_tile + (warp * 16 + (lane_index() >> 2) + 8 * r) * VALUE_PITCH;
      // Lanes without a token read position 0 of the group, which is there, and take part in the sum over the row.
      delta[r] = row_delta<Config, T>(grad_row, is_token ? output.at(position) : output.data);
      if (is_token) {
        lse[r] = *FloatView(args.lse, geometry, place, head).at(position) * LOG2_E;
        if (args.grad_lse.data != nullptr) delta[r] -= *FloatView(args.grad_lse, geometry, place, head).at(position);
        if ((lane_index() & 3) == 0) *FloatView(args.delta, geometry, place, head).at(position) = delta[r];
      }
    }

    const float scale = geometry.scale * LOG2_E;
    float grad_query[DT][4] = {};
    for (int index = 0; index < all_tiles; ++index) {
      TileCursor<Keys> next = cursor;
      next.advance(rows.tile);
      if constexpr (Config::STAGES == 2) {
        wait_copies<0>();
        sync_threads();
        if (index + 1 < all_tiles) load_keys(index + 1, next);
      } else {
        sync_threads();
        load_keys(index, cursor);
        wait_copies<0>();
        sync_threads();
      }
      const T* keys = stages + index % Config::STAGES * STAGE;
      const bool is_additional = Config::ADDITIONAL && index >= window_tiles;
      float ds[NT][4] = {};
      if (is_additional || rows.template touches<Keys>(cursor.origin)) {
        float s[NT][4] = {};
        Arithmetic::template multiply_transposed<HEAD_DIM>(s, queries, keys);
        if (is_additional) {
          finish_additional_scores(s, geometry.additional - (index - window_tiles) * Keys::SIZE, scale);
        } else {
          finish_scores<Queries, Keys>(s, rows, place, warp, cursor.origin, scale, bias, geometry);
        }
        Arithmetic::template multiply_transposed<VALUE_DIM>(ds, grads, keys + KEY_TILE);
        FASTNA_UNROLL
        for (int j = 0; j < NT; ++j) {
          FASTNA_UNROLL
          for (int e = 0; e < 4; ++e) ds[j][e] = exp2_approx(s[j][e] - lse[e >> 1]) * (ds[j][e] - delta[e >> 1]);
        }
        Arithmetic::template multiply<HEAD_DIM>(grad_query, ds, keys);
      }
      if (!is_additional) bias_gradient.add(ds, place, cursor.origin, geometry, warp);
      cursor = next;
    }
    sync_threads();  // everyone has read the queries
    store_rows<Arithmetic, Queries, HEAD_DIM>(query_tile + warp * 16 * HEAD_PITCH, grad_query, geometry.scale, geometry.scale,
                                              View(args.grad_query, geometry, place, head), place.origin, place.length, warp);
    // The padding of the queries' tile stays zero only if the gradient's does: it is a sum over the keys' zeros.
  }
  bias_gradient.finish(THREADS);
}

}  // namespace fastna
