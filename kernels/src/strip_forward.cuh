// Neighborhood attention forward over small sliding 2-D windows: scores of a whole window in registers, memory-bound.
//
// The call is a sequence of strips: 8 query rows by TILE_COLUMNS query columns of one map. Each of the resident blocks takes an equal part
// of it, walks down the map and on to the next, and keeps keys and values in a ring of shared memory, 8 rows (a slab) at a time: each
// row is read once, while the slabs before it are being multiplied. A warp multiplies 8 x 2 queries (see strip_bias.cuh) with KEY_ROWS
// rows of 8 keys at a time.
#pragma once

#include "fastna/strip_bias.cuh"

namespace fastna {

struct StripForwardArguments {
  TensorArguments query, key, value, output;  // output is contiguous
  float* lse;
  const void* rpb;
  Geometry geometry;
  int tiles, strips;  // of the longest dilation group's map
};

// STORED_COLUMNS: of a slab; SLOTS: of the bias table; AHEAD: slabs on their way while one is worked on. kernels/cuda/strip.py derives them.
template <class T_, class Rpb_, int HEAD_DIM_, int WINDOW_ROWS_, int WINDOW_COLUMNS_, int TILE_COLUMNS_, int STORED_COLUMNS_, int SLOTS_,
          int AHEAD_, int WARPS_, bool HAS_RPB_>
struct StripForwardConfig {
  using T = T_;
  using Rpb = Rpb_;
  static constexpr int HEAD_DIM = HEAD_DIM_, WINDOW_ROWS = WINDOW_ROWS_, WINDOW_COLUMNS = WINDOW_COLUMNS_;
  static constexpr int TILE_COLUMNS = TILE_COLUMNS_, STORED_COLUMNS = STORED_COLUMNS_;
  static constexpr int AHEAD = AHEAD_, WARPS = WARPS_, THREADS = WARPS * WARP;
  static constexpr bool HAS_RPB = HAS_RPB_;
  // Rows of all windows of 8 query rows; even, because P V takes the keys of two rows at a time.
  static constexpr int KEY_ROWS = (WINDOW_ROWS + QUERY_ROWS) / 2 * 2;
  // A strip multiplies the last CARRIED rows of one slab, and the next slab.
  static constexpr int SLAB_ROWS = QUERY_ROWS, CARRIED = KEY_ROWS - SLAB_ROWS;
  static constexpr int SLABS = AHEAD + 2;
  static constexpr int PRODUCTS = (TILE_COLUMNS / QUERY_COLUMNS + WARPS - 1) / WARPS;  // of a warp and strip

  using Layout = TokenLayout<HEAD_DIM>;
  using Bias = StripBias<WINDOW_ROWS, WINDOW_COLUMNS, KEY_ROWS, SLOTS_>;
  static constexpr int ROW_BYTES = STORED_COLUMNS * Layout::BYTES;
  static constexpr int TILE_BYTES = SLAB_ROWS * ROW_BYTES;
  static constexpr int SLAB_BYTES = 2 * TILE_BYTES;        // keys, values
  static constexpr int PRODUCT_BYTES = 16 * Layout::BYTES;  // queries of one product, then its outputs on their way to 16-byte stores
  // Rows of keys that the threads copy at a time: a power of two.
  static constexpr int PASS_TOKENS = THREADS / Layout::CHUNKS, FITTING_ROWS = PASS_TOKENS / STORED_COLUMNS;
  static constexpr int PASS_ROWS = FITTING_ROWS >= 8 ? 8 : FITTING_ROWS >= 4 ? 4 : FITTING_ROWS >= 2 ? 2 : 1;
  static constexpr int QUERY_SLOTS = AHEAD + 1;
  static constexpr int QUERY_AT = SLABS * SLAB_BYTES, BIAS_AT = QUERY_AT + QUERY_SLOTS * WARPS * PRODUCTS * PRODUCT_BYTES;
  static constexpr int MAPS = 4;  // being loaded, worked on, and prepared
  static constexpr int MAPS_AT = BIAS_AT + Bias::BYTES, SHARED_BYTES = MAPS_AT + MAPS * 48;
  static_assert(CARRIED >= 0 && CARRIED <= SLAB_ROWS, "a strip sees two slabs");
  static_assert(WINDOW_COLUMNS < KEY_COLUMNS, "two neighbouring windows must fit 8 keys");
  static_assert(TILE_COLUMNS % QUERY_COLUMNS == 0 && STORED_COLUMNS % 2 == 0, "");
};

// One warp: softmax(queries keys^T) values of 8 x 2 queries, the sum not yet divided by. `query` are the products' left operands, `slabs`
// the two that hold the strip's keys, `column` is the product's first key's; `bias` and `masked` are the lane's quads for the first key row.
template <class Config>
FASTNA_DEVICE void attend(const u32 (&query)[Config::HEAD_DIM / 16][4], const u32 (&slabs)[2], int column, u32 visible, const u8* bias,
                          const u8* masked, float scale_log2e, float (&output)[Config::HEAD_DIM / 8][4], float (&maximum)[2],
                          float (&sum)[2]) {
  using T = typename Config::T;
  using Layout = typename Config::Layout;
  constexpr int KEY_ROWS = Config::KEY_ROWS, CARRIED = Config::CARRIED, ROW_BYTES = Config::ROW_BYTES, HEAD_DIM = Config::HEAD_DIM;
  const int lane = lane_index();
  // From the first key row's address in its slab to row j's.
  constexpr auto row_offset = [](int j) { return (j < CARRIED ? Config::SLAB_ROWS - CARRIED + j : j - CARRIED) * ROW_BYTES; };

  float scores[KEY_ROWS][4];
  u32 key_at[HEAD_DIM / 32];  // four chunks by one ldmatrix
  FASTNA_UNROLL
  for (int i = 0; i < HEAD_DIM / 32; ++i) key_at[i] = Layout::offset(column + lane % 8, 4 * i + lane / 8);
  FASTNA_UNROLL
  for (int j = 0; j < KEY_ROWS; ++j) {
    const u8* initial_at = (visible >> j & 1) != 0 ? bias : masked;
    const float4 initial = *reinterpret_cast<const float4*>(initial_at + j * Config::Bias::LINE);
    scores[j][0] = initial.x, scores[j][1] = initial.y, scores[j][2] = initial.z, scores[j][3] = initial.w;
    FASTNA_UNROLL
    for (int i = 0; i < HEAD_DIM / 32; ++i) {
      u32 key[4];
      load_matrix_x4(key, slabs[j >= CARRIED] + key_at[i] + row_offset(j));
      mma_m16n8k16<T>(scores[j], query[2 * i], key[0], key[1]);
      mma_m16n8k16<T>(scores[j], query[2 * i + 1], key[2], key[3]);
    }
  }

  maximum[0] = fmaxf(scores[0][0], scores[0][1]);
  maximum[1] = fmaxf(scores[0][2], scores[0][3]);
  FASTNA_UNROLL
  for (int j = 1; j < KEY_ROWS; ++j) {
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
  u32 value_at[HEAD_DIM / 16];
  FASTNA_UNROLL
  for (int i = 0; i < HEAD_DIM / 16; ++i) {
    value_at[i] = Config::TILE_BYTES + (lane / 8 % 2) * ROW_BYTES + Layout::offset(column + lane % 8, 2 * i + lane / 16);
  }
  FASTNA_UNROLL
  for (int j = 0; j < KEY_ROWS; j += 2) {
    u32 weights[4];
    FASTNA_UNROLL
    for (int k = 0; k < 4; ++k) {
      const float* pair = &scores[j + k / 2][k % 2 * 2];
      const float shift = maximum[k % 2];
      weights[k] = pack2<T>(exp2_approx(pair[0] * scale_log2e - shift), exp2_approx(pair[1] * scale_log2e - shift));
    }
    FASTNA_UNROLL
    for (int i = 0; i < HEAD_DIM / 16; ++i) {
      u32 value[4];
      load_matrix_x4_transposed(value, slabs[j >= CARRIED] + value_at[i] + row_offset(j));
      mma_m16n8k16<T>(output[2 * i], weights, value[0], value[1]);
      mma_m16n8k16<T>(output[2 * i + 1], weights, value[2], value[3]);
    }
    mma_m16n8k16<T>(sums, weights, ones, ones);
  }
  sum[0] = sums[0];
  sum[1] = sums[2];
}

// A slab in the sequence of a tile's maps: strip s of a map sees the end of slab s - 1, and slab s. The first is slab -1.
struct SlabCursor {
  int map, slab;

  FASTNA_DEVICE void advance(int strips) {
    if (++slab < strips) return;
    slab = -1;
    ++map;
  }
};

// One map, where the tile begins: what a single thread works out, ahead of time, for the whole block.
template <class T>
struct alignas(16) MapOrigin {
  const T *key, *value;  // of row 0 and the tile's first key column
  const T* query;        // of row 0 and the tile's first column, as below
  i64 output;            // tokens and heads before it in the contiguous output
  int rows, first_row;   // of the map; of strip 0
};

// Map row of the first query of strip 0, 0 or less: the strips are moved up so that none at the border has too few rows for the windows of
// its queries to lie within KEY_ROWS of it. kernels/cuda/strip.py refuses the maps for which there is no such place.
template <int WINDOW_ROWS>
FASTNA_DEVICE int first_strip_row(int rows) {
  const int last = rows % QUERY_ROWS;
  const bool enough = rows < QUERY_ROWS || last == 0 || last >= WINDOW_ROWS - WINDOW_ROWS / 2;
  return enough ? 0 : WINDOW_ROWS / 2 + 1 - QUERY_ROWS;
}

// Strips first to last - 1 of those of one head, one dilation group of columns and one tile of columns, over all batch entries and groups of
// rows.
template <class Config>
FASTNA_DEVICE void strip_walk(const StripForwardArguments& args, u8* shared, int head, int column_group, int tile, int first, int last) {
  using T = typename Config::T;
  using Rpb = typename Config::Rpb;
  using Layout = typename Config::Layout;
  using Bias = typename Config::Bias;
  constexpr int HEAD_DIM = Config::HEAD_DIM, WINDOW_ROWS = Config::WINDOW_ROWS, WINDOW_COLUMNS = Config::WINDOW_COLUMNS;
  constexpr int WARPS = Config::WARPS, AHEAD = Config::AHEAD, SLAB_ROWS = Config::SLAB_ROWS;
  constexpr int ABOVE = WINDOW_ROWS / 2;  // a strip's first key row lies so far above its first query row

  const Geometry& geometry = args.geometry;
  const int row_groups = geometry.axis[1].dilation, column_groups = geometry.axis[2].dilation;
  const int columns = group_length(geometry.axis[2], column_group);
  const int query_column = tile * Config::TILE_COLUMNS;
  if (query_column >= columns) return;  // a dilation group shorter than the longest
  const int key_column = first_product_key<WINDOW_COLUMNS>(query_column, columns, KEY_COLUMNS);
  const int key_head = head / (geometry.heads / geometry.key_heads);
  const int tile_columns = minimum(Config::TILE_COLUMNS, columns - query_column);
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, q = lane % 4;
  const u32 slabs_at = shared_address(shared);
  u8* const queries_at = shared + Config::QUERY_AT + warp * (Config::PRODUCTS * Config::PRODUCT_BYTES);
  u8* const table = shared + Config::BIAS_AT;

  const auto query_slot = [&](int step, int i) {
    return queries_at + (static_cast<u32>(step) % Config::QUERY_SLOTS * (WARPS * Config::PRODUCTS) + i) * Config::PRODUCT_BYTES;
  };
  MapOrigin<T>* const maps = reinterpret_cast<MapOrigin<T>*>(shared + Config::MAPS_AT);
  static_assert(sizeof(MapOrigin<T>) == 48, "MAPS_AT has room for 48 bytes each");
  const auto prepare = [&](int map) {
    const int batch = map / row_groups, group = map - batch * row_groups;
    const int token = query_column * column_groups + column_group, key_token = key_column * column_groups + column_group;
    MapOrigin<T>& origin = maps[static_cast<u32>(map) % Config::MAPS];
    origin.key = element<T>(args.key, batch, 0, group, key_token, key_head);
    origin.value = element<T>(args.value, batch, 0, group, key_token, key_head);
    origin.query = element<T>(args.query, batch, 0, group, token, head);
    origin.output = ((static_cast<i64>(batch) * geometry.axis[1].length + group) * geometry.axis[2].length + token) * geometry.heads + head;
    origin.rows = group_length(geometry.axis[1], group);
    origin.first_row = first_strip_row<WINDOW_ROWS>(origin.rows);
  };
  const auto stride = [](i64 of_tokens, int groups) { return static_cast<int>(of_tokens) * groups; };
  const auto slab_address = [&](int step) { return slabs_at + static_cast<u32>(step) % Config::SLABS * Config::SLAB_BYTES; };

  // The threads copy PASS_ROWS rows of keys and values at a time, so that a thread's tokens are below each other, and each warp its queries.
  constexpr int TOKENS = Config::PASS_TOKENS, PASS_ROWS = Config::PASS_ROWS;
  const int thread_token = thread_index() / Layout::CHUNKS, chunk = thread_index() % Layout::CHUNKS;
  const auto load = [&](const SlabCursor& at, int step) {
    const MapOrigin<T>& map = maps[static_cast<u32>(at.map) % Config::MAPS];
    const int rows = map.rows, query_row = map.first_row + at.slab * QUERY_ROWS;
    const u32 slab = slab_address(step);
    FASTNA_UNROLL
    for (int c = 0; c < Config::STORED_COLUMNS; c += TOKENS) {
      const int in_slab = c + thread_token;  // PASS_ROWS rows one after the other
      const int column = in_slab % Config::STORED_COLUMNS, first_row = in_slab / Config::STORED_COLUMNS;
      if (first_row >= PASS_ROWS) break;
      const int row = query_row - ABOVE + Config::CARRIED + first_row;
      const bool inside = key_column + column < columns;
      const u32 target = slab + first_row * Config::ROW_BYTES + Layout::offset(column, chunk);
      FASTNA_UNROLL
      for (int k = 0; k < 2; ++k) {
        const TensorArguments& tensor = k == 0 ? args.key : args.value;
        const int row_stride = stride(tensor.axis[1], row_groups), column_stride = stride(tensor.axis[2], column_groups);
        const T* source =
            (k == 0 ? map.key : map.value) + (row * row_stride + column * column_stride + chunk * 8);
        FASTNA_UNROLL
        for (int r = 0; r < SLAB_ROWS; r += PASS_ROWS) {
          copy_async<16>(target + k * Config::TILE_BYTES + r * Config::ROW_BYTES, source,
                         inside && static_cast<u32>(row + r) < static_cast<u32>(rows));
          source += row_stride * PASS_ROWS;
        }
      }
    }
    // Token t of the 16 is (row t % 8, column t / 8): chunks q + 4 i of tokens g and g + 8 are this lane's.
    const bool inside = static_cast<u32>(query_row + g) < static_cast<u32>(rows);
    const int column_stride = stride(args.query.axis[2], column_groups);
    const T* source = map.query + ((query_row + g) * stride(args.query.axis[1], row_groups) + warp * QUERY_COLUMNS * column_stride + q * 8);
    FASTNA_UNROLL
    for (int i = 0; i < Config::PRODUCTS; ++i) {
      const int column = (warp + i * WARPS) * QUERY_COLUMNS;
      const u32 target = shared_address(query_slot(step, i));
      FASTNA_UNROLL
      for (int k = 0; k < QUERY_COLUMNS; ++k) {
        FASTNA_UNROLL
        for (int c = 0; c < HEAD_DIM / 32; ++c) {
          copy_async<16>(target + Layout::offset(g + 8 * k, q + 4 * c), source + ((i * WARPS * QUERY_COLUMNS + k) * column_stride + 32 * c),
                         inside && column + k < tile_columns);
        }
      }
    }
  };

  SlabCursor current = {first / args.strips, first % args.strips - 1};
  SlabCursor next = current;
  // A map of `strips` strips has one slab more; the last map's may end early.
  const int last_map = (last - 1) / args.strips;
  const int steps = last - first + last_map - current.map + 1;

  const Bias bias(query_column, columns);
  const float scale_log2e = geometry.scale * LOG2_E;

  if (thread_index() < 2) prepare(minimum(current.map + thread_index(), last_map));
  for (int loaded = 0; loaded < steps + AHEAD; ++loaded) {
    const int step = loaded - AHEAD;
    wait_copies<AHEAD - 1>();
    sync_threads();  // also: the slab before the last is free
    if (loaded < steps) {
      load(next, loaded);
      if (next.slab == -1 && next.map < last_map && thread_index() == 0) prepare(next.map + 1);
      next.advance(args.strips);
    }
    commit_copies();
    if (loaded == 0) {  // while the first copies are under way
      const Rpb* rpb = static_cast<const Rpb*>(args.rpb) + head * (Bias::LINES * (2 * WINDOW_COLUMNS - 1));
      bias.template build<Config::THREADS, Config::HAS_RPB>(table, rpb, 1.0f / geometry.scale, Config::TILE_COLUMNS);
    }
    if (step > 0) current.advance(args.strips);
    if (step <= 0 || current.slab < 0) continue;  // the first slab of a walk only leads in, as do those before a map
    const MapOrigin<T>& map = maps[static_cast<u32>(current.map) % Config::MAPS];
    const int rows = map.rows, query_row = map.first_row + current.slab * QUERY_ROWS;
    if (query_row >= rows) continue;

    const int lane_row = query_row + g;
    const u32 visible = Bias::visible(minimum(maximum(lane_row, 0), rows - 1), query_row - ABOVE, rows);
    const u32 slabs[2] = {slab_address(step - 1), slab_address(step)};
    for (int i = 0; i < Config::PRODUCTS; ++i) {
      const int column = (warp + i * WARPS) * QUERY_COLUMNS;  // of the tile
      if (column >= tile_columns) break;
      u8* const slot = query_slot(step, i);
      u32 query[HEAD_DIM / 16][4];
      FASTNA_UNROLL
      for (int c = 0; c < HEAD_DIM / 16; ++c) {
        load_matrix_x4(query[c], shared_address(slot) + Layout::offset(lane % 16, 2 * c + lane / 16));
      }
      float output[HEAD_DIM / 8][4], maximum[2], sum[2];
      attend<Config>(query, slabs, first_product_key<WINDOW_COLUMNS>(query_column + column, columns, KEY_COLUMNS) - key_column, visible,
                     table + bias.slot(query_column + column) * (Bias::LINES * Bias::LINE) + Bias::line(g, q), table + Bias::masked(g, q),
                     scale_log2e, output, maximum, sum);

      const float inverse[2] = {reciprocal_approx(sum[0]), reciprocal_approx(sum[1])};
      sync_warp();  // all lanes have their queries
      FASTNA_UNROLL
      for (int c = 0; c < HEAD_DIM / 8; ++c) {
        u8* at = slot + Layout::offset(g, c) + q * 4;
        *reinterpret_cast<u32*>(at) = pack2<T>(output[c][0] * inverse[0], output[c][1] * inverse[0]);
        *reinterpret_cast<u32*>(at + 8 * Layout::BYTES) = pack2<T>(output[c][2] * inverse[1], output[c][3] * inverse[1]);
      }
      sync_warp();
      const int column_stride = column_groups * geometry.heads;
      const i64 at = map.output + (lane_row * (row_groups * geometry.axis[2].length * geometry.heads) + column * column_stride);
      FASTNA_UNROLL
      for (int k = 0; k < QUERY_COLUMNS; ++k) {
        if (static_cast<u32>(lane_row) < static_cast<u32>(rows) && column + k < tile_columns) {
          T* token = static_cast<T*>(args.output.data) + (at + k * column_stride) * HEAD_DIM + q * 8;
          FASTNA_UNROLL
          for (int c = 0; c < HEAD_DIM / 32; ++c) {
            store_global_16(token + 32 * c, *reinterpret_cast<const uint4*>(slot + Layout::offset(g + 8 * k, q + 4 * c)));
          }
          if (q == k) args.lse[at + k * column_stride] = (maximum[k] + log2_approx(sum[k])) * LN_2;
        }
      }
    }
  }
}

template <class Config>
FASTNA_DEVICE void strip_forward(const StripForwardArguments& args) {
  const Geometry& geometry = args.geometry;
  // Strips of one head, tile and group of columns follow each other, so that a block has one bias table. Blocks of other heads run along
  // with them: sectors which hold several heads are read from DRAM once.
  const u32 blocks = block_count() / static_cast<u32>(geometry.heads * args.tiles * geometry.axis[2].dilation);  // of each walk
  const u64 strips = static_cast<u64>(args.strips) * geometry.axis[1].dilation * geometry.batch;
  const int walk = static_cast<int>(block_index() / blocks);
  const u32 part = block_index() - walk * blocks;
  const int first = static_cast<int>(strips * part / blocks), last = static_cast<int>(strips * (part + 1) / blocks);
  const int place = walk / geometry.heads;
  if (first < last) strip_walk<Config>(args, dynamic_shared<u8>(), walk % geometry.heads, place / args.tiles, place % args.tiles, first, last);
}

}  // namespace fastna
