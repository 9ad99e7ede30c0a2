// Gradients of small-window neighborhood attention on 2-D maps (arXiv 2204.07143, 2209.15001): all of them in one pass over the
// operands, without atomics.
//
// A block walks down a column tile of a map with everything a step needs in shared memory (fastna/strip_backward_ring.cuh). A warp
// takes 16 tokens, 8 rows x 2 columns, as the rows of a matrix product whose columns are 8 tokens of one row, and
//   StripQueries: for 16 queries, over the keys of their windows:      dq = scale ds k,  and the bias gradient
//   StripKeys:    for 16 keys, over the queries whose windows hold them:  dv = p^T do, dk = scale ds^T q
// with p = exp(s - lse) and ds = p (do v^T - delta). Scores are computed twice; nothing is summed across warps but the bias gradient,
// and that in a fixed order.
#pragma once

#include "fastna/strip_backward_ring.cuh"
#include "fastna/strip_bias_gradient.cuh"

namespace fastna {

// What a lane writes of 16 tokens: for the left operand's two columns, elements from a gradient's start, and whether there are any.
struct StripTargets {
  i64 offset[2];
  bool valid[2];
};

template <class Config>
struct StripProducts {
  using T = typename Config::T;
  static constexpr int K_STEPS = Config::K_STEPS;
  static constexpr int D_TILES = Config::CHUNKS;

  // 16 tokens of a ring's first tensor (second: flip SECOND) as left operand: a step's rows of two columns.
  FASTNA_DEVICE static u32 left_address(u32 ring, const StripStep& step, int upper, int lower) {
    const int lane = lane_index();
    const int at = (lane & 8) == 0 ? upper : lower;
    return (step.rows[lane & 7].left + ring + at * Config::TOKEN) ^ (((lane >> 4) ^ (at & 7)) << 4);
  }
  FASTNA_DEVICE static void load_left(u32 (&a)[K_STEPS][4], u32 address) {
    FASTNA_UNROLL
    for (int k = 0; k < K_STEPS; ++k) load_matrix_x4(a[k], address ^ (k << 5));
  }

  // 8 tokens of each of two rows as right operands, in order of columns or against it. A lane names one token to ldmatrix, in an order that
  // leaves the two registers that a product wants side by side: `plain` for left right^T, `transposed` for p right.
  struct Right {
    u32 base, plain_swizzle, transposed_swizzle;
    const uint2 *plain_place, *transposed_place;

    FASTNA_DEVICE Right(u32 ring, int column, bool backwards, const uint2* places) {
      const int lane = lane_index(), at = column + (backwards ? 7 - (lane & 7) : lane & 7);
      const int low = (lane >> 3) & 1, high = lane >> 4;
      base = ring + at * Config::TOKEN;
      plain_swizzle = (low ^ (at & 7)) << 4;
      transposed_swizzle = (high ^ (at & 7)) << 4;
      plain_place = places + high;
      transposed_place = places + low;
    }
    FASTNA_DEVICE u32 plain() const { return (base + plain_place->x) ^ plain_swizzle; }
    FASTNA_DEVICE u32 transposed() const { return (base + transposed_place->x) ^ transposed_swizzle; }
    FASTNA_DEVICE void next_rows() { plain_place += 2, transposed_place += 2; }
  };

  // d[n] += left right[n]^T for both rows
  FASTNA_DEVICE static void multiply_transposed(float (&d)[2][4], const u32 (&a)[K_STEPS][4], u32 plain) {
    FASTNA_UNROLL
    for (int k = 0; k < K_STEPS; ++k) {
      u32 b[4];
      load_matrix_x4(b, plain ^ (k << 5));
      mma_m16n8k16<T>(d[0], a[k], b[0], b[1]);
      mma_m16n8k16<T>(d[1], a[k], b[2], b[3]);
    }
  }
  // d += p right, over the tokens of two rows
  FASTNA_DEVICE static void multiply(float (&d)[D_TILES][4], const u32 (&p)[4], u32 transposed) {
    FASTNA_UNROLL
    for (int c = 0; c < D_TILES; c += 2) {
      u32 b[4];
      load_matrix_x4_transposed(b, transposed ^ (c << 4));
      mma_m16n8k16<T>(d[c], p, b[0], b[1]);
      mma_m16n8k16<T>(d[c + 1], p, b[2], b[3]);
    }
  }

  // Writes 16 tokens times `factor`, its part in the token of either column.
  // Neighbouring lanes trade halves of two chunks, so that a store fills whole 32-byte sectors.
  FASTNA_DEVICE static void store(const float (&d)[D_TILES][4], float factor, T* tensor, const StripTargets& targets) {
    const bool odd = (lane_index() & 1) != 0;
    FASTNA_UNROLL
    for (int h = 0; h < 2; ++h) {
      T* target = tensor + targets.offset[h];
      FASTNA_UNROLL
      for (int c = 0; c < D_TILES; c += 2) {
        const u32 even_chunk = pack2<T>(d[c][2 * h] * factor, d[c][2 * h + 1] * factor);
        const u32 odd_chunk = pack2<T>(d[c + 1][2 * h] * factor, d[c + 1][2 * h + 1] * factor);
        const u32 received = shuffle_xor(odd ? even_chunk : odd_chunk, 1);
        const uint2 half = odd ? uint2{received, odd_chunk} : uint2{even_chunk, received};
        if (targets.valid[h]) *reinterpret_cast<uint2*>(target + c * 8) = half;
      }
    }
  }
};

template <class Config>
struct StripBackward {
  using T = typename Config::T;
  using Products = StripProducts<Config>;
  using Walk = StripBackwardWalk<Config>;

  const StripBackwardArguments& args;
  const Walk& walk;
  const StripBackwardMemory<Config>& memory;

  // All ones if row `n` of those that `rows` begins with is in reach.
  FASTNA_DEVICE static u32 row_mask(u32 rows, int n) { return static_cast<u32>(static_cast<int>(rows << n) >> 31); }
  // The lane's entry of the bias for the offsets (key - query) of its first right row and column.
  FASTNA_DEVICE const float4* bias(int row_offset, int column_offset) const {
    const int line = row_offset + Config::WINDOW_ROWS - 1 + Config::BIAS_LINES_BEFORE;
    const int entry = minimum(maximum(column_offset + Config::WINDOW_COLUMNS, 0), Config::BIAS_LINE - 1);
    return memory.bias() + line * Config::BIAS_LINE + entry;
  }
  FASTNA_DEVICE static const float2* at_row(const float2* statistics, u32 row_place) {
    return reinterpret_cast<const float2*>(reinterpret_cast<const u8*>(statistics) + static_cast<int>(row_place));
  }

  // The gradient of the queries of the step's rows `own` in a pair of columns.
  FASTNA_DEVICE void queries(const StripStep& step, Interval own, int pair, StripBiasGradient<Config>& bias_gradient) const {
    const int g = lane_index() >> 2, q = lane_index() & 3;
    const float scale2 = args.scale_log2;
    const StripSweep* sweep = memory.sweeps(pair, 0);
    const StripStep::Row row = step.rows[g];
    const StripStep::Sweep key_rows = step.keys;

    u32 query[Config::K_STEPS][4], grad[Config::K_STEPS][4];
    const u32 left = Products::left_address(memory.ring(1), step, sweep->upper, sweep->lower);
    Products::load_left(query, left);
    Products::load_left(grad, left ^ Config::SECOND);
    const float2* statistics = at_row(memory.statistics(), row.statistics);
    const float2 of0 = statistics[sweep->upper], of1 = statistics[sweep->lower];
    const float lse0 = of0.x, lse1 = of1.x;
    const float4 minus_delta = {-of0.y, -of0.y, -of1.y, -of1.y};

    float dq[Products::D_TILES][4] = {};
    for (bool more = true; more; ++sweep) {
      const int stored = sweep->stored, distance = stored - sweep->upper;
      const uint2 columns = sweep->masks[q];
      more = sweep->more != 0;
      typename Products::Right right(memory.ring(0), stored, false, memory.row_places() + key_rows.place);
      const float4* initial = bias(key_rows.offset - g, distance + 2 * q);
      if constexpr (Config::RPB_GRADIENT) bias_gradient.begin(key_rows.offset + Config::WINDOW_ROWS - 1, distance);
      u32 visible = row.keys;

#pragma unroll 1
      for (int j = 0; j < key_rows.rows; j += 2, visible <<= 2, initial += 2 * Config::BIAS_LINE, right.next_rows()) {
        const u32 plain = right.plain();
        float s[2][4] = {}, dp[2][4];
        u32 ds[4];
        FASTNA_UNROLL
        for (int n = 0; n < 2; ++n) {
          if constexpr (Config::HAS_RPB) start_from(s[n], initial[n * Config::BIAS_LINE]);
          start_from(dp[n], minus_delta);
        }
        Products::multiply_transposed(s, query, plain);
        Products::multiply_transposed(dp, grad, plain ^ Config::SECOND);
        FASTNA_UNROLL
        for (int n = 0; n < 2; ++n) {
          const u32 rows = row_mask(visible, n);
          // Masked as bits: a score outside the window may overflow, and infinity times anything is not zero.
          ds[2 * n] = pack2<T>(exp2_approx(s[n][0] * scale2 - lse0) * dp[n][0], exp2_approx(s[n][1] * scale2 - lse0) * dp[n][1]) &
                      columns.x & rows;
          ds[2 * n + 1] = pack2<T>(exp2_approx(s[n][2] * scale2 - lse1) * dp[n][2], exp2_approx(s[n][3] * scale2 - lse1) * dp[n][3]) &
                          columns.y & rows;
        }
        if constexpr (Config::RPB_GRADIENT) bias_gradient.add(ds, j);
        Products::multiply(dq, ds, right.transposed());
      }
    }
    const int column = walk.columns.begin + pair * QUERY_COLUMNS;
    Products::store(dq, args.geometry.scale, gradient(GRAD_QUERY), targets(own, column, column + 1));
  }

  // The gradients of the keys and values of the step's rows `own` in a pair of columns, its second first. Near a border more than 8
  // query columns may reach them: a second sweep then, over the rest.
  FASTNA_DEVICE void keys(const StripStep& step, Interval own, int pair) const {
    const int g = lane_index() >> 2, q = lane_index() & 3;
    const float scale2 = args.scale_log2;
    const StripSweep* sweep = memory.sweeps(pair, 1);
    const StripStep::Sweep query_rows = step.queries;

    u32 key[Config::K_STEPS][4], value[Config::K_STEPS][4];
    const u32 left = Products::left_address(memory.ring(0), step, sweep->upper, sweep->lower);
    Products::load_left(key, left);
    Products::load_left(value, left ^ Config::SECOND);

    float dk[Products::D_TILES][4] = {}, dv[Products::D_TILES][4] = {};
    for (bool more = true; more; ++sweep) {
      const int stored = sweep->stored, local_low = stored + 7 - 2 * q;
      const uint2 columns = sweep->masks[q];
      more = sweep->more != 0;
      const uint2* place = memory.row_places() + query_rows.place;
      const float2* low = memory.statistics() + local_low;
      typename Products::Right right(memory.ring(1), stored, true, place);
      const float4* initial = bias(g - query_rows.offset, sweep->lower + 1 - local_low);
      u32 visible = step.rows[g].queries;

#pragma unroll 1
      for (int i = 0; i < query_rows.rows; i += 2, visible <<= 2, initial -= 2 * Config::BIAS_LINE, place += 2, right.next_rows()) {
        const u32 plain = right.plain();
        float s[2][4] = {}, dp[2][4] = {};
        u32 p[4], ds[4];
        if constexpr (Config::HAS_RPB) {
          FASTNA_UNROLL
          for (int n = 0; n < 2; ++n) start_from(s[n], initial[-n * Config::BIAS_LINE]);
        }
        Products::multiply_transposed(s, key, plain);
        Products::multiply_transposed(dp, value, plain ^ Config::SECOND);
        FASTNA_UNROLL
        for (int n = 0; n < 2; ++n) {
          const float2 of0 = *at_row(low, place[n].y), of1 = *at_row(low - 1, place[n].y);
          const float p0 = exp2_approx(s[n][0] * scale2 - of0.x), p1 = exp2_approx(s[n][1] * scale2 - of1.x);
          const float p2 = exp2_approx(s[n][2] * scale2 - of0.x), p3 = exp2_approx(s[n][3] * scale2 - of1.x);
          const u32 rows = row_mask(visible, n);
          p[2 * n] = pack2<T>(p0, p1) & columns.x & rows;
          p[2 * n + 1] = pack2<T>(p2, p3) & columns.y & rows;
          ds[2 * n] = pack2<T>(p0 * (dp[n][0] - of0.y), p1 * (dp[n][1] - of1.y)) & columns.x & rows;
          ds[2 * n + 1] = pack2<T>(p2 * (dp[n][2] - of0.y), p3 * (dp[n][3] - of1.y)) & columns.y & rows;
        }
        const u32 transposed = right.transposed();
        Products::multiply(dk, ds, transposed);
        Products::multiply(dv, p, transposed ^ Config::SECOND);
      }
    }
    const int column = walk.columns.begin + pair * QUERY_COLUMNS;
    const StripTargets to = targets(own, column + 1, column);
    Products::store(dk, args.geometry.scale, gradient(GRAD_KEY), to);
    Products::store(dv, 1.0f, gradient(GRAD_VALUE), to);
  }

  FASTNA_DEVICE T* gradient(StripTensor tensor) const { return static_cast<T*>(args.tensors[tensor].data); }
  FASTNA_DEVICE StripTargets targets(Interval own, int upper, int lower) const {
    const StripGradientPlace place = *memory.gradient_place();
    const int lane = lane_index(), row = own.begin + (lane >> 2);
    const i64 in_row = place.origin + static_cast<i64>(row) * place.row + (lane & 1) * 8 + (lane & 2) * 2;
    return {{in_row + static_cast<i64>(upper) * place.column, in_row + static_cast<i64>(lower) * place.column},
            {row < own.end && upper < walk.columns.end, row < own.end && lower < walk.columns.end}};
  }

  FASTNA_DEVICE static void start_from(float (&s)[4], float4 initial) {
    s[0] = initial.x, s[1] = initial.y, s[2] = initial.z, s[3] = initial.w;
  }
};

template <class Config>
FASTNA_DEVICE void strip_backward(const StripBackwardArguments& args) {
  constexpr int THREADS = Config::WARPS * WARP;
  using Walk = StripBackwardWalk<Config>;
  const StripBackwardMemory<Config> memory(args);
  const Walk walk_of_thread(args);
  const auto part = [&] { return args.grad_rpb + static_cast<i64>(block_index()) * Config::OFFSETS; };
  if (walk_of_thread.is_empty()) {
    if constexpr (Config::RPB_GRADIENT) {
      for (int i = thread_index(); i < Config::OFFSETS; i += THREADS) part()[i] = 0.0f;
    }
    return;
  }
  // From here on in shared memory: registers are for accumulators.
  if (thread_index() == 0) *memory.template walk<Walk>() = walk_of_thread;
  sync_threads();
  const Walk& walk = *memory.template walk<Walk>();
  const StripBackwardLoader<Config> loader{args, walk, memory};
  const StripBackward<Config> backward{args, walk, memory};

  loader.fill_views();
  loader.fill_row_places();
  loader.fill_sweeps();
  loader.clear_rings();
  if constexpr (Config::HAS_RPB) loader.fill_bias();
  if constexpr (Config::RPB_GRADIENT) {
#pragma unroll 1
    for (int i = thread_index(); i < Config::WARPS * Config::OFFSETS; i += THREADS) memory.bias_gradient()[i] = 0.0f;
  }

  int item = warp_index(), parity = 0;
  // Whether the ring has room for the rows of the step from `row`, one before them (see whole_pairs) and those of the next, which then
  // come in while this one's are used.
  const auto has_room = [&](int row) {
    const Interval next = walk.step(row + args.step_rows, args.step_rows);
    return next.size() > 0 && walk.needed_rows(next).end - walk.needed_rows(walk.step(row, args.step_rows)).begin < args.ring_rows;
  };
  // Only the row and the item stay alive from step to step: the rest is worked out again where it is wanted.
  for (int row = walk.rows.begin; row < walk.rows.end; row += args.step_rows) {
    const Interval own = walk.step(row, args.step_rows);
    const bool is_first = row == walk.rows.begin;
    const int loaded = is_first ? walk.first_row : walk.needed_rows(walk.step(row - args.step_rows, args.step_rows)).end;
    const Interval fresh = {loaded, walk.needed_rows(own).end};
    if (is_first || !has_room(row - args.step_rows)) {
      sync_threads();  // the rows that these replace have been used
      loader.issue(fresh);
    }
    StripStep& step = *memory.step(parity);
    parity ^= 1;
    loader.fill_step(step, own);
    loader.finish(fresh);
    sync_threads();
    if (has_room(row)) loader.issue({fresh.end, walk.needed_rows(walk.step(row + args.step_rows, args.step_rows)).end});

    const int pairs = ceil_div(walk.columns.size(), QUERY_COLUMNS);
    {
      StripBiasGradient<Config> bias_gradient(memory.bias_gradient() + warp_index() * Config::OFFSETS);
      for (; item < pairs; item += Config::WARPS) {
        backward.queries(step, own, item, bias_gradient);
      }
      if constexpr (Config::RPB_GRADIENT) bias_gradient.flush();
    }
    for (; item < 2 * pairs; item += Config::WARPS) backward.keys(step, own, item - pairs);
    item -= 2 * pairs;  // the next step goes on with the warp after the last that was busy
  }

  if constexpr (Config::RPB_GRADIENT) {
    sync_threads();
#pragma unroll 1
    for (int i = thread_index(); i < Config::OFFSETS; i += THREADS) {
      float sum = 0.0f;
      for (int warp = 0; warp < Config::WARPS; ++warp) sum += memory.bias_gradient()[warp * Config::OFFSETS + i];
      part()[i] = sum;
    }
  }
}

}  // namespace fastna
