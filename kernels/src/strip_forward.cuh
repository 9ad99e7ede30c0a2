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
  static constexpr int QUERY_SLOTS = AHEAD + 1;
  static constexpr int QUERY_AT = SLABS * SLAB_BYTES, BIAS_AT = QUERY_AT + QUERY_SLOTS * WARPS * PRODUCTS * PRODUCT_BYTES;
  static constexpr int SHARED_BYTES = BIAS_AT + Bias::BYTES;
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
  int batch, row_group, slab;

  FASTNA_DEVICE void advance(int strips, int row_groups) {
    if (++slab < strips) return;
    slab = -1;
    if (++row_group < row_groups) return;
    row_group = 0;
    ++batch;
  }
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
// rows. `table` is the tile's bias table, not yet built.
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
  const int pairs = ceil_div(minimum(Config::TILE_COLUMNS, columns - query_column), QUERY_COLUMNS);
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, q = lane % 4;
  const u32 slabs_at = shared_address(shared);
  u8* const queries_at = shared + Config::QUERY_AT + warp * (Config::PRODUCTS * Config::PRODUCT_BYTES);
  u8* const table = shared + Config::BIAS_AT;

  const auto query_slot = [&](int step, int product) {
    return queries_at + (step % Config::QUERY_SLOTS * (WARPS * Config::PRODUCTS) + product / WARPS) * Config::PRODUCT_BYTES;
  };
  const auto slab_address = [&](int step) { return slabs_at + step % Config::SLABS * Config::SLAB_BYTES; };

  // Every warp copies rows of keys and values, and its own queries. Row SLAB_ROWS r of slab s is first_strip_row + KEY_ROWS - ABOVE + 8 (s - 1).
  const auto load = [&](const SlabCursor& at, int step) {
    const int rows = group_length(geometry.axis[1], at.row_group);
    const int query_row = first_strip_row<WINDOW_ROWS>(rows) + at.slab * QUERY_ROWS;
    const int key_row = query_row - ABOVE + Config::CARRIED;
    const u32 slab = slab_address(step);
    constexpr int TOKENS = WARP / Layout::CHUNKS;  // of a warp at a time
    const int token = lane / Layout::CHUNKS, chunk = lane % Layout::CHUNKS;
    for (int i = warp; i < 2 * SLAB_ROWS; i += WARPS) {
      const int row = key_row + i % SLAB_ROWS;
      if (at.slab < 0 && i % SLAB_ROWS < SLAB_ROWS - Config::CARRIED) continue;
      const TensorArguments& tensor = i < SLAB_ROWS ? args.key : args.value;
      const T* source = element<T>(tensor, at.batch, 0, row * row_groups + at.row_group, key_column * column_groups + column_group, key_head);
      const int stride = static_cast<int>(tensor.axis[2]) * column_groups;
      const bool inside = row >= 0 && row < rows;
      FASTNA_UNROLL
      for (int c = 0; c < Config::STORED_COLUMNS; c += TOKENS) {
        const int column = c + token;
        if (c + TOKENS <= Config::STORED_COLUMNS || column < Config::STORED_COLUMNS) {
          copy_async<16>(slab + i * Config::ROW_BYTES + Layout::offset(column, chunk), source + static_cast<i64>(column) * stride + chunk * 8,
                         inside && key_column + column < columns);
        }
      }
    }
    if (at.slab < 0) return;
    // Token t of the 16 is (row t % 8, column t / 8): chunks q + 4 i of tokens g and g + 8 are this lane's.
    const int row = query_row + g;
    for (int product = warp; product < pairs; product += WARPS) {
      const u32 target = shared_address(query_slot(step, product));
      FASTNA_UNROLL
      for (int k = 0; k < QUERY_COLUMNS; ++k) {
        const int column = query_column + product * QUERY_COLUMNS + k;
        const T* source =
            element<T>(args.query, at.batch, 0, row * row_groups + at.row_group, column * column_groups + column_group, head) + q * 8;
        FASTNA_UNROLL
        for (int i = 0; i < HEAD_DIM / 32; ++i) {
          copy_async<16>(target + Layout::offset(g + 8 * k, q + 4 * i), source + 32 * i, row >= 0 && row < rows && column < columns);
        }
      }
    }
  };

  const int maps = first / args.strips;
  SlabCursor current = {maps / row_groups, maps % row_groups, first % args.strips - 1};
  SlabCursor next = current;
  // A map of `strips` strips has one slab more; the last map's may end early.
  const int steps = last - first + (last - 1) / args.strips - maps + 1;

  sync_threads();  // whoever still works on the walk before
  FASTNA_UNROLL
  for (int i = 0; i < AHEAD; ++i) {
    if (i < steps) load(next, i);
    next.advance(args.strips, row_groups);
    commit_copies();
  }
  // While the copies are under way.
  const Bias bias(query_column, columns);
  const Rpb* rpb = static_cast<const Rpb*>(args.rpb) + head * (Bias::LINES * (2 * WINDOW_COLUMNS - 1));
  bias.template build<Config::THREADS, Config::HAS_RPB>(table, rpb, 1.0f / geometry.scale, Config::TILE_COLUMNS);
  const float scale_log2e = geometry.scale * LOG2_E;

  for (int step = 0; step < steps; ++step, current.advance(args.strips, row_groups)) {
    wait_copies<AHEAD - 1>();
    sync_threads();  // also: the slab before the last is free
    if (step + AHEAD < steps) {
      load(next, step + AHEAD);
      next.advance(args.strips, row_groups);
    }
    commit_copies();
    const int rows = group_length(geometry.axis[1], current.row_group);
    const int query_row = first_strip_row<WINDOW_ROWS>(rows) + current.slab * QUERY_ROWS;
    if (step == 0 || current.slab < 0 || query_row >= rows) continue;  // the first slab of a walk only leads in

    const int lane_row = query_row + g;
    const u32 visible = Bias::visible(minimum(maximum(lane_row, 0), rows - 1), query_row - ABOVE, rows);
    const u32 slabs[2] = {slab_address(step + Config::SLABS - 1), slab_address(step)};
    for (int product = warp; product < pairs; product += WARPS) {
      const int column = query_column + product * QUERY_COLUMNS;
      u8* const slot = query_slot(step, product);
      u32 query[HEAD_DIM / 16][4];
      FASTNA_UNROLL
      for (int i = 0; i < HEAD_DIM / 16; ++i) {
        load_matrix_x4(query[i], shared_address(slot) + Layout::offset(lane % 16, 2 * i + lane / 16));
      }
      float output[HEAD_DIM / 8][4], maximum[2], sum[2];
      attend<Config>(query, slabs, first_product_key<WINDOW_COLUMNS>(column, columns, KEY_COLUMNS) - key_column, visible,
                     table + bias.slot(column) * (Bias::LINES * Bias::LINE) + Bias::line(g, q), table + Bias::masked(g, q), scale_log2e, output,
                     maximum, sum);

      const float inverse[2] = {reciprocal_approx(sum[0]), reciprocal_approx(sum[1])};
      sync_warp();  // all lanes have their queries
      FASTNA_UNROLL
      for (int c = 0; c < HEAD_DIM / 8; ++c) {
        u8* at = slot + Layout::offset(g, c) + q * 4;
        *reinterpret_cast<u32*>(at) = pack2<T>(output[c][0] * inverse[0], output[c][1] * inverse[0]);
        *reinterpret_cast<u32*>(at + 8 * Layout::BYTES) = pack2<T>(output[c][2] * inverse[1], output[c][3] * inverse[1]);
      }
      sync_warp();
      // Tokens and heads before the first column's, in the contiguous output; what lies between neighbouring columns.
      const i64 before = (static_cast<i64>(current.batch) * geometry.axis[1].length + lane_row * row_groups + current.row_group) *
                             geometry.axis[2].length +
                         column * column_groups + column_group;
      const i64 at = before * geometry.heads + head;
      const int stride = column_groups * geometry.heads;
      FASTNA_UNROLL
      for (int k = 0; k < QUERY_COLUMNS; ++k) {
        if (lane_row >= 0 && lane_row < rows && column + k < columns) {
          T* token = static_cast<T*>(args.output.data) + (at + k * stride) * HEAD_DIM + q * 8;
          FASTNA_UNROLL
          for (int i = 0; i < HEAD_DIM / 32; ++i) {
            store_global_16(token + 32 * i, *reinterpret_cast<const uint4*>(slot + Layout::offset(g + 8 * k, q + 4 * i)));
          }
          if (q == k) args.lse[at + k * stride] = (maximum[k] + log2_approx(sum[k])) * LN_2;
        }
      }
    }
  }
  wait_copies<0>();
}

template <class Config>
FASTNA_DEVICE void strip_forward(const StripForwardArguments& args) {
  const Geometry& geometry = args.geometry;
  // Strips of one head, tile and group of columns follow each other: the bias table stays. Blocks of other heads run along with them,
  // so that sectors which hold several heads are read from DRAM once.
  const int walk = args.strips * geometry.axis[1].dilation * geometry.batch;
  const i64 strips = static_cast<i64>(walk) * geometry.heads * args.tiles * geometry.axis[2].dilation;
  i64 at = strips * block_index() / block_count();
  const i64 end = strips * (block_index() + 1) / block_count();
  while (at < end) {
    int place = static_cast<int>(at / walk);
    const int first = static_cast<int>(at - static_cast<i64>(place) * walk);
    const int last = static_cast<int>(minimum<i64>(walk, first + (end - at)));
    const int head = place % geometry.heads;
    place /= geometry.heads;
    strip_walk<Config>(args, dynamic_shared<u8>(), head, place / args.tiles, place % args.tiles, first, last);
    at += last - first;
  }
}

}  // namespace fastna
