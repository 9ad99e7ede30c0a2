// Neighborhood attention forward over small sliding 2-D windows: scores of a whole window in registers, memory-bound.
//
// A block takes ROW_BLOCKS x 8 query rows by TILE_COLUMNS query columns of one head's map, brings the keys and values of all their windows
// to shared memory, and each warp multiplies 8 x 2 queries at a time (see strip_bias.cuh) with KEY_ROWS rows of 8 keys. Several blocks
// per SM overlap copies and products; a warp's next queries are copied while it works on these.
#pragma once

#include "fastna/strip_bias.cuh"

namespace fastna {

struct StripForwardArguments {
  TensorArguments query, key, value, output;  // output is contiguous
  float* lse;
  const void* rpb;
  Geometry geometry;
  StripGrid grid;
  Divisor sharing;  // heads that share a key head
  float inverse_scale;
};

// STORED_ROWS x STORED_COLUMNS: the tile of keys; SLOTS: of the bias table. kernels/cuda/strip.py derives them.
template <class T_, class Rpb_, int HEAD_DIM_, int WINDOW_ROWS_, int WINDOW_COLUMNS_, int ROW_BLOCKS_, int TILE_COLUMNS_,
          int STORED_ROWS_, int STORED_COLUMNS_, int SLOTS_, int WARPS_, bool HAS_RPB_>
struct StripForwardConfig {
  using T = T_;
  using Rpb = Rpb_;
  static constexpr int HEAD_DIM = HEAD_DIM_, WINDOW_ROWS = WINDOW_ROWS_, WINDOW_COLUMNS = WINDOW_COLUMNS_;
  static constexpr int ROW_BLOCKS = ROW_BLOCKS_, TILE_COLUMNS = TILE_COLUMNS_;
  static constexpr int STORED_ROWS = STORED_ROWS_, STORED_COLUMNS = STORED_COLUMNS_;
  static constexpr int WARPS = WARPS_, THREADS = WARPS * WARP;
  static constexpr bool HAS_RPB = HAS_RPB_;
  // Rows of all windows of 8 query rows; even, because P V takes the keys of two rows at a time.
  static constexpr int KEY_ROWS = (WINDOW_ROWS + QUERY_ROWS) / 2 * 2;

  using Layout = TokenLayout<HEAD_DIM>;
  using Bias = StripBias<WINDOW_ROWS, WINDOW_COLUMNS, KEY_ROWS, SLOTS_>;
  static constexpr int ROW_BYTES = STORED_COLUMNS * Layout::BYTES;
  static constexpr int TILE_BYTES = STORED_ROWS * ROW_BYTES;
  static constexpr int PRODUCT_BYTES = 16 * Layout::BYTES;  // queries of one product, or its outputs on their way to 16-byte stores
  static constexpr int VALUE_AT = TILE_BYTES, STAGING_AT = 2 * TILE_BYTES, BIAS_AT = STAGING_AT + WARPS * 2 * PRODUCT_BYTES;
  static constexpr int SHARED_BYTES = BIAS_AT + Bias::BYTES;
  static_assert(ROW_BLOCKS == 1 || ROW_BLOCKS == 2, "");
  static_assert(WINDOW_COLUMNS < KEY_COLUMNS, "two neighbouring windows must fit 8 keys");
  static_assert(STORED_ROWS >= KEY_ROWS && TILE_COLUMNS % QUERY_COLUMNS == 0, "");
};

// Where a product finds its keys, whose first row the tiles begin with and whose first column is `column`, and its initial scores.
struct StripProduct {
  u32 key_tile, value_tile;
  int column;
  u32 visible;               // bit j: the lane's query sees key row j
  const u8 *bias, *masked;  // the lane's quads for key row 0
};

// One warp: softmax(queries keys^T) values of 8 x 2 queries over ROWS key rows, the sum not yet divided by. `query` are the left operands.
template <class Config, int ROWS>
FASTNA_DEVICE void attend(const u32 (&query)[Config::HEAD_DIM / 16][4], const StripProduct& from, float scale_log2e,
                          float (&output)[Config::HEAD_DIM / 8][4], float (&maximum)[2], float (&sum)[2]) {
  using T = typename Config::T;
  using Layout = typename Config::Layout;
  constexpr int ROW_BYTES = Config::ROW_BYTES, HEAD_DIM = Config::HEAD_DIM;
  const int lane = lane_index();

  float scores[ROWS][4];
  u32 key_at[HEAD_DIM / 32];  // four chunks by one ldmatrix
  FASTNA_UNROLL
  for (int i = 0; i < HEAD_DIM / 32; ++i) key_at[i] = from.key_tile + Layout::offset(from.column + lane % 8, 4 * i + lane / 8);
  FASTNA_UNROLL
  for (int j = 0; j < ROWS; ++j) {
    const u8* initial_at = (from.visible >> j & 1) != 0 ? from.bias : from.masked;
    const float4 initial = *reinterpret_cast<const float4*>(initial_at + j * Config::Bias::LINE);
    scores[j][0] = initial.x, scores[j][1] = initial.y, scores[j][2] = initial.z, scores[j][3] = initial.w;
    FASTNA_UNROLL
    for (int i = 0; i < HEAD_DIM / 32; ++i) {
      u32 key[4];
      load_matrix_x4(key, key_at[i] + j * ROW_BYTES);
      mma_m16n8k16<T>(scores[j], query[2 * i], key[0], key[1]);
      mma_m16n8k16<T>(scores[j], query[2 * i + 1], key[2], key[3]);
    }
  }

  maximum[0] = fmaxf(scores[0][0], scores[0][1]);
  maximum[1] = fmaxf(scores[0][2], scores[0][3]);
  FASTNA_UNROLL
  for (int j = 1; j < ROWS; ++j) {
    maximum[0] = fmaxf(maximum[0], fmaxf(scores[j][0], scores[j][1]));
    maximum[1] = fmaxf(maximum[1], fmaxf(scores[j][2], scores[j][3]));
  }
  FASTNA_UNROLL
  for (int k = 0; k < 2; ++k) {
    maximum[k] = fmaxf(maximum[k], shuffle_xor(maximum[k], 1));
    maximum[k] = fmaxf(maximum[k], shuffle_xor(maximum[k], 2)) * scale_log2e;
  }

  FASTNA_UNROLL
  for (int c = 0; c < Config::HEAD_DIM / 8; ++c) output[c][0] = output[c][1] = output[c][2] = output[c][3] = 0.0f;
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // a ninth column of values, all ones
  const u32 ones = pack2<T>(1.0f, 1.0f);
  // Matrices of one ldmatrix: keys of row j and j + 1, then the same of the next chunk.
  u32 value_at[Config::HEAD_DIM / 16];
  FASTNA_UNROLL
  for (int i = 0; i < Config::HEAD_DIM / 16; ++i) {
    value_at[i] = from.value_tile + (lane / 8 % 2) * ROW_BYTES + Layout::offset(from.column + lane % 8, 2 * i + lane / 16);
  }
  FASTNA_UNROLL
  for (int j = 0; j < ROWS; j += 2) {
    u32 weights[4];
    FASTNA_UNROLL
    for (int k = 0; k < 4; ++k) {
      const float* pair = &scores[j + k / 2][k % 2 * 2];
      const float shift = maximum[k % 2];
      weights[k] = pack2<T>(exp2_approx(pair[0] * scale_log2e - shift), exp2_approx(pair[1] * scale_log2e - shift));
    }
    FASTNA_UNROLL
    for (int i = 0; i < Config::HEAD_DIM / 16; ++i) {
      u32 value[4];
      load_matrix_x4_transposed(value, value_at[i] + j * ROW_BYTES);
      mma_m16n8k16<T>(output[2 * i], weights, value[0], value[1]);
      mma_m16n8k16<T>(output[2 * i + 1], weights, value[2], value[3]);
    }
    mma_m16n8k16<T>(sums, weights, ones, ones);
  }
  sum[0] = sums[0];
  sum[1] = sums[2];
}

template <class Config>
FASTNA_DEVICE void strip_forward(const StripForwardArguments& args) {
  using T = typename Config::T;
  using Rpb = typename Config::Rpb;
  using Layout = typename Config::Layout;
  using Bias = typename Config::Bias;
  constexpr int HEAD_DIM = Config::HEAD_DIM, WINDOW_ROWS = Config::WINDOW_ROWS, WINDOW_COLUMNS = Config::WINDOW_COLUMNS;
  constexpr int KEY_ROWS = Config::KEY_ROWS, ROW_BLOCKS = Config::ROW_BLOCKS;

  const Geometry& geometry = args.geometry;
  const StripPlace place = strip_place(block_index(), geometry, args.grid);
  const int query_row = place.strip * (ROW_BLOCKS * QUERY_ROWS), query_column = place.tile * Config::TILE_COLUMNS;
  if (query_row >= place.rows || query_column >= place.columns) return;  // a dilation group shorter than the longest

  u8* shared = dynamic_shared<u8>();
  u8* table = shared + Config::BIAS_AT;
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, q = lane % 4;
  const int key_head = args.sharing.quotient(place.head);

  const int last_row = minimum(query_row + ROW_BLOCKS * QUERY_ROWS, place.rows) - 1;
  const int tile_columns = minimum(Config::TILE_COLUMNS, place.columns - query_column);
  const int key_row = first_product_key<WINDOW_ROWS>(query_row, place.rows, KEY_ROWS);
  const int key_column = first_product_key<WINDOW_COLUMNS>(query_column, place.columns, KEY_COLUMNS);
  const Interval seen_rows = {first_key<WINDOW_ROWS>(query_row, place.rows) - key_row,
                              first_key<WINDOW_ROWS>(last_row, place.rows) + WINDOW_ROWS - key_row};
  const u32 tiles[2] = {shared_address(shared), shared_address(shared + Config::VALUE_AT)};

  const Bias bias(query_column, place.columns);
  typename Bias::Row bias_row[ROW_BLOCKS];
  int block_rows[ROW_BLOCKS];     // key rows that a product multiplies: near a border fewer than KEY_ROWS are in reach
  int block_key_row[ROW_BLOCKS];  // their first in the tile of keys
  int lane_row[ROW_BLOCKS];       // query row of matrix rows g and g + 8; the last one again where there is none
  FASTNA_UNROLL
  for (int b = 0; b < ROW_BLOCKS; ++b) {
    const int first = minimum(query_row + b * QUERY_ROWS, last_row);
    const int last = minimum(first + QUERY_ROWS - 1, last_row);
    const int reach = first_key<WINDOW_ROWS>(last, place.rows) + WINDOW_ROWS - first_key<WINDOW_ROWS>(first, place.rows);
    block_rows[b] = maximum(round_up(reach, 2), KEY_ROWS - 4);
    const int first_key_row = first_product_key<WINDOW_ROWS>(first, place.rows, block_rows[b]);
    lane_row[b] = minimum(query_row + b * QUERY_ROWS + g, last_row);
    bias_row[b] = Bias::row(lane_row[b], first_key_row, place.rows, q);
    keep(bias_row[b].line);
    block_key_row[b] = first_key_row - key_row;
  }

  const float scale_log2e = geometry.scale * LOG2_E;
  const int pairs = ceil_div(tile_columns, QUERY_COLUMNS);
  const int blocks = ceil_div(last_row - query_row + 1, QUERY_ROWS);
  u8* next_query = shared + Config::STAGING_AT + warp * 2 * Config::PRODUCT_BYTES;
  u8* staging = next_query + Config::PRODUCT_BYTES;
  u32 staged = Config::STAGING_AT + (2 * warp + 1) * Config::PRODUCT_BYTES + Layout::offset(g, 0) + q * 4;
  keep(staged);

  const MapView<T> sources[2] = {map_view<T>(args.key, geometry, place, place.batch, key_head),
                                 map_view<T>(args.value, geometry, place, place.batch, key_head)};
  const MapView<T> queries = map_view<T>(args.query, geometry, place, place.batch, place.head);
  const MapView<T> outputs = map_view<T>(args.output, geometry, place, place.batch, place.head);
  // Output is contiguous: so many tokens and heads lie before this map's first.
  float* first_lse = args.lse + (outputs.origin - static_cast<T*>(args.output.data)) / HEAD_DIM;
  // Token t of the 16 is (row t % 8, column t / 8): chunks q + 4 i of tokens g and g + 8 are this lane's.
  const T* query_origin[ROW_BLOCKS];
  FASTNA_UNROLL
  for (int b = 0; b < ROW_BLOCKS; ++b) {
    query_origin[b] = queries.at(lane_row[b], query_column) + q * 8;
    keep(query_origin[b]);
  }
  u32 query_at = shared_address(next_query) + Layout::offset(g, q);
  keep(query_at);
  const auto copy_query = [&](int product) {
    const bool second = ROW_BLOCKS == 2 && product >= pairs;
    const int column = (second ? product - pairs : product) * QUERY_COLUMNS;
    const T* token = (second ? query_origin[ROW_BLOCKS - 1] : query_origin[0]) + static_cast<i64>(column) * queries.column;
    FASTNA_UNROLL
    for (int k = 0; k < QUERY_COLUMNS; ++k) {
      FASTNA_UNROLL
      for (int i = 0; i < HEAD_DIM / 32; ++i) {
        copy_async<16>((query_at ^ (i << 6)) + k * 8 * Layout::BYTES, token + k * queries.column + 32 * i, column + k < tile_columns);
      }
    }
  };
  if (warp < pairs * blocks) copy_query(warp);
  load_map_tiles<Config::THREADS, HEAD_DIM, Config::STORED_ROWS, Config::STORED_COLUMNS>(
      sources, tiles, key_row, key_column, seen_rows, place.columns - key_column);
  commit_copies();
  // While the copies are under way.
  const Rpb* rpb = static_cast<const Rpb*>(args.rpb) + place.head * (Bias::LINES * (2 * WINDOW_COLUMNS - 1));
  bias.template build<Config::THREADS, Config::HAS_RPB>(table, rpb, args.inverse_scale, Config::TILE_COLUMNS);
  wait_copies<0>();
  sync_threads();

  for (int product = warp; product < pairs * blocks; product += Config::WARPS) {
    const int block = ROW_BLOCKS == 2 && product >= pairs ? 1 : 0;
    const int column = query_column + (product - block * pairs) * QUERY_COLUMNS;
    const int first_key_column = first_product_key<WINDOW_COLUMNS>(column, place.columns, KEY_COLUMNS) - key_column;
    typename Bias::Row row = bias_row[0];
    int rows_above = block_key_row[0], rows = block_rows[0];
    FASTNA_UNROLL
    for (int b = 1; b < ROW_BLOCKS; ++b) {
      if (block == b) row = bias_row[b], rows_above = block_key_row[b], rows = block_rows[b];
    }

    wait_copies<0>();
    sync_warp();
    u32 query[HEAD_DIM / 16][4];
    FASTNA_UNROLL
    for (int i = 0; i < HEAD_DIM / 16; ++i) {
      load_matrix_x4(query[i], shared_address(next_query) + Layout::offset(lane % 16, 2 * i + lane / 16));
    }
    sync_warp();
    if (product + Config::WARPS < pairs * blocks) copy_query(product + Config::WARPS);
    commit_copies();

    float output[HEAD_DIM / 8][4], maximum[2], sum[2];
    keep(row.visible);  // one register, not one for every bit
    const u32 above = rows_above * Config::ROW_BYTES;
    const StripProduct from = {tiles[0] + above, tiles[1] + above, first_key_column, row.visible,
                               table + row.line + bias.slot(column) * (Bias::LINES * Bias::LINE), table + row.masked()};
    if (rows == KEY_ROWS) {
      attend<Config, KEY_ROWS>(query, from, scale_log2e, output, maximum, sum);
    } else if (rows == KEY_ROWS - 2) {
      attend<Config, KEY_ROWS - 2>(query, from, scale_log2e, output, maximum, sum);
    } else {
      attend<Config, KEY_ROWS - 4>(query, from, scale_log2e, output, maximum, sum);
    }

    const float inverse[2] = {reciprocal_approx(sum[0]), reciprocal_approx(sum[1])};
    FASTNA_UNROLL
    for (int c = 0; c < HEAD_DIM / 8; ++c) {
      u8* at = shared + (staged ^ (c << 4));  // chunk c of token g
      *reinterpret_cast<u32*>(at) = pack2<T>(output[c][0] * inverse[0], output[c][1] * inverse[0]);
      *reinterpret_cast<u32*>(at + 8 * Layout::BYTES) = pack2<T>(output[c][2] * inverse[1], output[c][3] * inverse[1]);
    }
    sync_warp();
    const int lane_query = query_row + block * QUERY_ROWS + g;
    const i64 offset = static_cast<i64>(lane_query) * outputs.row + static_cast<i64>(column) * outputs.column;
    T* token = outputs.origin + offset + q * 8;
    float* lse = first_lse + static_cast<u64>(offset) / HEAD_DIM;
    FASTNA_UNROLL
    for (int k = 0; k < QUERY_COLUMNS; ++k) {
      if (lane_query <= last_row && column + k < place.columns) {
        FASTNA_UNROLL
        for (int i = 0; i < HEAD_DIM / 32; ++i) {
          store_global_16(token + k * outputs.column + 32 * i,
                          *reinterpret_cast<const uint4*>(staging + Layout::offset(g, q + 4 * i) + k * 8 * Layout::BYTES));
        }
        if (q == k) lse[k * (outputs.column / HEAD_DIM)] = (maximum[k] + log2_approx(sum[k])) * LN_2;
      }
    }
    sync_warp();  // before the next product overwrites the staging
  }
}

}  // namespace fastna
