// Gradients of small-window neighborhood attention on 2-D maps on Hopper (sm_90a): the products of strip_backward.cuh behind tensor copies.
//
// One thread streams row blocks of 8 rows (key, value, query, grad_output) through rings; three warps follow it and work out what turns scores
// into their gradients; the others take 8 rows x 2 columns of queries, or of keys, at a time. Blocks stay on their SM and walk down strips of
// maps of one head; a warp waits for nobody but the copies. Nothing is summed across warps but the bias gradient, in a fixed order.
//
// Row block i holds rows 8 i - ABOVE - lift .. 8 i - ABOVE - lift + 7. Step s takes the queries and the keys of rows 8 s - lift .. 8 s - lift + 7:
// all that they see, and all that see them, lies in row blocks s and s + 1. kernels/cuda/hopper_ring_backward.py finds the lift.
// Of each tensor all slots are one ring of rows, [row][column][channel], with an odd number of columns: then 8 columns of a row, and 8 rows of
// a column, touch every bank once.
#pragma once

#include "fastna/hopper_strip.cuh"
#include "fastna/small_products.cuh"
#include "src/strip_backward.cuh"

namespace fastna {

struct HopperRingBackwardArguments {
  TensorMap query, key, value, grad_output;  // boxes of 8 rows, column by column
  const void* output;                        // this and all below contiguous
  void *grad_query, *grad_key, *grad_value;
  const float *lse, *grad_lse;  // the second may be null
  const void* rpb;
  float* grad_rpb;  // [blocks of a head, heads, 2 k_rows - 1, 2 k_columns - 1]: a part per block
  Geometry geometry;
  StripWalks walks;
  int lift;
  float scale_log2;  // scale * log2(e)
};

// STRIP: columns of a strip, even; COLUMNS: of a row block. WARPS: that multiply.
template <class T_, class Rpb_, bool HAS_RPB_, bool RPB_GRADIENT_, int HEAD_DIM_, int WINDOW_ROWS_, int WINDOW_COLUMNS_, int STRIP_, int COLUMNS_,
          int SLOTS_, int WARPS_>
struct HopperRingBackwardConfig {
  using T = T_;
  using Rpb = Rpb_;
  static constexpr bool HAS_RPB = HAS_RPB_, RPB_GRADIENT = RPB_GRADIENT_;
  static constexpr int HEAD_DIM = HEAD_DIM_, WINDOW_ROWS = WINDOW_ROWS_, WINDOW_COLUMNS = WINDOW_COLUMNS_;
  static constexpr int STRIP = STRIP_, COLUMNS = COLUMNS_, SLOTS = SLOTS_, WARPS = WARPS_;
  // All warpgroups together have no more than they began with: 128, 168 or 96 each.
  static_assert(WARPS == 12 || WARPS == 8 || WARPS == 16, "");
  static constexpr int PRODUCER_REGISTERS = WARPS == 12 ? 80 : WARPS == 8 ? 72 : 64;
  static constexpr int CONSUMER_REGISTERS = WARPS == 12 ? 144 : WARPS == 8 ? 216 : 104;
  static constexpr int MEASURERS = 3;  // warps
  static constexpr int ABOVE = WINDOW_ROWS / 2;
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
  static_assert(!RPB_GRADIENT || 2 * WINDOW_ROWS - 1 <= 16, "the bias gradient sums its row offsets in one matrix product");
};

// Of a step: rows in reach, counted from its first row block's first.
struct alignas(16) RingStep {
  struct Sweep {
    int begin, rows;  // both even
  };
  uint2 rows[8];  // of keys that a query of this row sees, of queries that see a key; the highest bit is the sweep's first row
  Sweep keys, queries;
};
static_assert(sizeof(RingStep) == 80 && sizeof(StripSweep) == 48, "the host counts as many bytes");

template <class Config>
struct HopperRingBackward {
  using T = typename Config::T;
  using Products = StripProducts<Config>;
  using BiasGradient = StripBiasGradient<Config>;
  using RowAxis = SlidingAxis<Config::WINDOW_ROWS>;
  using ColumnAxis = SlidingAxis<Config::WINDOW_COLUMNS>;
  using Position = RingPosition<Config::SLOTS>;
  static constexpr int D = Config::HEAD_DIM, TOKEN = Config::TOKEN, COLUMNS = Config::COLUMNS, WARPS = Config::WARPS, K_STEPS = Config::K_STEPS;
  static constexpr int THREADS = WARPS * WARP;  // that multiply
  static constexpr int CONSUMERS = 1;           // a named barrier
  enum Ring : int { KEYS, VALUES, QUERIES, GRADS, RINGS };

  struct Shared {
    u8 ring[RINGS][Config::SLOTS][Config::BLOCK_BYTES];
    uint4 statistics[Config::ROWS * COLUMNS];  // of a token, see Statistics
    float4 bias[Config::HAS_RPB ? Config::BIAS_LINES * Config::BIAS_LINE : 1];
    float bias_gradient[Config::RPB_GRADIENT ? round_up(WARPS * Config::OFFSETS, 4) : 4];
    MemoryBarrier full[Config::SLOTS], ready[Config::SLOTS], empty[Config::SLOTS];
    // Behind: StripSweep [pairs of columns of the map][queries, keys][SWEEPS], RingStep [steps]
  };

  // 8 numbers bf16: what is added to a score, -lse / scale, in three parts, as many of -delta = grad_lse - sum(grad_output * output), and zeros. So
  // a product with ones adds either where the columns of scores are queries.
  struct Statistics {
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

  const HopperRingBackwardArguments& args;
  Shared& shared;
  int head, member;

  FASTNA_DEVICE HopperRingBackward(const HopperRingBackwardArguments& args_, Shared& shared_) : args(args_), shared(shared_) {
    u32 block = block_index();
    keep(block);
    head = block % args.geometry.heads, member = block / args.geometry.heads;
  }

  FASTNA_DEVICE int rows() const { return args.geometry.axis[1].length; }
  FASTNA_DEVICE int columns() const { return args.geometry.axis[2].length; }
  FASTNA_DEVICE StripSweep* sweeps(int pair, int phase) const { return reinterpret_cast<StripSweep*>(&shared + 1) + (pair * 2 + phase) * SWEEPS; }
  FASTNA_DEVICE RingStep* steps() const { return reinterpret_cast<RingStep*>(sweeps(ceil_div(columns(), 2), 0)); }
  FASTNA_DEVICE u32 token_index(int batch, int row, int column) const { return ((batch * rows() + row) * columns() + column) * args.geometry.heads + head; }

  // First column of a strip's row blocks.
  FASTNA_DEVICE int origin(int first_column) const {
    return minimum(window_at(ColumnAxis{}, first_column, columns()).begin, queries_at(ColumnAxis{}, first_column, columns()).begin);
  }
  // Of a token's chunk: its place by the address that it would have without swizzle.
  FASTNA_DEVICE static u32 swizzled(u32 address) { return address ^ (address >> 3 & (TOKEN - 16)); }

  // ---- What brings row blocks

  // A warp, of which one thread copies.
  FASTNA_DEVICE void produce() const {
    Position at;
    StripWalk walk(args.walks, member);
    if (lane_index() != 0) return;
    for (; walk.exists(args.walks); walk.advance(args.walks)) {
      const int column = origin(walk.strip * Config::STRIP);
      for (int block = 0; block <= args.walks.steps; ++block, at.advance()) {
        const int row = block * TILE_SIDE - Config::ABOVE - args.lift;
        MemoryBarrier& full = shared.full[at.slot];
        barrier_wait(shared.empty[at.slot], at.parity ^ 1);
        barrier_expect(full, RINGS * Config::BLOCK_BYTES);
        copy_box(shared.ring[GRADS][at.slot], args.grad_output, full, head * D, column, row, 0, walk.entry);
        copy_box(shared.ring[QUERIES][at.slot], args.query, full, head * D, column, row, 0, walk.entry);
        copy_box(shared.ring[KEYS][at.slot], args.key, full, head * D, column, row, 0, walk.entry);
        copy_box(shared.ring[VALUES][at.slot], args.value, full, head * D, column, row, 0, walk.entry);
      }
    }
  }

  // MEASURERS warps: the statistics of every row block. A lane takes a chunk of a token.
  FASTNA_DEVICE void measure(int warp) const {
    constexpr int BATCH = D == 32 && COLUMNS > 16 && WARPS < 16 ? 6 : 4, ROUND = WARP / Config::CHUNKS, STRIDE = Config::MEASURERS * ROUND;
    const int chunk = lane_index() % Config::CHUNKS, first = warp * ROUND + lane_index() / Config::CHUNKS;
    const T* const output = static_cast<const T*>(args.output) + chunk * 8;
    const float minus_inverse_scale = -1.0f / args.geometry.scale;
    Position at;
    for (StripWalk walk(args.walks, member); walk.exists(args.walks); walk.advance(args.walks)) {
      const int first_column = origin(walk.strip * Config::STRIP);
      for (int block = 0; block <= args.walks.steps; ++block, at.advance()) {
        const int first_row = block * TILE_SIDE - Config::ABOVE - args.lift;
#pragma unroll 1
        for (int base = 0; base < Config::TOKENS; base += BATCH * STRIDE) {
          uint4 values[BATCH];
          float lse[BATCH], less[BATCH];
          FASTNA_UNROLL
          for (int n = 0; n < BATCH; ++n) {
            const int token = base + n * STRIDE + first, row = first_row + token / COLUMNS, column = first_column + token % COLUMNS;
            values[n] = {0, 0, 0, 0};
            lse[n] = less[n] = 0.0f;
            if (token < Config::TOKENS && static_cast<u32>(row) < static_cast<u32>(rows()) && column < columns()) {
              const u32 index = token_index(walk.entry, row, column);
              values[n] = load_readonly(reinterpret_cast<const uint4*>(output + static_cast<u64>(index) * D));
              lse[n] = load_readonly(args.lse + index);
              if (args.grad_lse != nullptr) less[n] = load_readonly(args.grad_lse + index);
            }
          }
          if (base == 0) barrier_wait(shared.full[at.slot], at.parity);
          FASTNA_UNROLL
          for (int n = 0; n < BATCH; ++n) {
            const int token = base + n * STRIDE + first;
            float delta = 0.0f;
            if (token < Config::TOKENS) {
              const u32 place = (GRADS * Config::SLOTS + at.slot) * Config::BLOCK_BYTES + token * TOKEN + chunk * 16;
              const uint4 grad = *reinterpret_cast<const uint4*>(shared.ring[0][0] + swizzled(place));
              delta = add_dot(values[n].x, grad.x, add_dot(values[n].y, grad.y, 0.0f));
              delta = add_dot(values[n].z, grad.z, add_dot(values[n].w, grad.w, delta));
            }
            FASTNA_UNROLL
            for (int distance = 1; distance < Config::CHUNKS; distance *= 2) delta += shuffle_xor(delta, distance);
            less[n] -= delta;
          }
          // Of a token's lanes each writes another one's.
          FASTNA_UNROLL
          for (int n = 0; n < BATCH; n += Config::CHUNKS) {
            float own_lse = lse[n], own_delta = less[n];
            FASTNA_UNROLL
            for (int i = 1; i < minimum(Config::CHUNKS, BATCH - n); ++i) {
              if (chunk == i) own_lse = lse[n + i], own_delta = less[n + i];
            }
            const int token = base + (n + chunk) * STRIDE + first;
            if (n + chunk < BATCH && token < Config::TOKENS) {
              shared.statistics[at.slot * Config::TOKENS + token] = Statistics::of(own_lse * minus_inverse_scale, own_delta);
            }
          }
        }
        release(shared.ready[at.slot]);
      }
    }
  }
  FASTNA_DEVICE static float add_dot(u32 a, u32 b, float sum) {
    const float2 x = unpack2<T>(a), y = unpack2<T>(b);
    return x.x * y.x + (x.y * y.y + sum);
  }

  // ---- What multiplies

  // The warp is done with what the barrier guards.
  FASTNA_DEVICE static void release(MemoryBarrier& barrier) {
    sync_warp();
    if (lane_index() == 0) barrier_arrive(barrier);
  }
  FASTNA_DEVICE void wait(const Position& at) const {
    barrier_wait(shared.full[at.slot], at.parity);
    barrier_wait(shared.ready[at.slot], at.parity);
  }

  FASTNA_DEVICE void consume(int warp) const {
    prepare(warp * WARP + lane_index());
    named_barrier(CONSUMERS, THREADS);
    BiasGradient bias_gradient(shared.bias_gradient + warp * Config::OFFSETS);
    Position at;
    int item = warp;
#pragma unroll 1
    for (StripWalk walk(args.walks, member); walk.exists(args.walks); walk.advance(args.walks)) {
      const int first_pair = walk.strip * (Config::STRIP / 2);
      const int pairs = minimum(Config::STRIP / 2, ceil_div(columns(), 2) - first_pair);
      wait(at);
#pragma unroll 1
      for (int step = 0; step < args.walks.steps; ++step) {
        const int slot = at.slot;
        at.advance();
        wait(at);
#pragma unroll 1
        for (; item < pairs; item += WARPS) queries(step, slot, walk.entry, first_pair + item, bias_gradient);
#pragma unroll 1
        for (; item < 2 * pairs; item += WARPS) keys(step, slot, walk.entry, first_pair + item - pairs);
        item -= 2 * pairs;  // the next step goes on with the warp after the last that was busy
        release(shared.empty[slot]);
      }
      release(shared.empty[at.slot]);
      at.advance();
    }
    if constexpr (Config::RPB_GRADIENT) {
      bias_gradient.flush();
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
  // 8 tokens of each of two rows as right operands, see StripProducts::Right. In ring 0.
  struct Right {
    u32 at;  // `plain` before the swizzle

    FASTNA_DEVICE Right(u32 start, int row, int column, bool backwards) {
      const int lane = lane_index();
      at = start + (row + (lane >> 4)) * Config::ROW_BYTES + (column + (backwards ? 7 - (lane & 7) : lane & 7)) * TOKEN + (lane >> 3 & 1) * 16;
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
  FASTNA_DEVICE static int rows_to_wrap(int slot, int begin) { return slot == Config::SLOTS - 1 ? TILE_SIDE - begin : 0; }
  FASTNA_DEVICE static void start_from(float (&s)[4], float4 initial) { s[0] = initial.x, s[1] = initial.y, s[2] = initial.z, s[3] = initial.w; }

  // The gradient of a step's queries in a pair of columns.
  FASTNA_DEVICE void queries(int step, int slot, int batch, int pair, BiasGradient& bias_gradient) const {
    const int g = lane_index() >> 2, q = lane_index() & 3;
    const float scale2 = args.scale_log2;
    const StripSweep* sweep = sweeps(pair, 0);
    const RingStep& table = steps()[step];
    const RingStep::Sweep key_rows = table.keys;
    const u32 row_bits = table.rows[g].x;
    const int wrap = rows_to_wrap(slot, key_rows.begin);

    u32 query[K_STEPS][4], grad[K_STEPS][4];
    const u32 left = left_address(slot, sweep->upper, sweep->lower);
    load_left(query, left, QUERIES);
    load_left(grad, left, GRADS);
    const uint4* statistics = shared.statistics + ring_row(slot, g + Config::ABOVE) * COLUMNS;
    const float2 of0 = Statistics::sum(statistics[sweep->upper]), of1 = Statistics::sum(statistics[sweep->lower]);
    const float lse0 = -of0.x * scale2, lse1 = -of1.x * scale2;
    const float4 minus_delta = {of0.y, of0.y, of1.y, of1.y};

    float dq[Products::D_TILES][4] = {};
#pragma unroll 1
    for (bool more = true; more; ++sweep) {
      const int stored = sweep->stored, distance = stored - sweep->upper;
      const uint2 columns = sweep->masks[q];
      more = sweep->more != 0;
      Right right(shared_address(shared.ring), ring_row(slot, key_rows.begin), stored, false);
      const int offset = key_rows.begin - Config::ABOVE;
      const float4* initial = bias(offset - g, distance + 2 * q);
      if constexpr (Config::RPB_GRADIENT) bias_gradient.begin(offset + Config::WINDOW_ROWS - 1, distance);
      u32 visible = row_bits;

#pragma unroll 1
      for (int j = 0; j < key_rows.rows;) {
        const u32 plain = swizzled(right.at), transposed = swizzled(right.at + Right::to_transposed());
        float s[2][4] = {}, dp[2][4];
        u32 ds[4];
        FASTNA_UNROLL
        for (int n = 0; n < 2; ++n) {
          if constexpr (Config::HAS_RPB) start_from(s[n], initial[n * Config::BIAS_LINE]);
          start_from(dp[n], minus_delta);
        }
        multiply_transposed(s, query, plain, KEYS);
        multiply_transposed(dp, grad, plain, VALUES);
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
        multiply(dq, ds, transposed, KEYS);
        j += 2, visible <<= 2, initial += 2 * Config::BIAS_LINE, right.at += 2 * Config::ROW_BYTES;
        if (j == wrap) right.at -= Config::TENSOR_BYTES;
      }
    }
    Products::store(dq, args.geometry.scale, static_cast<T*>(args.grad_query), targets(step, batch, 2 * pair, 2 * pair + 1));
  }

  // The gradients of a step's keys and values in a pair of columns, its second first. Near a border more than 8 query columns may reach them:
  // a second sweep then, over the rest.
  FASTNA_DEVICE void keys(int step, int slot, int batch, int pair) const {
    const int g = lane_index() >> 2, q = lane_index() & 3;
    const u32 lse_ones = Statistics::lse_ones(), delta_ones = Statistics::delta_ones();
    const float scale2 = args.scale_log2;
    const StripSweep* sweep = sweeps(pair, 1);
    const RingStep& table = steps()[step];
    const RingStep::Sweep query_rows = table.queries;
    const u32 row_bits = table.rows[g].y;
    const int wrap = rows_to_wrap(slot, query_rows.begin);

    u32 key[K_STEPS][4], value[K_STEPS][4];
    const u32 left = left_address(slot, sweep->upper, sweep->lower);
    load_left(key, left, KEYS);
    load_left(value, left, VALUES);

    float dk[Products::D_TILES][4] = {}, dv[Products::D_TILES][4] = {};
#pragma unroll 1
    for (bool more = true; more; ++sweep) {
      const int stored = sweep->stored, local_low = stored + 7 - 2 * q;
      const uint2 columns = sweep->masks[q];
      more = sweep->more != 0;
      const int row = ring_row(slot, query_rows.begin);
      u32 statistics = shared_address(shared.statistics + (row + (lane_index() >> 3 & 1)) * COLUMNS + stored + 7 - (lane_index() & 7));
      Right right(shared_address(shared.ring), row, stored, true);
      const float4* initial = bias(g - (query_rows.begin - Config::ABOVE), sweep->lower + 1 - local_low);
      u32 visible = row_bits;

#pragma unroll 1
      for (int i = 0; i < query_rows.rows;) {
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
          mma_m16n8k8_bf16(s[n], lse_ones, lse_ones, parts[n]);
          mma_m16n8k8_bf16(dp[n], delta_ones, delta_ones, parts[n]);
        }
        multiply_transposed(s, key, plain, QUERIES);
        multiply_transposed(dp, value, plain, GRADS);
        FASTNA_UNROLL
        for (int n = 0; n < 2; ++n) {
          const float p0 = exp2_approx(s[n][0] * scale2), p1 = exp2_approx(s[n][1] * scale2);
          const float p2 = exp2_approx(s[n][2] * scale2), p3 = exp2_approx(s[n][3] * scale2);
          const u32 rows = row_mask(visible, n);
          p[2 * n] = pack2<T>(p0, p1) & columns.x & rows;
          p[2 * n + 1] = pack2<T>(p2, p3) & columns.y & rows;
          ds[2 * n] = pack2<T>(p0 * dp[n][0], p1 * dp[n][1]) & columns.x & rows;
          ds[2 * n + 1] = pack2<T>(p2 * dp[n][2], p3 * dp[n][3]) & columns.y & rows;
        }
        multiply(dk, ds, transposed, QUERIES);
        multiply(dv, p, transposed, GRADS);
        i += 2, visible <<= 2, initial -= 2 * Config::BIAS_LINE, statistics += 2 * COLUMNS * 16, right.at += 2 * Config::ROW_BYTES;
        if (i == wrap) right.at -= Config::TENSOR_BYTES, statistics -= Config::ROWS * COLUMNS * 16;
      }
    }
    const StripTargets to = targets(step, batch, 2 * pair + 1, 2 * pair);
    Products::store(dk, args.geometry.scale, static_cast<T*>(args.grad_key), to);
    Products::store(dv, 1.0f, static_cast<T*>(args.grad_value), to);
  }

  FASTNA_DEVICE StripTargets targets(int step, int batch, int upper, int lower) const {
    const int lane = lane_index(), row = step * TILE_SIDE - args.lift + (lane >> 2), in_token = (lane & 1) * 8 + (lane & 2) * 2;
    const bool exists = static_cast<u32>(row) < static_cast<u32>(rows());
    const u32 first = token_index(batch, row, 0), heads = args.geometry.heads;
    return {{static_cast<i64>(first + upper * heads) * D + in_token, static_cast<i64>(first + lower * heads) * D + in_token},
            {exists && upper < columns(), exists && lower < columns()}};
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
      for (int n = 0; n < SWEEPS; ++n) {
        const int begin = first.begin + n * KEY_COLUMNS, end = last.end;
        const int stored = minimum(begin - from, COLUMNS - KEY_COLUMNS);
        const int low = stored + from + (phase == 0 ? 2 * q : 7 - 2 * q), high = phase == 0 ? low + 1 : low - 1;
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
          sweep.more = n + 1 < SWEEPS && begin + KEY_COLUMNS < end;
        }
      }
    }
  }
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
