// What feeds the products of src/hopper_ring_backward.cuh: its rings and tables in shared memory, the warp that copies row blocks into them, and
// the warps that work out what turns scores into their gradients.
//
// Row block i holds rows 8 i - ABOVE - lift .. 8 i - ABOVE - lift + 7. Step s takes the queries and the keys of rows 8 s - lift .. 8 s - lift + 7:
// all that they see, and all that see them, lies in the BLOCKS row blocks from s on. kernels/cuda/hopper_ring_backward.py finds the lift.
// Of each tensor all slots are one ring of rows, [row][column][channel], with an odd number of columns: then 8 columns of a row, and 8 rows of
// a column, touch every bank once.
#pragma once

#include "fastna/hopper_strip.cuh"
#include "fastna/strip_backward_ring.cuh"
#include "fastna/strip_bias_gradient.cuh"

namespace fastna {

struct HopperRingBackwardArguments {
  TensorMap query, key, value, grad_output;  // boxes of 8 rows, column by column
  const void* output;                        // this and all below contiguous
  void *grad_query, *grad_key, *grad_value;  // whose tokens are `spread` times as far apart
  const float *lse, *grad_lse;  // the second may be null
  const void* rpb;
  float* grad_rpb;  // [blocks of a head, heads, 2 k_rows - 1, 2 k_columns - 1]: a part per block
  Geometry geometry;  // of one dilation group, with the axes' dilation
  StripWalks walks;
  int turn, carry;  // from a block's walk to its next: strips, and entries more where these begin anew
  int lift;
  int spread;  // 1; 3 where the gradients are slices of one tensor
  float scale_log2;  // scale * log2(e)
};

// STRIP: columns of a strip, even; COLUMNS: of a row block. WARPS: that multiply. DILATED: entries of walks are dilation groups, all equally long.
template <class T_, class Rpb_, bool HAS_RPB_, bool RPB_GRADIENT_, int HEAD_DIM_, int WINDOW_ROWS_, int WINDOW_COLUMNS_, int STRIP_, int COLUMNS_,
          int SLOTS_, int WARPS_, bool DILATED_>
struct HopperRingBackwardConfig {
  using T = T_;
  using Rpb = Rpb_;
  static constexpr bool HAS_RPB = HAS_RPB_, RPB_GRADIENT = RPB_GRADIENT_;
  static constexpr int HEAD_DIM = HEAD_DIM_, WINDOW_ROWS = WINDOW_ROWS_, WINDOW_COLUMNS = WINDOW_COLUMNS_;
  static constexpr bool DILATED = DILATED_;
  static constexpr int STRIP = STRIP_, COLUMNS = COLUMNS_, SLOTS = SLOTS_, WARPS = WARPS_;
  // All warpgroups together have no more than they began with: 128, 168 or 96 each.
  static_assert(WARPS == 12 || WARPS == 8 || WARPS == 16, "");
  static constexpr int PRODUCER_REGISTERS = WARPS == 12 ? 80 : WARPS == 8 ? 72 : 64;
  static constexpr int CONSUMER_REGISTERS = WARPS == 12 ? 144 : WARPS == 8 ? 216 : 104;
  static constexpr int MEASURERS = 3;                           // warps
  static constexpr int MOST_MEASURED = HEAD_DIM == 32 ? 8 : 6;  // tokens that a lane of theirs has under way
  // Windows up to 7 reach over two row blocks. So would 9, but not at borders, where keys are seen from further away.
  static constexpr int BLOCKS = WINDOW_ROWS <= 7 ? 2 : 3, ABOVE = WINDOW_ROWS <= 7 ? WINDOW_ROWS / 2 : TILE_SIDE;
  // Of 8 columns, that a pair of columns takes: as queries; and at most, as keys that both borders' queries see, of a map twice as wide as a window.
  static constexpr int INNER_SWEEPS = ceil_div(WINDOW_COLUMNS + 1, KEY_COLUMNS);
  static constexpr int SWEEPS = maximum(ceil_div(2 * WINDOW_COLUMNS, KEY_COLUMNS), 2), QUERY_SWEEPS = WINDOW_COLUMNS <= 7 ? SWEEPS : INNER_SWEEPS;
  // Whether a last sweep of at most 4 columns is folded: 8 tokens are then 4 of one row and 4 of that FOLD rows further on, which with an odd
  // number of columns touch every bank once, and half as many rows are swept: the first FOLD of the row blocks in reach, and so the others too.
  static constexpr int FOLD = 12;
  static constexpr bool FOLDS = BLOCKS * TILE_SIDE == 2 * FOLD && (WINDOW_COLUMNS == 9 || WINDOW_COLUMNS == 11);
  static constexpr int K_STEPS = HEAD_DIM / 16, CHUNKS = HEAD_DIM / 8;
  static constexpr int TOKEN = HEAD_DIM * 2;           // bytes, and of the swizzle
  static constexpr int ROW_BYTES = COLUMNS * TOKEN, BLOCK_BYTES = TILE_SIDE * ROW_BYTES;
  static constexpr int TENSOR_BYTES = SLOTS * BLOCK_BYTES;  // from a tensor's ring to the next
  static constexpr int TOKENS = TILE_SIDE * COLUMNS, ROWS = SLOTS * TILE_SIDE;
  static constexpr int BIAS_LINES_BEFORE = 8;
  static constexpr int BIAS_LINES = 2 * WINDOW_ROWS - 1 + 2 * BIAS_LINES_BEFORE;
  static constexpr int BIAS_LINE = 2 * WINDOW_COLUMNS + 1;
  static constexpr int OFFSETS = (2 * WINDOW_ROWS - 1) * (2 * WINDOW_COLUMNS - 1);
  static_assert(COLUMNS % 2 == 1 && COLUMNS >= KEY_COLUMNS && STRIP % 2 == 0, "");
  static_assert(HEAD_DIM == 32 || HEAD_DIM == 64, "a token is one swizzled row");
  static_assert(WINDOW_ROWS % 2 == 1 && WINDOW_ROWS <= 13 && WINDOW_COLUMNS % 2 == 1 && SLOTS > BLOCKS, "");
};

// Its blocks may be any number to a map's strips.
struct RingWalk : StripWalk {
  using StripWalk::StripWalk;

  FASTNA_DEVICE void advance(const HopperRingBackwardArguments& args) {
    entry += args.walks.at_once, strip += args.turn;
    if (strip >= args.walks.strips) strip -= args.walks.strips, entry += args.carry;
  }
};

// Of a step: rows in reach, counted from its first row block's first.
struct alignas(16) RingStep {
  struct Sweep {
    int begin, rows;  // both even
  };
  // Of keys that a query of this row sees, of queries that see a key: the highest bit is the sweep's first row, 24 at most. The lowest bit of the
  // former: see StripBiasGradient::is_outer.
  uint2 rows[8];
  Sweep keys, queries;
};
static_assert(sizeof(RingStep) == 80 && sizeof(StripSweep) == 48, "the host counts as many bytes");

constexpr u32 OUTER = 1;
// StripSweep::more, where the next sweep is folded.
constexpr int FOLDED = 2;

// 8 numbers bf16: what is added to a score, -lse / scale, in three parts, as many of -delta = grad_lse - sum(grad_output * output), and zeros. So
// a product with ones adds either where the columns of scores are queries.
struct RingStatistics {
  FASTNA_DEVICE static uint4 of(float lse, float delta) {
    const uint2 first = split(lse), second = split(delta);
    return {first.x, first.y | second.x << 16, second.x >> 16 | second.y << 16, 0};
  }
  FASTNA_DEVICE static float2 sum(uint4 parts) {
    const float2 a = unpack2<bf16>(parts.x), b = unpack2<bf16>(parts.y), c = unpack2<bf16>(parts.z);
    return {a.x + (a.y + b.x), b.y + (c.x + c.y)};
  }
  // The lane's part of a left operand of ones.
  FASTNA_DEVICE static u32 lse_ones() { return select(ONE | ONE << 16, ONE, 0); }
  FASTNA_DEVICE static u32 delta_ones() { return select(0, ONE << 16, ONE | ONE << 16); }

 private:
  static constexpr u32 ONE = 0x3f80;
  FASTNA_DEVICE static u32 select(u32 a, u32 b, u32 c) {
    const int q = lane_index() & 3;
    return q == 0 ? a : q == 1 ? b : q == 2 ? c : 0;
  }
  // Three parts of 16 bits.
  FASTNA_DEVICE static uint2 split(float value) {
    const bf16 first = from_float<bf16>(value);
    value -= to_float(first);
    const bf16 second = from_float<bf16>(value);
    value -= to_float(second);
    return {static_cast<u32>(first.bits) | static_cast<u32>(second.bits) << 16, from_float<bf16>(value).bits};
  }
};

enum RingTensor : int { RING_KEY, RING_VALUE, RING_QUERY, RING_GRAD_OUTPUT, RING_TENSORS };

template <class Config>
struct HopperRingShared {
  u8 ring[RING_TENSORS][Config::SLOTS][Config::BLOCK_BYTES];
  uint4 statistics[Config::ROWS * Config::COLUMNS];  // of a token, see RingStatistics
  float4 bias[Config::HAS_RPB ? Config::BIAS_LINES * Config::BIAS_LINE : 1];
  float bias_gradient[Config::RPB_GRADIENT ? round_up(Config::WARPS * Config::OFFSETS, 4) : 4];
  MemoryBarrier full[Config::SLOTS], ready[Config::SLOTS], empty[Config::SLOTS];
  // Behind: StripSweep [pairs of columns of the map][QUERY_SWEEPS of queries, SWEEPS of keys], RingStep [steps]
};

template <class Config>
struct HopperRing {
  using T = typename Config::T;
  using Shared = HopperRingShared<Config>;
  using RowAxis = SlidingAxis<Config::WINDOW_ROWS>;
  using ColumnAxis = SlidingAxis<Config::WINDOW_COLUMNS>;
  using Position = RingPosition<Config::SLOTS>;
  using Map = StripMap<Config::DILATED>;
  static constexpr int D = Config::HEAD_DIM, TOKEN = Config::TOKEN, COLUMNS = Config::COLUMNS, WARPS = Config::WARPS;
  static constexpr int THREADS = WARPS * WARP;  // that multiply

  const HopperRingBackwardArguments& args;
  Shared& shared;
  int head, member;

  FASTNA_DEVICE HopperRing(const HopperRingBackwardArguments& args_, Shared& shared_) : args(args_), shared(shared_) {
    u32 block = block_index();
    keep(block);
    head = block % args.geometry.heads, member = block / args.geometry.heads;
  }

  FASTNA_DEVICE int rows() const { return args.geometry.axis[1].length; }
  FASTNA_DEVICE int columns() const { return args.geometry.axis[2].length; }
  FASTNA_DEVICE StripSweep* sweeps(int pair, int phase) const {
    constexpr int FEWER = Config::SWEEPS - Config::QUERY_SWEEPS;
    return reinterpret_cast<StripSweep*>(&shared + 1) + (pair * 2 + phase) * Config::SWEEPS - (pair + phase) * FEWER;
  }
  FASTNA_DEVICE RingStep* steps() const { return reinterpret_cast<RingStep*>(sweeps(ceil_div(columns(), 2), 0)); }
  // Of tokens in tensors with one number for a token and head, contiguous. `map` is an entry or, where that is a dilation group, the index of its
  // first token.
  FASTNA_DEVICE int map_of(int entry) const {
    if constexpr (!Config::DILATED) return entry;
    const Map map(args.geometry, entry, 1);
    const int height = rows() * map.row_step, width = columns() * map.column_step;
    return ((map.batch * height + map.row_group) * width + map.column_group) * args.geometry.heads + head;
  }
  FASTNA_DEVICE u32 token_index(int map, int row, int column) const {
    if constexpr (Config::DILATED) return map + (row * args.geometry.axis[1].dilation * columns() + column) * column_step();
    return ((map * rows() + row) * columns() + column) * args.geometry.heads + head;
  }
  FASTNA_DEVICE int column_step() const { return (Config::DILATED ? args.geometry.axis[2].dilation : 1) * args.geometry.heads; }

  // First column of a strip's row blocks.
  FASTNA_DEVICE int origin(int first_column) const {
    return minimum(window_at(ColumnAxis{}, first_column, columns()).begin, queries_at(ColumnAxis{}, first_column, columns()).begin);
  }
  // Of a token's chunk: its place by the address that it would have without swizzle.
  FASTNA_DEVICE static u32 swizzled(u32 address) { return address ^ (address >> 3 & (TOKEN - 16)); }

  // The warp is done with what the barrier guards.
  FASTNA_DEVICE static void release(MemoryBarrier& barrier) {
    sync_warp();
    if (lane_index() == 0) barrier_arrive(barrier);
  }
  // ---- What brings row blocks

  // A warp, of which one thread copies.
  FASTNA_DEVICE void produce() const {
    Position at;
    RingWalk walk(args.walks, member);
    if (lane_index() != 0) return;
    for (; walk.exists(args.walks); walk.advance(args)) {
      const Map map(args.geometry, walk.entry, 1);
      const int column = map.column(origin(walk.strip * Config::STRIP));
      for (int block = 0; block <= args.walks.steps + Config::BLOCKS - 2; ++block, at.advance()) {
        const int row = map.row(block * TILE_SIDE - Config::ABOVE - args.lift);
        MemoryBarrier& full = shared.full[at.slot];
        barrier_wait(shared.empty[at.slot], at.parity ^ 1);
        barrier_expect(full, RING_TENSORS * Config::BLOCK_BYTES);
        copy_box(shared.ring[RING_GRAD_OUTPUT][at.slot], args.grad_output, full, head * D, column, row, 0, map.batch);
        copy_box(shared.ring[RING_QUERY][at.slot], args.query, full, head * D, column, row, 0, map.batch);
        copy_box(shared.ring[RING_KEY][at.slot], args.key, full, head * D, column, row, 0, map.batch);
        copy_box(shared.ring[RING_VALUE][at.slot], args.value, full, head * D, column, row, 0, map.batch);
      }
    }
  }

  // What a warp that measures takes at once of a row block: BATCH tokens a lane, in equal rounds. As many as registers allow, for loads take long.
  static constexpr int CHUNKS = Config::CHUNKS, STRIDE = Config::MEASURERS * (WARP / CHUNKS);
  static constexpr int SHARE = ceil_div(Config::TOKENS, STRIDE), ROUNDS = ceil_div(SHARE, Config::MOST_MEASURED), BATCH = ceil_div(SHARE, ROUNDS);
  static constexpr int GROUPS = ceil_div(BATCH, CHUNKS);
  struct Round {
    RingWalk walk;
    int block = 0, base = 0;  // first token of the round

    FASTNA_DEVICE void advance(const HopperRingBackwardArguments& args) {
      base += BATCH * STRIDE;
      if (base < Config::TOKENS) return;
      base = 0;
      if (block++ < args.walks.steps + Config::BLOCKS - 2) return;
      block = 0;
      walk.advance(args);
    }
  };

  // MEASURERS warps: the statistics of every row block. A lane takes a chunk of a token, and loads the next round's in place of what it has used.
  FASTNA_DEVICE void measure(int warp) const {
    const int chunk = lane_index() % CHUNKS, first = warp * (WARP / CHUNKS) + lane_index() / CHUNKS;
    const T* const output = static_cast<const T*>(args.output) + chunk * 8;
    const float minus_inverse_scale = -1.0f / args.geometry.scale;
    uint4 values[BATCH];
    float lse[GROUPS], less[GROUPS];  // of the tokens that the lane writes: of a token's lanes each writes another one's
    Round next{RingWalk(args.walks, member)};
    int map = map_of(next.walk.entry);
    const auto find = [&](int token, u32& index) {
      const int row = next.block * TILE_SIDE - Config::ABOVE - args.lift + token / COLUMNS;
      const int column = origin(next.walk.strip * Config::STRIP) + token % COLUMNS;
      index = token_index(Config::DILATED ? map : next.walk.entry, row, column);
      return next.walk.exists(args.walks) && token < Config::TOKENS && static_cast<u32>(row) < static_cast<u32>(rows()) && column < columns();
    };
    const auto load = [&](int group) {
      const int token = next.base + group * CHUNKS * STRIDE + first;
      u32 index;
      FASTNA_UNROLL
      for (int n = group * CHUNKS; n < minimum((group + 1) * CHUNKS, BATCH); ++n) {
        values[n] = {0, 0, 0, 0};
        if (find(token + n % CHUNKS * STRIDE, index)) values[n] = load_readonly(reinterpret_cast<const uint4*>(output + static_cast<u64>(index) * D));
      }
      lse[group] = less[group] = 0.0f;
      if (!find(token + chunk * STRIDE, index)) return;
      lse[group] = load_readonly(args.lse + index);
      if (args.grad_lse != nullptr) less[group] = load_readonly(args.grad_lse + index);
    };
    FASTNA_UNROLL
    for (int group = 0; group < GROUPS; ++group) load(group);
    Position at;
#pragma unroll 1
    while (next.walk.exists(args.walks)) {
      const int base = next.base;
      next.advance(args);
      if (Config::DILATED && next.block == 0 && next.base == 0) map = map_of(next.walk.entry);
      if (base == 0) {
        barrier_wait(shared.empty[at.slot], at.parity ^ 1);  // as what fills the row block did: its statistics are free then, too
        barrier_wait(shared.full[at.slot], at.parity);       // grad_output has come
      }
      FASTNA_UNROLL
      for (int group = 0; group < GROUPS; ++group) {
        float own_delta = 0.0f;
        const int count = minimum(CHUNKS, BATCH - group * CHUNKS);
        FASTNA_UNROLL
        for (int i = 0; i < count; ++i) {
          const int n = group * CHUNKS + i, token = base + n * STRIDE + first;
          float delta = 0.0f;
          if (token < Config::TOKENS) {
            const u32 place = (RING_GRAD_OUTPUT * Config::SLOTS + at.slot) * Config::BLOCK_BYTES + token * TOKEN + chunk * 16;
            const uint4 grad = *reinterpret_cast<const uint4*>(shared.ring[0][0] + swizzled(place));
            delta = add_dot(values[n].x, grad.x, add_dot(values[n].y, grad.y, 0.0f));
            delta = add_dot(values[n].z, grad.z, add_dot(values[n].w, grad.w, delta));
          }
          FASTNA_UNROLL
          for (int distance = 1; distance < CHUNKS; distance *= 2) delta += shuffle_xor(delta, distance);
          if (chunk == i) own_delta = less[group] - delta;
        }
        const int token = base + (group * CHUNKS + chunk) * STRIDE + first;
        if (chunk < count && token < Config::TOKENS) {
          shared.statistics[at.slot * Config::TOKENS + token] = RingStatistics::of(lse[group] * minus_inverse_scale, own_delta);
        }
        load(group);
      }
      if (next.base != 0) continue;
      release(shared.ready[at.slot]);
      at.advance();
    }
  }
  FASTNA_DEVICE static float add_dot(u32 a, u32 b, float sum) {
    const float2 x = unpack2<T>(a), y = unpack2<T>(b);
    return x.x * y.x + (x.y * y.y + sum);
  }

  // ---- Before: THREADS threads

  FASTNA_DEVICE void prepare(int thread) const {
    fill_sweeps(thread);
    for (int i = thread; i < args.walks.steps * 8; i += THREADS) fill_step(i / 8, i % 8);
    if constexpr (Config::HAS_RPB) fill_bias(thread);
    if constexpr (Config::RPB_GRADIENT) {
#pragma unroll 1
      for (int i = thread; i < WARPS * Config::OFFSETS; i += THREADS) shared.bias_gradient[i] = 0.0f;
    }
  }
  // Row `g` of a step.
  FASTNA_DEVICE void fill_step(int step, int g) const {
    const int length = rows(), first = step * TILE_SIDE - args.lift - Config::ABOVE, own = first + Config::ABOVE, row = own + g;
    const int begin = maximum(own, 0), last = minimum(own + TILE_SIDE, length) - 1;
    RingStep& table = steps()[step];
    const auto sweep = [=](Interval from, Interval to) {
      const int at = (from.begin - first) & ~1;
      return RingStep::Sweep{at, ((to.end - first + 1) & ~1) - at};
    };
    const RingStep::Sweep keys = sweep(window_at(RowAxis{}, begin, length), window_at(RowAxis{}, last, length));
    const RingStep::Sweep queries = sweep(queries_at(RowAxis{}, begin, length), queries_at(RowAxis{}, last, length));
    const auto bits = [=](Interval reach, int from) {
      return row >= begin && row <= last ? ((1u << reach.size()) - 1) << (32 - (reach.end - first - from)) : 0;
    };
    table.rows[g] = {bits(window_at(RowAxis{}, row, length), keys.begin), bits(queries_at(RowAxis{}, row, length), queries.begin)};
    if constexpr (Config::BLOCKS > 2) {
      if (StripBiasGradient<Config>::is_outer(window_at(RowAxis{}, row, length).begin - row)) table.rows[g].x |= OUTER;
    }
    if (g == 0) table.keys = keys, table.queries = queries;
  }
  // As StripBackwardLoader::fill_sweeps, for all columns of the map.
  FASTNA_DEVICE void fill_sweeps(int thread) const {
    const int length = columns();
#pragma unroll 1
    for (int i = thread; i < ceil_div(length, 2) * 2 * 4; i += THREADS) {
      const int pair = i / 8, phase = i / 4 % 2, q = i % 4;
      const int column = pair * 2, second = minimum(column + 1, length - 1), from = origin(column / Config::STRIP * Config::STRIP);
      const Interval first = phase == 0 ? window_at(ColumnAxis{}, column, length) : queries_at(ColumnAxis{}, column, length);
      const Interval last = phase == 0 ? window_at(ColumnAxis{}, second, length) : queries_at(ColumnAxis{}, second, length);
#pragma unroll 1
      for (int n = 0; n < (phase == 0 ? Config::QUERY_SWEEPS : Config::SWEEPS); ++n) {
        const int begin = first.begin + n * KEY_COLUMNS, end = last.end;
        const bool folded = folds(n, begin, end);
        const int width = folded ? 4 : KEY_COLUMNS, in_width = 2 * q & (width - 1);
        // A wide window's last sweep ends with it: as far from the pair as any other pair's, see StripBiasGradient.
        const int stored = minimum(begin - from, (Config::INNER_SWEEPS > 1 ? maximum(end - from, width) : COLUMNS) - width);
        const int low = stored + from + (phase == 0 ? in_width : width - 1 - in_width), high = phase == 0 ? low + 1 : low - 1;
        const auto bits = [=](Interval reach) {
          const Interval visible = {maximum(reach.begin, begin), reach.end};  // not twice
          return (visible.contains(low) ? 0xffffu : 0u) | (visible.contains(high) ? 0xffff0000u : 0u);
        };
        StripSweep& sweep = sweeps(pair, phase)[n];
        const u32 of_first = bits(first), of_last = second == column && phase == 0 ? 0 : bits(last);
        sweep.masks[q] = phase == 0 ? uint2{of_first, of_last} : uint2{of_last, of_first};
        if (q == 0) {
          sweep.stored = stored;
          sweep.upper = (phase == 0 ? column : second) - from;
          sweep.lower = (phase == 0 ? second : column) - from;
          sweep.more = n + 1 < Config::SWEEPS && begin + KEY_COLUMNS < end ? (folds(n + 1, begin + KEY_COLUMNS, end) ? FOLDED : 1) : 0;
        }
      }
    }
  }
  FASTNA_DEVICE static bool folds(int sweep, int begin, int end) { return Config::FOLDS && sweep > 0 && end - begin <= 4; }
  // As StripBackwardLoader::fill_bias.
  FASTNA_DEVICE void fill_bias(int thread) const {
    const auto* rpb = static_cast<const typename Config::Rpb*>(args.rpb) + head * Config::OFFSETS;
    const float inverse_scale = 1.0f / args.geometry.scale;
#pragma unroll 1
    for (int i = thread; i < Config::BIAS_LINES * Config::BIAS_LINE; i += THREADS) {
      const int line = i / Config::BIAS_LINE - Config::BIAS_LINES_BEFORE, x = i % Config::BIAS_LINE - Config::WINDOW_COLUMNS;
      const auto one = [=](int offset) {
        const int index = offset + Config::WINDOW_COLUMNS - 1;
        if (line < 0 || line > 2 * Config::WINDOW_ROWS - 2 || index < 0 || index > 2 * Config::WINDOW_COLUMNS - 2) return 0.0f;
        return to_float(load_readonly(rpb + line * (2 * Config::WINDOW_COLUMNS - 1) + index)) * inverse_scale;
      };
      shared.bias[i] = {one(x), one(x + 1), one(x - 1), one(x)};
    }
  }
};

}  // namespace fastna
