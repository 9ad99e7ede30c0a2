// Neighborhood attention forward over small sliding 2-D windows on Hopper (sm_90a): see hopper_strip.cuh.
//
// One warp streams row blocks of keys and values, and tiles of queries, through rings of shared memory, without a gap from walk to walk. The
// others take two columns of 8 queries at a time (matrix rows 0 to 7: the first column, 8 to 15: the second one) and multiply them with the
// columns of keys that they see, and no others: by mma.sync, since wgmma would multiply all that 8 columns of queries see, and hold as many
// scores. So a warp waits for nobody but the copies.
#pragma once

#include "fastna/hopper_strip.cuh"
#include "fastna/hopper_tiles.cuh"

namespace fastna {

struct HopperStripForwardArguments {
  TensorMap query, key, value;  // boxes of 8 rows
  void* output;                 // contiguous
  float* lse;
  const void* rpb;
  Geometry geometry;
  StripWalks walks;
  float inverse_scale, scale_log2e;
};

// WHOLE: a map's rows are those of two row blocks. COLUMNS: of a strip, even. MAPS: whose strips are side by side in a row block, where a map is one strip. WARPS: that multiply. STAGES: row
// blocks in shared memory, QUERY_STAGES: steps of queries. DILATED: entries of walks are dilation groups, whose lengths differ by one at most.
template <class T, class Rpb_, bool HAS_RPB_, int HEAD_DIM_, int WINDOW_ROWS_, int WINDOW_COLUMNS_, bool WHOLE_, int COLUMNS_, int MAPS_,
          int WARPS_, int STAGES_, int QUERY_STAGES_, bool DILATED_>
struct HopperStripForwardConfig {
  using Element = T;
  using Rpb = Rpb_;
  static constexpr bool HAS_RPB = HAS_RPB_, WHOLE = WHOLE_, DILATED = DILATED_;
  static constexpr int HEAD_DIM = HEAD_DIM_, WINDOW_ROWS = WINDOW_ROWS_, WINDOW_COLUMNS = WINDOW_COLUMNS_;
  static constexpr int COLUMNS = COLUMNS_, MAPS = MAPS_, WARPS = WARPS_, STAGES = STAGES_, QUERY_STAGES = QUERY_STAGES_;
  static constexpr int ABOVE = WINDOW_ROWS / 2, LEFT = WINDOW_COLUMNS / 2;
  // What 8 rows of queries see does not fit two row blocks: a step has the one of its own rows, and those before and behind.
  static constexpr bool ALIGNED = WINDOW_ROWS > TILE_SIDE;
  static constexpr int ROW_BYTES = HEAD_DIM * 2;  // of one token, and its swizzle
  static constexpr int COLUMN_BYTES = TILE_SIDE * ROW_BYTES;
  static constexpr int MAP_COLUMNS = COLUMNS + WINDOW_COLUMNS - 1;  // of keys
  static constexpr int BLOCK_BYTES = MAPS * MAP_COLUMNS * COLUMN_BYTES, QUERY_BYTES = MAPS * COLUMNS * COLUMN_BYTES;
  static constexpr int KEYS = WINDOW_COLUMNS + 1;  // columns that two neighbouring queries see; even
  static_assert(COLUMNS % 2 == 0 && KEYS % 2 == 0, "columns go in pairs");
  static_assert(MAPS == 1 || !DILATED, "maps side by side are batch entries");
  static_assert(HEAD_DIM == 32 || HEAD_DIM == 64, "a token is one swizzled row");
};

template <class Config>
struct HopperStripForward {
  using T = typename Config::Element;
  using Table = StripTable<Config::WINDOW_ROWS, Config::WINDOW_COLUMNS, Config::WHOLE, Config::ALIGNED, Config::ALIGNED && !Config::HAS_RPB>;
  static constexpr int D = Config::HEAD_DIM, ROW = Config::ROW_BYTES, COLUMN = Config::COLUMN_BYTES, KEYS = Config::KEYS;
  static constexpr int WARPS = Config::WARPS, STAGES = Config::STAGES, QUERY_STAGES = Config::QUERY_STAGES;
  static constexpr int ALL_CONSUMERS = 1;  // a named barrier
  static constexpr bool ALIGNED = Config::ALIGNED, DILATED = Config::DILATED;
  static constexpr int KINDS = ALIGNED ? 4 : 3;          // of steps, by where windows are clamped
  static constexpr int LENGTHS = DILATED ? 2 : 1;        // of maps: of the longer groups, and of the shorter ones

  struct Shared {
    u8 key[STAGES][Config::BLOCK_BYTES], value[STAGES][Config::BLOCK_BYTES];
    u8 query[QUERY_STAGES][Config::QUERY_BYTES];
    u8 bias[Table::BYTES];
    int own_bias[LENGTHS][KINDS][WARP];  // of a lane: bytes into `bias`, in the first step, in those between, and in the last one (ALIGNED: last two)
    MemoryBarrier full[STAGES], empty[STAGES], query_full[QUERY_STAGES], query_empty[QUERY_STAGES];
  };

  const HopperStripForwardArguments& args;
  Shared& shared;
  const int head;
  StripWalk walk;

  FASTNA_DEVICE HopperStripForward(const HopperStripForwardArguments& args_, Shared& shared_)
      : args(args_), shared(shared_), head(block_index() % args_.geometry.heads), walk(args_.walks, block_index() / args_.geometry.heads) {}

  FASTNA_DEVICE int steps_of(const StripMap<DILATED>& map) const { return DILATED ? ceil_div(map.rows(args.geometry), TILE_SIDE) : args.walks.steps; }

  // One thread. The queries of a step come behind its first row block: were they first, they could wait for a step that lacks its second one.
  FASTNA_DEVICE void produce() {
    RingPosition<STAGES> at;
    RingPosition<QUERY_STAGES> query_at;
    for (; walk.exists(args.walks); walk.advance(args.walks)) {
      const StripMap<DILATED> map(args.geometry, walk.entry, Config::MAPS);
      const int batch = map.batch, first_column = walk.strip * Config::COLUMNS;
      const int column = map.column(first_column), key_column = map.column(first_column - Config::LEFT);
      const int steps = steps_of(map);
#pragma unroll 1
      for (int block = 0; block < steps + (Config::WHOLE || ALIGNED ? 0 : 1); ++block) {
        const int row = map.row(block * TILE_SIDE), key_row = map.row(block * TILE_SIDE - (Config::WHOLE || ALIGNED ? 0 : Config::ABOVE));
        barrier_wait(shared.empty[at.slot], at.parity ^ 1);
        barrier_expect(shared.full[at.slot], 2 * Config::BLOCK_BYTES);
        copy_box(shared.key[at.slot], args.key, shared.full[at.slot], head * D, key_row, key_column, 0, batch);
        copy_box(shared.value[at.slot], args.value, shared.full[at.slot], head * D, key_row, key_column, 0, batch);
        at.advance();
        if (block == steps) break;
        barrier_wait(shared.query_empty[query_at.slot], query_at.parity ^ 1);
        barrier_expect(shared.query_full[query_at.slot], Config::QUERY_BYTES);
        copy_box(shared.query[query_at.slot], args.query, shared.query_full[query_at.slot], head * D, row, column, 0, batch);
        query_at.advance();
      }
    }
  }

  // A warp: every WARPS-th pair of columns.
  FASTNA_DEVICE void consume(int warp) {
    const int thread = warp * WARP + lane_index(), lane = lane_index();
    const Geometry& geometry = args.geometry;
    const int heads = geometry.heads, row_tokens = geometry.axis[2].length * heads;
    const u32 map_tokens = geometry.axis[1].length * row_tokens;
    const auto* rpb = static_cast<const typename Config::Rpb*>(args.rpb) + head * ((2 * Config::WINDOW_ROWS - 1) * (2 * Config::WINDOW_COLUMNS - 1));
    Table::template build<Config::HAS_RPB>(shared.bias, rpb, args.inverse_scale, thread, WARPS * WARP);
    // A step between the first and the last ones is like the second one of a map that goes on.
#pragma unroll 1
    for (int i = warp; i < LENGTHS * KINDS; i += WARPS) {
      const int kind = i % KINDS, rows = DILATED ? ceil_div(geometry.axis[1].length, geometry.axis[1].dilation) - i / KINDS : geometry.axis[1].length;
      const int step = kind == 0 ? 0 : kind == 1 ? 1 : (DILATED ? ceil_div(rows, TILE_SIDE) : args.walks.steps) - KINDS + kind;
      shared.own_bias[i / KINDS][kind][lane] = Table::lane_offset(lane, step, kind == 1 ? 1 << 20 : rows);
    }
    named_barrier(ALL_CONSUMERS, WARPS * WARP);

    const auto release = [&](MemoryBarrier& barrier) {
      if (lane == 0) barrier_arrive(barrier);
    };
    RingPosition<STAGES> at;
    RingPosition<QUERY_STAGES> query_at;
    int pair = warp;
    for (; walk.exists(args.walks); walk.advance(args.walks)) {
      const StripMap<DILATED> place(geometry, walk.entry, Config::MAPS);
      const int first_column = walk.strip * Config::COLUMNS, batch = place.batch;
      const int rows = place.rows(geometry), columns = place.columns(geometry), steps = steps_of(place);
      const int length = DILATED && rows * geometry.axis[1].dilation < geometry.axis[1].length ? 1 : 0;  // which one of LENGTHS
      const int pairs = Config::MAPS > 1 ? Config::MAPS * (Config::COLUMNS / 2) : ceil_div(minimum(Config::COLUMNS, columns - first_column), 2);
      int row = 0;  // of the map; `token` is the number of the one there in the strip's first column, among all tokens and heads
      u32 token = batch * map_tokens + place.row(0) * row_tokens + place.column(first_column) * heads + head;
      barrier_wait(shared.full[at.slot], at.parity);
      RingPosition<STAGES> above = at;  // ALIGNED: `at` has a step's own rows
      for (int step = 0; step < steps; ++step) {
        RingPosition<STAGES> below = at;
        below.advance();
        if constexpr (ALIGNED) {
          if (step + 1 < steps) barrier_wait(shared.full[below.slot], below.parity);
        } else if (!Config::WHOLE || step == 0) {
          above = at;
          at = below;
          barrier_wait(shared.full[at.slot], at.parity);
        }
        barrier_wait(shared.query_full[query_at.slot], query_at.parity);
        if (pair < pairs) {
          const int own = shared.own_bias[length][step == 0 ? 0 : maximum(1, step - steps + KINDS)][lane];
          const bool begins = step == 0, ends = step == steps - 1;
          const Reach reach = !ALIGNED ? Reach{above.slot, at.slot, 0, 1, 2}
                                       : Reach{at.slot, begins ? below.slot : above.slot, below.slot, begins ? 2 : 0, begins || ends ? 2 : 3};
#pragma unroll 1
          for (; pair < pairs; pair += WARPS) {
            const int map = Config::MAPS > 1 ? pair / (Config::COLUMNS / 2) : 0;
            if (Config::MAPS > 1 && batch + map >= geometry.batch) continue;
            attend(own, columns, first_column, 2 * pair - map * Config::COLUMNS, map, reach, query_at.slot, token + map * map_tokens, rows - row);
          }
        }
        pair -= pairs;
        sync_warp();
        release(shared.query_empty[query_at.slot]);
        if (ALIGNED ? step > 0 : !Config::WHOLE || step == steps - 1) release(shared.empty[above.slot]);
        if (ALIGNED && step + 1 < steps) above = at, at = below;
        query_at.advance();
        row += TILE_SIDE;
        token += TILE_SIDE * place.row_step * row_tokens;
      }
      release(shared.empty[at.slot]);
      at.advance();
    }
  }

  // The larger one of two scores and of all in a row's four lanes.
  static FASTNA_DEVICE float largest(float a, float b) {
    a = fmaxf(a, b);
    a = fmaxf(a, shuffle_xor(a, 1));
    return fmaxf(a, shuffle_xor(a, 2));
  }

  // Slots of the row blocks that a step sees, in the order in which they are multiplied: ALIGNED, a step's own rows come first, for some of them
  // every query sees. And for how many row blocks entries of the bias lie before the second one's.
  struct Reach {
    int first, second, third, before_second, count;

    FASTNA_DEVICE int slot(int i) const { return i == 0 ? first : i == 1 ? second : third; }
    FASTNA_DEVICE int before(int i) const { return !ALIGNED ? i : i == 0 ? 1 : i == 1 ? before_second : 2; }
  };

  // Weights are 2^(scale score - top). Any top will do that keeps them finite and does not let all of them vanish: it is the largest of some
  // scores of the first row block, and raised where the sum of weights shows that it was too low.
  static constexpr float MOST = is_same<T, half> ? 32768.0f : 1e18f;

  // Of the queries in columns `own_column` and the next one of the strip that begins with `first_column` of the map's `columns`, number `map` of those in
  // the row blocks. `own` is where the lane's entries of the bias are, `token` that of the strip's first column, `rows` are left.
  FASTNA_DEVICE void attend(int own, int columns, int first_column, int own_column, int map, const Reach& reach, int query_slot, u32 token, int rows) const {
    const int lane = lane_index(), column = first_column + own_column;
    const int begin = window_begin<Config::WINDOW_COLUMNS>(column, columns);  // of the first column's window
    const bool same = window_begin<Config::WINDOW_COLUMNS>(column + 1, columns) == begin;
    const u32 seen = (map * Config::MAP_COLUMNS + begin - (first_column - Config::LEFT)) * COLUMN;  // bytes into a row block
    const u8* const line = shared.bias + Table::line_offset(begin - column);
    const u8* const second_first = same ? line - Table::COLUMN_STEP : shared.bias;  // the table's first line is hidden
    const u8* const second_last = same ? shared.bias : line + (KEYS - 2) * Table::COLUMN_STEP;
    const float scale = args.scale_log2e;

    u32 query[D / 16][4];
    FASTNA_UNROLL
    for (int k = 0; k < D / 16; ++k)
      load_matrix_x4(query[k], shared_address(shared.query[query_slot]) + (map * Config::COLUMNS + own_column) * COLUMN + swizzled_chunk<ROW>(lane % 16, 2 * k + lane / 16));
    float output[D / 8][4], top[2] = {0.0f, 0.0f}, sum[2] = {0.0f, 0.0f};
    FASTNA_UNROLL
    for (int c = 0; c < D / 8; ++c) output[c][0] = output[c][1] = output[c][2] = output[c][3] = 0.0f;
    const u32 ones = pack2<T>(1.0f, 1.0f);

    // Side by side where registers allow: the second block's scores while the first one's values are multiplied.
#pragma unroll(D == 64 || ALIGNED || KEYS > 8 ? 1 : 2)
    for (int block = 0; block < (ALIGNED ? reach.count : 2); ++block) {
      const u32 slot = reach.slot(block) * Config::BLOCK_BYTES + seen;
      const u32 key = shared_address(shared.key[0]) + slot + swizzled_chunk<ROW>(lane % 8, lane / 8);
      const u32 value = shared_address(shared.value[0]) + slot + lane / 8 % 2 * COLUMN + swizzled_chunk<ROW>(lane % 8, lane / 16);
      // Scores begin with bias / scale: of keys 2 q and 2 q + 1 of a column, for the first column of queries and for the second one.
      const int from = own + reach.before(block) * (TILE_SIDE * 8);
      float scores[KEYS][4];
      FASTNA_UNROLL
      for (int j = 0; j < KEYS; ++j) {
        const u8* const second = j == 0 ? second_first : j == KEYS - 1 ? second_last : line + (j - 1) * Table::COLUMN_STEP;
        const float2 initial = *reinterpret_cast<const float2*>(second + from);
        scores[j][2] = initial.x, scores[j][3] = initial.y;
        if (j == KEYS - 1) {
          scores[j][0] = scores[j][1] = HIDDEN;
        } else {
          const float2 first = *reinterpret_cast<const float2*>(line + j * Table::COLUMN_STEP + from);
          scores[j][0] = first.x, scores[j][1] = first.y;
        }
        FASTNA_UNROLL
        for (int k = 0; k < D / 32; ++k) {
          u32 keys[4];
          load_matrix_x4(keys, (key ^ (k << 6)) + j * COLUMN);
          mma_m16n8k16<T>(scores[j], query[2 * k], keys[0], keys[1]);
          mma_m16n8k16<T>(scores[j], query[2 * k + 1], keys[2], keys[3]);
        }
      }

      if (block == 0) {
        // Every query sees these two columns, and some row of the first block in them.
        const float *near = scores[1], *far = scores[KEYS - 2];
        FASTNA_UNROLL
        for (int i = 0; i < 2; ++i) top[i] = largest(fmaxf(near[2 * i], near[2 * i + 1]), fmaxf(far[2 * i], far[2 * i + 1])) * scale;
      }
      u32 weights[KEYS / 2][4];
      float sums[4];  // of weights times ones
      for (bool raised = false;; raised = true) {
        sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
        FASTNA_UNROLL
        for (int j = 0; j < KEYS; j += 2) {
          FASTNA_UNROLL
          for (int k = 0; k < 4; ++k) {
            const float* score = scores[j + k / 2] + k % 2 * 2;
            weights[j / 2][k] = pack2<T>(exp2_approx(fmaf(score[0], scale, -top[k % 2])), exp2_approx(fmaf(score[1], scale, -top[k % 2])));
          }
          mma_m16n8k16<T>(sums, weights[j / 2], ones, ones);
        }
        if (raised || all_in_warp(sums[0] < MOST && sums[2] < MOST)) break;
        FASTNA_UNROLL
        for (int i = 0; i < 2; ++i) {
          float most = HIDDEN;
          FASTNA_UNROLL
          for (int j = 0; j < KEYS; ++j) most = fmaxf(most, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
          const float old = top[i];
          top[i] = fmaxf(old, largest(most, most) * scale);
          const float rescale = exp2_approx(old - top[i]);
          sum[i] *= rescale;
          FASTNA_UNROLL
          for (int c = 0; c < D / 8; ++c) output[c][2 * i] *= rescale, output[c][2 * i + 1] *= rescale;
        }
      }

      sum[0] += sums[0], sum[1] += sums[2];

      FASTNA_UNROLL
      for (int j = 0; j < KEYS; j += 2) {
        FASTNA_UNROLL
        for (int c = 0; c < D / 8; c += 2) {
          u32 values[4];
          load_matrix_x4_transposed(values, (value ^ (c << 4)) + j * COLUMN);
          mma_m16n8k16<T>(output[c], weights[j / 2], values[0], values[1]);
          mma_m16n8k16<T>(output[c + 1], weights[j / 2], values[2], values[3]);
        }
      }
    }

    // Neighbouring lanes swap words, so that each has 8 bytes of one of two chunks, and four lanes fill a sector.
    const bool odd = (lane & 1) != 0;
    const int heads = args.geometry.heads, exist = lane / 4 < rows ? columns - column : 0;
    const u32 next_column = (DILATED ? args.geometry.axis[2].dilation : 1) * heads, next_row = (DILATED ? args.geometry.axis[1].dilation : 1) * args.geometry.axis[2].length * heads;
    token += lane / 4 * next_row + own_column * next_column;
    T* results = static_cast<T*>(args.output) + (lane & 1) * 8 + (lane & 2) * 2;
    keep(results);
    FASTNA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float inverse = reciprocal_approx(sum[i]);
      T* const to = results + static_cast<u64>(token + i * next_column) * D;
      FASTNA_UNROLL
      for (int c = 0; c < D / 8; c += 2) {
        const float *even = output[c] + 2 * i, *next = output[c + 1] + 2 * i;
        const u32 words[2] = {pack2<T>(even[0] * inverse, even[1] * inverse), pack2<T>(next[0] * inverse, next[1] * inverse)};
        const u32 received = shuffle_xor(odd ? words[0] : words[1], 1);
        if (i < exist) *reinterpret_cast<uint2*>(to + c * 8) = {odd ? received : words[0], odd ? words[1] : received};
      }
    }
    if (lane % 4 < minimum(exist, 2)) args.lse[token + (odd ? next_column : 0)] = ((odd ? top[1] : top[0]) + log2_approx(odd ? sum[1] : sum[0])) * LN_2;
  }
};

template <class Config>
FASTNA_DEVICE void hopper_strip_forward(const HopperStripForwardArguments& args) {
  using Kernel = HopperStripForward<Config>;
  auto& shared = *dynamic_shared<typename Kernel::Shared>();
  if (thread_index() == 0) {
    prefetch_map(args.query);
    prefetch_map(args.key);
    prefetch_map(args.value);
    for (int s = 0; s < Kernel::STAGES; ++s) {
      barrier_init(shared.full[s], 1);
      barrier_init(shared.empty[s], Kernel::WARPS);
    }
    for (int s = 0; s < Kernel::QUERY_STAGES; ++s) {
      barrier_init(shared.query_full[s], 1);
      barrier_init(shared.query_empty[s], Kernel::WARPS);
    }
    barrier_init_done();
  }
  sync_threads();
  Kernel kernel(args, shared);
  const int warp = warp_index();
  if (warp == 0) {
    if (lane_index() == 0) kernel.produce();
  } else {
    kernel.consume(warp - 1);
  }
}

}  // namespace fastna
