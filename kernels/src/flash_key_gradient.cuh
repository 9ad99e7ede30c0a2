// Gradients of key and value, for every problem: key-stationary tiles, the queries that see them streamed by cp.async.
//
//   p^T = exp(s^T - lse)    grad_value = p^T grad_output    ds^T = p^T * (value grad_output^T - delta)    grad_key = scale * ds^T query
//
// A key head sums over the query heads that share it, in order. Additional keys are seen by every query: there the rows are the additional
// keys, and a block takes a chunk of the map's queries and writes a partial sum in float.
#pragma once

#include "fastna/flash_config.cuh"

namespace fastna {

struct FlashKeyGradientArguments {
  Geometry geometry;  // for additional rows: with dilation 1 everywhere, since they pay no heed to it
  TensorArguments query, key, value, lse, delta, grad_output, grad_key, grad_value;
  const void* rpb;
  int tiles[3];                          // tiles of keys along every axis of a dilation group; of additional keys: {1, 1, count}
  int chunk_tiles;                       // additional rows: tiles of queries that a block takes
  i64 key_partial, value_partial;        // additional rows: elements of one partial sum
};

template <class Config>
FASTNA_DEVICE void flash_key_gradient(const FlashKeyGradientArguments& args) {
  using Arithmetic = typename Config::Arithmetic;
  using T = typename Arithmetic::Element;
  using Keys = typename Config::Rows;
  using Queries = typename Config::Columns;
  constexpr bool EXTRA = Config::ADDITIONAL_ROWS;
  using Output = typename Either<EXTRA, float, T>::type;
  constexpr int HEAD_DIM = Config::HEAD_DIM, VALUE_DIM = Config::VALUE_DIM, THREADS = Config::THREADS;
  constexpr int HEAD_PITCH = tile_pitch<T>(HEAD_DIM), VALUE_PITCH = tile_pitch<T>(VALUE_DIM);
  constexpr int NT = Queries::SIZE / 8;
  constexpr int KEY_DT = Config::GRAD_KEY ? padded_channels(HEAD_DIM) / 8 : 1, VALUE_DT = Config::GRAD_VALUE ? padded_channels(VALUE_DIM) / 8 : 1;
  constexpr int QUERY_TILE = Queries::SIZE * HEAD_PITCH, GRAD_TILE = Queries::SIZE * VALUE_PITCH;
  constexpr int STAGE = QUERY_TILE + GRAD_TILE + 2 * Queries::SIZE * 4 / static_cast<int>(sizeof(T));
  const Geometry& geometry = args.geometry;
  const int warp = warp_index(), q = lane_index() & 3;

  // Shared memory: stages of queries, grad_output, lse and delta, through which the gradients pass at the end; keys; values, where the
  // gradient of the key needs them; windows; the bias.
  T* stages = dynamic_shared<T>();
  T* key_tile = stages + Config::STAGES * STAGE;
  T* value_tile = key_tile + Keys::SIZE * HEAD_PITCH;
  Interval* windows = reinterpret_cast<Interval*>(value_tile + (Config::GRAD_KEY ? Keys::SIZE * VALUE_PITCH : 0));
  float* bias_buffer = reinterpret_cast<float*>(windows + RowWindows<Keys, true>::TABLE);

  // Where the rows lie, and the range of queries that see them.
  TilePlace place;
  RowWindows<Keys, true> rows;
  Interval range[3] = {{0, 1}, {0, 1}, {0, 1}};
  int query_length[3] = {1, 1, 1}, first_tile = 0, tiles_per_head, chunk = 0;
  if constexpr (EXTRA) {
    const u32 key_heads = geometry.key_heads, batches = geometry.batch, row_tiles = args.tiles[2];
    const u32 index = block_index();
    place.head = static_cast<int>(index % key_heads);
    place.batch = static_cast<int>(index / key_heads % batches);
    FASTNA_UNROLL
    for (int i = 0; i < 3; ++i) {
      place.group[i] = place.origin[i] = 0;
      place.length[i] = i < 2 ? 1 : geometry.additional;
      query_length[i] = geometry.axis[i].length;
      range[i] = {0, query_length[i]};
    }
    place.origin[2] = static_cast<int>(index / key_heads / batches % row_tiles) * Keys::SIZE;
    chunk = static_cast<int>(index / key_heads / batches / row_tiles);
    first_tile = chunk * args.chunk_tiles;
    tiles_per_head = minimum(args.chunk_tiles, TileCursor<Queries>::count(range) - first_tile);
  } else {
    if (!place_tile<Keys>(place, geometry, args.tiles, geometry.key_heads, block_index())) return;
    rows.place(geometry, place, warp, windows);
    FASTNA_UNROLL
    for (int i = 0; i < 3; ++i) {
      range[i] = rows.tile[i];
      query_length[i] = place.length[i];
    }
    tiles_per_head = TileCursor<Queries>::count(range);
  }

  clear_padding<HEAD_DIM, THREADS>(key_tile, Keys::SIZE);
  if constexpr (Config::GRAD_KEY) clear_padding<VALUE_DIM, THREADS>(value_tile, Keys::SIZE);
  FASTNA_UNROLL
  for (int stage = 0; stage < Config::STAGES; ++stage) {
    clear_padding<HEAD_DIM, THREADS>(stages + stage * STAGE, Queries::SIZE);
    clear_padding<VALUE_DIM, THREADS>(stages + stage * STAGE + QUERY_TILE, Queries::SIZE);
  }

  const int group_heads = geometry.heads / geometry.key_heads, first_head = place.head * group_heads;
  const int all_tiles = tiles_per_head * group_heads;
  auto load_queries = [&](int index, int head, const TileCursor<Queries>& cursor) {
    using View = GroupView<Queries::FIRST, T>;
    using FloatView = GroupView<Queries::FIRST, float>;
    T* stage = stages + index % Config::STAGES * STAGE;
    load_tile<Queries, HEAD_DIM, THREADS, Config::VECTOR>(stage, View(args.query, geometry, place, head), cursor.origin, query_length);
    load_tile<Queries, VALUE_DIM, THREADS, Config::VECTOR>(stage + QUERY_TILE, View(args.grad_output, geometry, place, head),
                                                           cursor.origin, query_length);
    float* statistics = reinterpret_cast<float*>(stage + QUERY_TILE + GRAD_TILE);
    const FloatView lse(args.lse, geometry, place, head), delta(args.delta, geometry, place, head);
    for (int i = thread_index(); i < 2 * Queries::SIZE; i += THREADS) {
      bool valid = true;
      int position[3] = {0, 0, 0};
      FASTNA_UNROLL
      for (int a = Queries::FIRST; a < 3; ++a) {
        position[a] = cursor.origin[a] + Queries::coordinate(i % Queries::SIZE, a);
        valid &= position[a] < query_length[a];
      }
      // Zeros where there is no query: with a zero grad_output they add nothing.
      const float* from = i < Queries::SIZE ? lse.at(position) : delta.at(position);
      copy_async<4>(shared_address(statistics + i), from, valid);
    }
    commit_copies();
  };

  using RowBox = typename Either<EXTRA, TileBox<1, 1, 1, Keys::SIZE>, Keys>::type;
  auto row_view = [&](const TensorArguments& tensor) {
    if constexpr (EXTRA) return GroupView<RowBox::FIRST, T>(tensor, place.batch, place.head);
    else return GroupView<RowBox::FIRST, T>(tensor, geometry, place, place.head);
  };
  load_tile<RowBox, HEAD_DIM, THREADS, Config::VECTOR>(key_tile, row_view(args.key), place.origin, place.length);
  if constexpr (Config::GRAD_KEY)
    load_tile<RowBox, VALUE_DIM, THREADS, Config::VECTOR>(value_tile, row_view(args.value), place.origin, place.length);
  commit_copies();

  typename Arithmetic::template Rows<HEAD_DIM, false> keys;
  typename Arithmetic::template Rows<VALUE_DIM, false> values;
  keys.read(key_tile + warp * 16 * HEAD_PITCH);
  if constexpr (Config::GRAD_KEY) values.read(value_tile + warp * 16 * VALUE_PITCH);
  BiasTable<Config::BIAS, typename Config::Rpb> bias;
  bias.select_head(geometry, args.rpb, first_head, bias_buffer, THREADS);

  const float scale = geometry.scale * LOG2_E;
  float grad_key[KEY_DT][4] = {}, grad_value[VALUE_DT][4] = {};
  TileCursor<Queries> cursor;
  cursor.seek(range, first_tile);
  int head = first_head, tile = 0;
  if (Config::STAGES == 2) load_queries(0, head, cursor);
  for (int index = 0; index < all_tiles; ++index) {
    TileCursor<Queries> next = cursor;
    int next_head = head, next_tile = tile + 1;
    if (next_tile == tiles_per_head) {
      next_tile = 0;
      next_head = head + 1;
      next.seek(range, first_tile);
    } else {
      next.advance(range);
    }
    if constexpr (Config::STAGES == 2) {
      wait_copies<0>();
      sync_threads();
      if (index + 1 < all_tiles) load_queries(index + 1, next_head, next);
    } else {
      sync_threads();
      load_queries(index, head, cursor);
      wait_copies<0>();
      sync_threads();
    }
    if (Config::BIAS != BiasKind::NONE && tile == 0 && index > 0) {
      bias.select_head(geometry, args.rpb, head, bias_buffer, THREADS);
      sync_threads();
    }
    const T* query_tile = stages + index % Config::STAGES * STAGE;
    const T* grad_tile = query_tile + QUERY_TILE;
    const float* statistics = reinterpret_cast<const float*>(grad_tile + GRAD_TILE) + 2 * q;
    if (EXTRA || rows.template touches<Queries>(cursor.origin)) {
      float s[NT][4] = {};
      Arithmetic::template multiply_transposed<HEAD_DIM>(s, keys, query_tile);
      if constexpr (!EXTRA) finish_scores<Keys, Queries>(s, rows, place, warp, cursor.origin, scale, bias, geometry);
      FASTNA_UNROLL
      for (int j = 0; j < NT; ++j) {
        const float2 lse = *reinterpret_cast<const float2*>(statistics + 8 * j);
        FASTNA_UNROLL
        for (int e = 0; e < 4; ++e)
          s[j][e] = exp2_approx((EXTRA ? s[j][e] * scale : s[j][e]) - (e % 2 == 0 ? lse.x : lse.y) * LOG2_E);
      }
      if constexpr (Config::GRAD_VALUE) Arithmetic::template multiply<VALUE_DIM>(grad_value, s, grad_tile);
      if constexpr (Config::GRAD_KEY) {
        float ds[NT][4] = {};
        Arithmetic::template multiply_transposed<VALUE_DIM>(ds, values, grad_tile);
        FASTNA_UNROLL
        for (int j = 0; j < NT; ++j) {
          const float2 delta = *reinterpret_cast<const float2*>(statistics + Queries::SIZE + 8 * j);
          FASTNA_UNROLL
          for (int e = 0; e < 4; ++e) ds[j][e] = s[j][e] * (ds[j][e] - (e % 2 == 0 ? delta.x : delta.y));
        }
        Arithmetic::template multiply<HEAD_DIM>(grad_key, ds, query_tile);
      }
    }
    cursor = next;
    head = next_head;
    tile = next_tile;
  }

  wait_copies<0>();
  sync_threads();
  auto output_view = [&](const TensorArguments& tensor, i64 partial) {
    if constexpr (EXTRA) {
      GroupView<RowBox::FIRST, Output> view(tensor, place.batch, place.head);
      view.data += chunk * partial;
      return view;
    } else {
      return GroupView<RowBox::FIRST, Output>(tensor, geometry, place, place.head);
    }
  };
  Output* buffer = reinterpret_cast<Output*>(stages);
  if constexpr (Config::GRAD_KEY) {
    store_rows<Arithmetic, RowBox, HEAD_DIM>(buffer + warp * 16 * tile_pitch<Output>(HEAD_DIM), grad_key, geometry.scale, geometry.scale,
                                             output_view(args.grad_key, args.key_partial), place.origin, place.length, warp);
    sync_threads();
  }
  if constexpr (Config::GRAD_VALUE) {
    store_rows<Arithmetic, RowBox, VALUE_DIM>(buffer + warp * 16 * tile_pitch<Output>(VALUE_DIM), grad_value, 1.0f, 1.0f,
                                              output_view(args.grad_value, args.value_partial), place.origin, place.length, warp);
  }
}

}  // namespace fastna
