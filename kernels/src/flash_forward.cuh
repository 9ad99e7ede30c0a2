// Fused neighborhood attention, forward, for every problem: query-stationary tiles, keys and values streamed by cp.async.
#pragma once

#include "fastna/flash_config.cuh"

namespace fastna {

struct FlashForwardArguments {
  Geometry geometry;
  TensorArguments query, key, value, additional_keys, additional_values, output, lse;
  const void* rpb;
  int tiles[3];  // tiles of queries along every axis of a dilation group
};

template <class Config>
FASTNA_DEVICE void flash_forward(const FlashForwardArguments& args) {
  using Arithmetic = typename Config::Arithmetic;
  using T = typename Arithmetic::Element;
  using Queries = typename Config::Rows;
  using Keys = typename Config::Columns;
  constexpr int HEAD_DIM = Config::HEAD_DIM, VALUE_DIM = Config::VALUE_DIM, THREADS = Config::THREADS;
  constexpr int NT = Keys::SIZE / 8, DT = padded_channels(VALUE_DIM) / 8;
  constexpr int KEY_TILE = Keys::SIZE * tile_pitch<T>(HEAD_DIM), STAGE = KEY_TILE + Keys::SIZE * tile_pitch<T>(VALUE_DIM);
  const Geometry& geometry = args.geometry;

  TilePlace place;
  if (!place_tile<Queries>(place, geometry, args.tiles, geometry.heads, block_index())) return;

  // Shared memory: stages of keys and values, through which the output passes at the end; queries; windows of the rows; the bias.
  T* stages = dynamic_shared<T>();
  T* query_tile = stages + Config::STAGES * STAGE;
  Interval* windows = reinterpret_cast<Interval*>(query_tile + Queries::SIZE * tile_pitch<T>(HEAD_DIM));
  BiasTable<Config::BIAS, typename Config::Rpb> bias;
  bias.select_head(geometry, args.rpb, place.head, reinterpret_cast<float*>(windows + RowWindows<Queries, false>::TABLE), THREADS);
  clear_padding<HEAD_DIM, THREADS>(query_tile, Queries::SIZE);
  FASTNA_UNROLL
  for (int stage = 0; stage < Config::STAGES; ++stage) {
    clear_padding<HEAD_DIM, THREADS>(stages + stage * STAGE, Keys::SIZE);
    clear_padding<VALUE_DIM, THREADS>(stages + stage * STAGE + KEY_TILE, Keys::SIZE);
  }

  const int warp = warp_index();
  RowWindows<Queries, false> rows;
  rows.place(geometry, place, warp, windows);
  const int key_head = place.head / (geometry.heads / geometry.key_heads);
  using View = GroupView<Queries::FIRST, T>;
  const View query(args.query, geometry, place, place.head);
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
      load_additional<Config, VALUE_DIM>(keys + KEY_TILE, args.additional_values, geometry, place.batch, key_head, index - window_tiles);
    }
    commit_copies();
  };

  load_tile<Queries, HEAD_DIM, THREADS, Config::VECTOR>(query_tile, query, place.origin, place.length);
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
  queries.read(query_tile + warp * 16 * tile_pitch<T>(HEAD_DIM));

  const float scale = geometry.scale * LOG2_E;
  float output[DT][4] = {};
  OnlineSoftmax softmax;
  softmax.start();
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
    if (is_additional || rows.template touches<Keys>(cursor.origin)) {
      float s[NT][4] = {};
      Arithmetic::template multiply_transposed<HEAD_DIM>(s, queries, keys);
      if (is_additional) {
        finish_additional_scores(s, geometry.additional - (index - window_tiles) * Keys::SIZE, scale);
      } else {
        finish_scores<Queries, Keys>(s, rows, place, warp, cursor.origin, scale, bias, geometry);
      }
      softmax.add(s, output);
      Arithmetic::template multiply<VALUE_DIM>(output, s, keys + KEY_TILE);
    }
    cursor = next;
  }
  softmax.finish();

  const GroupView<Queries::FIRST, float> lse(args.lse, geometry, place, place.head);
  if ((lane_index() & 3) == 0) {
    FASTNA_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (!rows.is_token(r)) continue;
      const int position[3] = {row_position<Queries>(place, warp, r, 0), row_position<Queries>(place, warp, r, 1),
                               row_position<Queries>(place, warp, r, 2)};
      *lse.at(position) = (softmax.highest[r] + log2_approx(softmax.sum[r])) * LN_2;
    }
  }
  sync_threads();
  const View target(args.output, geometry, place, place.head);
  store_rows<Arithmetic, Queries, VALUE_DIM>(stages + warp * 16 * tile_pitch<T>(VALUE_DIM), output, 1.0f / softmax.sum[0],
                                             1.0f / softmax.sum[1], target, place.origin, place.length, warp);
}

}  // namespace fastna
