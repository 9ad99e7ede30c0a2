// Gradients of small-window neighborhood attention on 2-D maps on Hopper (sm_90a): the products of strip_backward.cuh behind tensor copies.
//
// One thread streams row blocks of 8 rows (key, value, query, grad_output) through rings; three warps follow it and work out what turns scores
// into their gradients; the others take 8 rows x 2 columns of queries, or of keys, at a time. Blocks stay on their SM and walk down strips of
// maps of one head; a warp waits for nobody but the copies. Nothing is summed across warps but the bias gradient, in a fixed order.
#pragma once

#include "fastna/hopper_ring_backward.cuh"
#include "src/strip_backward.cuh"

namespace fastna {

template <class Config>
struct HopperRingBackward : HopperRing<Config> {
  using Base = HopperRing<Config>;
  using typename Base::Position, typename Base::T;
  using Base::args, Base::shared, Base::head, Base::member, Base::COLUMNS, Base::D, Base::THREADS, Base::TOKEN, Base::WARPS;
  using Base::Base, Base::columns, Base::prepare, Base::release, Base::rows, Base::steps, Base::swizzled, Base::sweeps, Base::token_index, Base::map_of, Base::column_step;
  using Products = StripProducts<Config>;
  using BiasGradient = StripBiasGradient<Config>;
  static constexpr int K_STEPS = Config::K_STEPS;
  static constexpr int CONSUMERS = 1;  // a named barrier
  // A pair's sweeps over keys lie at two distances, and away from borders always the same ones.
  struct Sums {
    BiasGradient first;
    StripBiasGradient<Config, Config::FOLDS ? Config::FOLD : 0> second;

    FASTNA_DEVICE explicit Sums(float* table) : first(table), second(table) {}
    FASTNA_DEVICE void flush() {
      first.flush();
      if constexpr (Config::INNER_SWEEPS == 2) second.flush();
    }
  };

  FASTNA_DEVICE void wait(const Position& at) const {
    barrier_wait(shared.full[at.slot], at.parity);
    barrier_wait(shared.ready[at.slot], at.parity);
  }

  FASTNA_DEVICE void consume(int warp) const {
    prepare(warp * WARP + lane_index());
    named_barrier(CONSUMERS, THREADS);
    Sums sums(shared.bias_gradient + warp * Config::OFFSETS);
    Position at;
    int item = warp;
#pragma unroll 1
    for (RingWalk walk(args.walks, member); walk.exists(args.walks); walk.advance(args)) {
      const int map = map_of(walk.entry);
      const int first_pair = walk.strip * (Config::STRIP / 2);
      const int pairs = minimum(Config::STRIP / 2, ceil_div(columns(), 2) - first_pair);
      wait(at);
      FASTNA_UNROLL
      for (int i = 2; i < Config::BLOCKS; ++i) {
        at.advance();
        wait(at);
      }
#pragma unroll 1
      for (int step = 0; step < args.walks.steps; ++step) {
        const int slot = slot_before(at, Config::BLOCKS - 2);
        at.advance();
        wait(at);
#pragma unroll 1
        for (; item < pairs; item += WARPS) queries(step, slot, map, first_pair + item, sums);
#pragma unroll 1
        for (; item < 2 * pairs; item += WARPS) keys(step, slot, map, first_pair + item - pairs);
        item -= 2 * pairs;  // the next step goes on with the warp after the last that was busy
        release(shared.empty[slot]);
      }
      FASTNA_UNROLL
      for (int i = Config::BLOCKS - 2; i >= 0; --i) release(shared.empty[slot_before(at, i)]);
      at.advance();
    }
    if constexpr (Config::RPB_GRADIENT) {
      sums.flush();
      named_barrier(CONSUMERS, THREADS);
      float* const part = args.grad_rpb + static_cast<i64>(block_index()) * Config::OFFSETS;
#pragma unroll 1
      for (int i = warp * WARP + lane_index(); i < Config::OFFSETS; i += THREADS) {
        float sum = 0.0f;
#pragma unroll 1
        for (int w = 0; w < WARPS; ++w) sum += shared.bias_gradient[w * Config::OFFSETS + i];
        part[i] = sum;
      }
    }
  }

  FASTNA_DEVICE static int slot_before(const Position& at, int blocks) {
    const int slot = at.slot - blocks;
    return blocks == 0 || slot >= 0 ? slot : slot + Config::SLOTS;
  }
  // Row `row` of the rings, of those that begin with a slot's first.
  FASTNA_DEVICE static int ring_row(int slot, int row) {
    row += slot * TILE_SIDE;
    return row < Config::ROWS ? row : row - Config::ROWS;
  }
  // 16 tokens of a step as left operand: its rows of two columns. In ring 0.
  FASTNA_DEVICE u32 left_address(int slot, int upper, int lower) const {
    int lane = lane_index();
    keep(lane);  // worked out for every item: there is no register to keep it in
    const int row = ring_row(slot, (lane & 7) + Config::ABOVE);
    return swizzled(shared_address(shared.ring) + row * Config::ROW_BYTES + ((lane & 8) == 0 ? upper : lower) * TOKEN + (lane >> 4) * 16);
  }
  FASTNA_DEVICE static void load_left(u32 (&a)[K_STEPS][4], u32 address, int ring) {
    FASTNA_UNROLL
    for (int k = 0; k < K_STEPS; ++k) load_matrix_x4(a[k], (address ^ (k << 5)) + ring * Config::TENSOR_BYTES);
  }
  // Of a sweep's 8 tokens of a row: where they lie, from the first of them.
  template <bool FOLD>
  struct Token {
    int row, column;

    FASTNA_DEVICE explicit Token(int i) : row(FOLD ? (i >> 2) * Config::FOLD : 0), column(FOLD ? i & 3 : i) {}
  };
  // 8 tokens of each of two rows as right operands, see StripProducts::Right. In ring 0.
  struct Right {
    u32 at;  // `plain` before the swizzle

    FASTNA_DEVICE Right(u32 start, int row, int column) {
      const int lane = lane_index();
      at = start + (row + (lane >> 4)) * Config::ROW_BYTES + column * TOKEN + (lane >> 3 & 1) * 16;
    }
    FASTNA_DEVICE static int to_transposed() {
      return ((lane_index() >> 3 & 1) - (lane_index() >> 4)) * (Config::ROW_BYTES - 16);
    }
  };
  // d[n] += left right[n]^T for both rows
  FASTNA_DEVICE static void multiply_transposed(float (&d)[2][4], const u32 (&a)[K_STEPS][4], u32 plain, int ring) {
    FASTNA_UNROLL
    for (int k = 0; k < K_STEPS; ++k) {
      u32 b[4];
      load_matrix_x4(b, (plain ^ (k << 5)) + ring * Config::TENSOR_BYTES);
      mma_m16n8k16<T>(d[0], a[k], b[0], b[1]);
      mma_m16n8k16<T>(d[1], a[k], b[2], b[3]);
    }
  }
  // d += p right, over the tokens of two rows
  FASTNA_DEVICE static void multiply(float (&d)[Products::D_TILES][4], const u32 (&p)[4], u32 transposed, int ring) {
    FASTNA_UNROLL
    for (int c = 0; c < Products::D_TILES; c += 2) {
      u32 b[4];
      load_matrix_x4_transposed(b, (transposed ^ (c << 4)) + ring * Config::TENSOR_BYTES);
      mma_m16n8k16<T>(d[c], p, b[0], b[1]);
      mma_m16n8k16<T>(d[c + 1], p, b[2], b[3]);
    }
  }

  FASTNA_DEVICE static u32 row_mask(u32 rows, int n) { return static_cast<u32>(static_cast<int>(rows << n) >> 31); }
  // The lane's entry of the bias for the offsets (key - query) of its first right row and column.
  FASTNA_DEVICE const float4* bias(int row_offset, int column_offset) const {
    const int line = row_offset + Config::WINDOW_ROWS - 1 + Config::BIAS_LINES_BEFORE;
    const int entry = minimum(maximum(column_offset + Config::WINDOW_COLUMNS, 0), Config::BIAS_LINE - 1);
    return shared.bias + line * Config::BIAS_LINE + entry;
  }
  // After how many rows of a sweep the ring begins anew; never where it does not, or has before the first.
  FASTNA_DEVICE static int rows_to_wrap(int slot, int begin) {
    if constexpr (Config::BLOCKS > 2) return (Config::SLOTS - slot) * TILE_SIDE - begin;
    return slot == Config::SLOTS - 1 ? TILE_SIDE - begin : 0;
  }
  FASTNA_DEVICE static void start_from(float (&s)[4], float4 initial) { s[0] = initial.x, s[1] = initial.y, s[2] = initial.z, s[3] = initial.w; }

  // The rows of a step's sweeps, and which of them a lane's left row has in reach: the highest bit is the first.
  struct Rows {
    int slot, begin, count;
    u32 reach;

    // Of a folded sweep, for `token`.
    FASTNA_DEVICE Rows folded(int token_row) const { return {slot, 0, Config::FOLD, reach >> begin << token_row}; }
  };

  // What 16 queries need all along.
  struct Queries {
    u32 query[K_STEPS][4], grad[K_STEPS][4];
    float lse0, lse1;
    float4 minus_delta;
    bool has_outer;  // see StripBiasGradient
  };
  // dq += what comes of the keys of a sweep. Returns whether another one follows.
  template <bool FOLD, class Sums>
  FASTNA_DEVICE bool sweep_keys(float (&dq)[Products::D_TILES][4], const Queries& of, const StripSweep* sweep, Rows rows, Sums& bias_gradient) const {
    const int g = lane_index() >> 2, q = lane_index() & 3;
    const float scale2 = args.scale_log2;
    const Token<FOLD> own(2 * q), named(lane_index() & 7);
    if constexpr (FOLD) rows = rows.folded(own.row);
    const int stored = sweep->stored, distance = stored - sweep->upper;
    const uint2 columns = sweep->masks[q];
    const bool more = sweep->more != 0;
    Right right(shared_address(shared.ring), ring_row(rows.slot, rows.begin + named.row), stored + named.column);
    const int wrap = rows_to_wrap(rows.slot, rows.begin + named.row), offset = rows.begin - Config::ABOVE;
    const float4* initial = bias(offset + own.row - g, distance + own.column);
    if constexpr (Config::RPB_GRADIENT) bias_gradient.begin(offset + Config::WINDOW_ROWS - 1, distance);
    u32 visible = rows.reach;

#pragma unroll 1
    for (int j = 0; j < rows.count;) {
      const u32 plain = swizzled(right.at), transposed = swizzled(right.at + Right::to_transposed());
      float s[2][4] = {}, dp[2][4];
      u32 ds[4];
      FASTNA_UNROLL
      for (int n = 0; n < 2; ++n) {
        if constexpr (Config::HAS_RPB) start_from(s[n], initial[n * Config::BIAS_LINE]);
        start_from(dp[n], of.minus_delta);
      }
      multiply_transposed(s, of.query, plain, RING_KEY);
      multiply_transposed(dp, of.grad, plain, RING_VALUE);
      FASTNA_UNROLL
      for (int n = 0; n < 2; ++n) {
        const u32 in_reach = row_mask(visible, n);
        // Masked as bits: a score outside the window may overflow, and infinity times anything is not zero.
        ds[2 * n] = pack2<T>(exp2_approx(s[n][0] * scale2 - of.lse0) * dp[n][0], exp2_approx(s[n][1] * scale2 - of.lse0) * dp[n][1]) &
                    columns.x & in_reach;
        ds[2 * n + 1] = pack2<T>(exp2_approx(s[n][2] * scale2 - of.lse1) * dp[n][2], exp2_approx(s[n][3] * scale2 - of.lse1) * dp[n][3]) &
                        columns.y & in_reach;
      }
      if constexpr (Config::RPB_GRADIENT) bias_gradient.add(ds, j, of.has_outer);
      multiply(dq, ds, transposed, RING_KEY);
      j += 2, visible <<= 2, initial += 2 * Config::BIAS_LINE, right.at += 2 * Config::ROW_BYTES;
      if (j == wrap) right.at -= Config::TENSOR_BYTES;
    }
    return more;
  }

  // The gradient of a step's queries in a pair of columns.
  FASTNA_DEVICE void queries(int step, int slot, int map, int pair, Sums& sums) const {
    const int g = lane_index() >> 2;
    const float scale2 = args.scale_log2;
    const StripSweep* sweep = sweeps(pair, 0);
    const RingStep& table = steps()[step];
    const Rows rows = {slot, table.keys.begin, table.keys.rows, table.rows[g].x};

    Queries of;
    const u32 left = left_address(slot, sweep->upper, sweep->lower);
    load_left(of.query, left, RING_QUERY);
    load_left(of.grad, left, RING_GRAD_OUTPUT);
    const uint4* statistics = shared.statistics + ring_row(slot, g + Config::ABOVE) * COLUMNS;
    const float2 of0 = RingStatistics::sum(statistics[sweep->upper]), of1 = RingStatistics::sum(statistics[sweep->lower]);
    of.lse0 = -of0.x * scale2, of.lse1 = -of1.x * scale2;
    of.minus_delta = {of0.y, of0.y, of1.y, of1.y};
    of.has_outer = BiasGradient::PRODUCTS > 1 && any_in_warp((rows.reach & OUTER) != 0);

    float dq[Products::D_TILES][4] = {};
    if constexpr (Config::INNER_SWEEPS == 2) {
      if (sweep_keys<false>(dq, of, sweep, rows, sums.first)) sweep_keys<Config::FOLDS>(dq, of, sweep + 1, rows, sums.second);
    } else {
#pragma unroll 1
      for (bool more = true; more; ++sweep) more = sweep_keys<false>(dq, of, sweep, rows, sums.first);
    }
    Products::store(dq, args.geometry.scale, static_cast<T*>(args.grad_query), targets(step, map, 2 * pair, 2 * pair + 1));
  }

  // What 16 keys need all along.
  struct Keys {
    u32 key[K_STEPS][4], value[K_STEPS][4];
    u32 lse_ones, delta_ones;
  };
  // dk, dv += what comes of the queries of a sweep. Returns StripSweep::more.
  template <bool FOLD>
  FASTNA_DEVICE int sweep_queries(float (&dk)[Products::D_TILES][4], float (&dv)[Products::D_TILES][4], const Keys& of, const StripSweep* sweep,
                                  Rows rows) const {
    const int g = lane_index() >> 2, q = lane_index() & 3;
    const float scale2 = args.scale_log2;
    const Token<FOLD> own(2 * q), named(lane_index() & 7);
    if constexpr (FOLD) rows = rows.folded(own.row);
    constexpr int LAST = FOLD ? 3 : 7;  // columns count backwards
    const int stored = sweep->stored, local_low = stored + LAST - own.column;
    const uint2 columns = sweep->masks[q];
    const int more = sweep->more;
    const int row = ring_row(rows.slot, rows.begin + named.row), wrap = rows_to_wrap(rows.slot, rows.begin + named.row);
    u32 statistics = shared_address(shared.statistics + (row + (lane_index() >> 3 & 1)) * COLUMNS + stored + LAST - named.column);
    Right right(shared_address(shared.ring), row, stored + (LAST - named.column));
    const float4* initial = bias(g - (rows.begin + own.row - Config::ABOVE), sweep->lower + 1 - local_low);
    u32 visible = rows.reach;

#pragma unroll 1
    for (int i = 0; i < rows.count;) {
      const u32 plain = swizzled(right.at), transposed = swizzled(right.at + Right::to_transposed());
      float s[2][4] = {}, dp[2][4] = {};
      u32 p[4], ds[4];
      if constexpr (Config::HAS_RPB) {
        FASTNA_UNROLL
        for (int n = 0; n < 2; ++n) start_from(s[n], initial[-n * Config::BIAS_LINE]);
      }
      u32 parts[2];
      load_matrix_x2(parts, statistics);
      FASTNA_UNROLL
      for (int n = 0; n < 2; ++n) {
        mma_m16n8k8_bf16(s[n], of.lse_ones, of.lse_ones, parts[n]);
        mma_m16n8k8_bf16(dp[n], of.delta_ones, of.delta_ones, parts[n]);
      }
      multiply_transposed(s, of.key, plain, RING_QUERY);
      multiply_transposed(dp, of.value, plain, RING_GRAD_OUTPUT);
      FASTNA_UNROLL
      for (int n = 0; n < 2; ++n) {
        const float p0 = exp2_approx(s[n][0] * scale2), p1 = exp2_approx(s[n][1] * scale2);
        const float p2 = exp2_approx(s[n][2] * scale2), p3 = exp2_approx(s[n][3] * scale2);
        const u32 in_reach = row_mask(visible, n);
        p[2 * n] = pack2<T>(p0, p1) & columns.x & in_reach;
        p[2 * n + 1] = pack2<T>(p2, p3) & columns.y & in_reach;
        ds[2 * n] = pack2<T>(p0 * dp[n][0], p1 * dp[n][1]) & columns.x & in_reach;
        ds[2 * n + 1] = pack2<T>(p2 * dp[n][2], p3 * dp[n][3]) & columns.y & in_reach;
      }
      multiply(dk, ds, transposed, RING_QUERY);
      multiply(dv, p, transposed, RING_GRAD_OUTPUT);
      i += 2, visible <<= 2, initial -= 2 * Config::BIAS_LINE, statistics += 2 * COLUMNS * 16, right.at += 2 * Config::ROW_BYTES;
      if (i == wrap) right.at -= Config::TENSOR_BYTES, statistics -= Config::ROWS * COLUMNS * 16;
    }
    return more;
  }

  // The gradients of a step's keys and values in a pair of columns, its second first. Near a border more query columns may reach them than the
  // pair itself sees as queries.
  FASTNA_DEVICE void keys(int step, int slot, int map, int pair) const {
    const StripSweep* sweep = sweeps(pair, 1);
    const RingStep& table = steps()[step];
    const Rows rows = {slot, table.queries.begin, table.queries.rows, table.rows[lane_index() >> 2].y};

    Keys of;
    of.lse_ones = RingStatistics::lse_ones(), of.delta_ones = RingStatistics::delta_ones();
    const u32 left = left_address(slot, sweep->upper, sweep->lower);
    load_left(of.key, left, RING_KEY);
    load_left(of.value, left, RING_VALUE);

    float dk[Products::D_TILES][4] = {}, dv[Products::D_TILES][4] = {};
    int more;
#pragma unroll 1
    do more = sweep_queries<false>(dk, dv, of, sweep++, rows);
    while (Config::FOLDS ? more == 1 : more != 0);
    if constexpr (Config::FOLDS) {
      if (more == FOLDED) sweep_queries<true>(dk, dv, of, sweep, rows);
    }
    const StripTargets to = targets(step, map, 2 * pair + 1, 2 * pair);
    Products::store(dk, args.geometry.scale, static_cast<T*>(args.grad_key), to);
    Products::store(dv, 1.0f, static_cast<T*>(args.grad_value), to);
  }

  // Of gradients: `spread` times as far apart as tokens of an output.
  FASTNA_DEVICE StripTargets targets(int step, int map, int upper, int lower) const {
    const int lane = lane_index(), row = step * TILE_SIDE - args.lift + (lane >> 2), in_token = (lane & 1) * 8 + (lane & 2) * 2;
    const bool exists = static_cast<u32>(row) < static_cast<u32>(rows());
    const u32 first = (token_index(map, row, 0) - head) * args.spread + head, next = column_step() * args.spread;
    return {{static_cast<i64>(first + upper * next) * D + in_token, static_cast<i64>(first + lower * next) * D + in_token},
            {exists && upper < columns(), exists && lower < columns()}};
  }
};

template <class Config>
FASTNA_DEVICE void hopper_ring_backward(const HopperRingBackwardArguments& args) {
  using Kernel = HopperRingBackward<Config>;
  auto& shared = *dynamic_shared<typename Kernel::Shared>();
  if (thread_index() == 0) {
    for (int s = 0; s < Config::SLOTS; ++s) {
      barrier_init(shared.full[s], 1);
      barrier_init(shared.ready[s], Config::MEASURERS);  // one arrival per warp, here and below
      barrier_init(shared.empty[s], Config::WARPS);
    }
    barrier_init_done();
  }
  sync_threads();
  const int warp = warp_index();
  if (warp < 4) {
    shrink_registers<Config::PRODUCER_REGISTERS>();
    if (warp == 0) Kernel(args, shared).produce();
    else Kernel(args, shared).measure(warp_index() - 1);
  } else {
    grow_registers<Config::CONSUMER_REGISTERS>();
    Kernel(args, shared).consume(warp_index() - 4);
  }
}

}  // namespace fastna
