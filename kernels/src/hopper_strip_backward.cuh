// Gradients of small-window neighborhood attention on 2-D maps (arXiv 2204.07143, 2209.15001) on Hopper, head_dim 64 and no bias: all of them in
// one pass over the operands, without atomics, the same bits every time. See fastna/hopper_strip_backward.cuh for how maps are cut.
//
// One thread brings row blocks of query, key, value and grad_output; three warps work out, of each, what turns a score into its gradient. Then
//   a warpgroup of queries, a tile at a time:  s = q k^T, dp = do v^T, ds = exp(s - lse) (dp - delta),  dq += scale ds k
//   a warpgroup of keys:                       the same with rows and columns exchanged,           dv += p^T do, dk += scale ds^T q
// Scores are computed twice; nothing is exchanged between the two. Left operands come to registers as ldmatrix leaves them: rows of a tile lie in
// two row blocks.
#pragma once

#include "fastna/hopper_strip_backward.cuh"

namespace fastna {

template <class Config>
struct HopperStripBackward {
  using T = typename Config::Element;
  using Shared = HopperStripBackwardShared<Config>;
  using Table = typename Shared::Table;
  using Walk = StripBackwardWalk<Config>;
  using Position = RingPosition<Config::SLOTS>;
  static constexpr int D = Config::HEAD_DIM, N = Config::N, ROW = Config::ROW_BYTES, COLUMN = Config::COLUMN_BYTES, LEFT = Config::LEFT;
  static constexpr int K_STEPS = Config::K_STEPS, PAIRS = Config::ALL_PAIRS, OWN_PAIRS = Config::PAIRS;
  static constexpr int CONSUMERS = 1, MEASURED = 2;  // named barriers
  static constexpr int MEASURERS = 96;               // threads

  using Scores = float[N / 2];
  using Packed = u32[N / 4];
  using Left = u32[K_STEPS][4];
  using Gradient = float[D / 2];

  const HopperStripBackwardArguments& args;
  Shared& shared;
  int head, member, members;  // of the blocks of this head

  FASTNA_DEVICE HopperStripBackward(const HopperStripBackwardArguments& args_, Shared& shared_) : args(args_), shared(shared_) {
    u32 block = block_index(), heads = args.heads;
    keep(block);
    member = static_cast<int>(block / heads), head = static_cast<int>(block - member * heads);
    members = static_cast<int>(block_count() / heads);
  }

  // Of a token and the head in [batch, rows, columns, heads].
  FASTNA_DEVICE i64 index_of(const Walk& walk, int row, int column) const {
    return static_cast<i64>(walk.batch) * (args.rows * args.columns * args.heads) + ((row * args.columns + column) * args.heads + head);
  }

  // ---- What brings row blocks

  // One thread.
  FASTNA_DEVICE void produce() const {
    Position at;
    for (Walk walk(member); walk.find(args); walk.number += members) {
      const int column = walk.first_column(args.columns);
      for (int block = 0; block <= args.steps; ++block, at.advance()) {
        const int row = block * TILE_SIDE - Config::ABOVE - args.lift;
        MemoryBarrier& full = shared.full[at.slot];
        barrier_sleep(shared.empty[at.slot], at.parity ^ 1);
        barrier_expect(full, Config::SLOT_BYTES);
        copy_box(shared.ring[at.slot][STRIP_GRAD_OUTPUT], args.grad_output, full, 0, row, column, head, walk.batch);
        copy_box(shared.ring[at.slot][STRIP_QUERY], args.query, full, 0, row, column, head, walk.batch);
        copy_box(shared.ring[at.slot][STRIP_KEY], args.key, full, 0, row, column, head, walk.batch);
        copy_box(shared.ring[at.slot][STRIP_VALUE], args.value, full, 0, row, column, head, walk.batch);
      }
    }
  }

  // One thread.
  FASTNA_DEVICE void bring_output(const Walk& walk, int block) const {
    barrier_expect(shared.output_full, Config::BLOCK_BYTES);
    copy_box(shared.output, args.output, shared.output_full, 0, block * TILE_SIDE - Config::ABOVE - args.lift, walk.first_column(args.columns), head,
             walk.batch);
  }

  // MEASURERS threads: the statistics of every row block. Delta is the diagonal of a product of 16 tokens' grad_output and output.
  FASTNA_DEVICE void measure() const {
    constexpr int ROUNDS = (Config::TOKENS + MEASURERS - 1) / MEASURERS;
    const int thread = thread_index() - WARP, warp = warp_index() - 1, lane = lane_index(), g = lane >> 2;
    Position at;
    u32 parity = 0;
    for (Walk walk(member); walk.find(args); walk.number += members) {
#pragma unroll 1
      for (int block = 0; block <= args.steps; ++block, at.advance(), parity ^= 1) {
        if (thread == 0) bring_output(walk, block);
        const auto index_of_token = [&](int token) {
          const int row = block * TILE_SIDE - Config::ABOVE - args.lift + token % TILE_SIDE;
          const int column = walk.first_column(args.columns) + token / TILE_SIDE;
          const bool exists = static_cast<u32>(row) < static_cast<u32>(args.rows) && static_cast<u32>(column) < static_cast<u32>(args.columns);
          return exists ? index_of(walk, row, column) : -1;
        };
        float lse[ROUNDS];
        FASTNA_UNROLL
        for (int i = 0; i < ROUNDS; ++i) {
          const i64 index = index_of_token(thread + i * MEASURERS);
          lse[i] = index < 0 ? infinity() : load_readonly(args.lse + index);  // no weight for a query that is none
        }
        float* const delta = shared.delta[at.slot];
        barrier_sleep(shared.full[at.slot], at.parity);
        FASTNA_UNROLL
        for (int i = 0; i < ROUNDS; ++i) {
          const int token = thread + i * MEASURERS;
          if (token < Config::TOKENS) shared.lse[at.slot][token] = lse[i] * LOG2_E;
        }
        barrier_sleep(shared.output_full, parity);
        const int row = lane & 15, column = lane & 7;
        const u32 grads = shared_address(shared.ring[at.slot][STRIP_GRAD_OUTPUT]) + row * ROW + (((lane >> 4) ^ swizzle(row)) << 4);
        const u32 outputs = shared_address(shared.output) + column * ROW + (((lane >> 3) ^ swizzle(column)) << 4);
#pragma unroll 1
        for (int first = warp * 16; first < Config::TOKENS; first += MEASURERS / WARP * 16) {
          float upper[4] = {}, lower[4] = {};
#pragma unroll 1
          for (int k = 0; k < K_STEPS; k += 2) {
            u32 a[2][4], b[2][4];
            FASTNA_UNROLL
            for (int i = 0; i < 2; ++i) {
              load_matrix_x4(a[i], (grads ^ ((k + i) << 5)) + first * ROW);
              load_matrix_x4(b[i], (outputs ^ (k << 5)) + (first + i * 8) * ROW);
            }
            FASTNA_UNROLL
            for (int i = 0; i < 2; ++i) {
              mma_m16n8k16<T>(upper, a[i], b[0][2 * i], b[0][2 * i + 1]);
              mma_m16n8k16<T>(lower, a[i], b[1][2 * i], b[1][2 * i + 1]);
            }
          }
          if ((lane & 3) == g >> 1) {
            delta[first + g] = g & 1 ? upper[1] : upper[0];
            delta[first + 8 + g] = g & 1 ? lower[3] : lower[2];
          }
        }
        named_barrier(MEASURED, MEASURERS);
        if (args.grad_lse != nullptr) {
#pragma unroll 1
          for (int token = thread; token < Config::TOKENS; token += MEASURERS) {
            const i64 index = index_of_token(token);
            if (index >= 0) delta[token] -= load_readonly(args.grad_lse + index);
          }
        }
        release(shared.ready[at.slot]);
      }
    }
  }

  // ---- What both warpgroups of consumers do

  FASTNA_DEVICE static int swizzle(int token) { return token & 7; }
  // The warp is done with what the barrier guards.
  FASTNA_DEVICE static void release(MemoryBarrier& barrier) {
    sync_warp();
    if (lane_index() == 0) barrier_arrive(barrier);
  }
  FASTNA_DEVICE void wait(const Position& at) const {
    barrier_wait(shared.full[at.slot], at.parity);
    barrier_wait(shared.ready[at.slot], at.parity);
  }
  // An operand of products in shared memory; `bytes` further another one.
  struct Operand {
    u64 descriptor;
    FASTNA_DEVICE u64 at(int bytes) const { return (descriptor & ~0xffffffffull) | (static_cast<u32>(descriptor) + static_cast<u32>(bytes >> 4)); }
  };
  FASTNA_DEVICE Operand operand(int slot) const { return {matrix_descriptor<ROW>(shared_address(shared.ring[slot]))}; }
  static constexpr FASTNA_DEVICE int tensor_offset(StripSlotTensor tensor) { return tensor * Config::BLOCK_BYTES; }

  FASTNA_DEVICE StripOwnColumns* own_columns(int tile, bool keys) const {
    return reinterpret_cast<StripOwnColumns*>(&shared + 1) + (tile * 2 + keys) * 4;
  }
  FASTNA_DEVICE u32* lines(int step, bool keys) const { return reinterpret_cast<u32*>(own_columns(args.tiles, false)) + (step * 2 + keys) * WARP; }
  FASTNA_DEVICE int* table_offsets() const { return reinterpret_cast<int*>(lines(args.steps, false)); }

  // The steps of all walks: work(walk, step, slots of the step's row blocks).
  template <class Work>
  FASTNA_DEVICE void walk_down(const Work& work) const {
    Position at;
#pragma unroll 1
    for (Walk walk(member); walk.find(args); walk.number += members) {
      wait(at);
      int slots[2] = {at.slot, 0};
#pragma unroll 1
      for (int step = 0; step < args.steps; ++step) {
        at.advance();
        wait(at);
        slots[1] = at.slot;
        work(walk, step, slots);
        release(shared.empty[slots[0]]);
        slots[0] = slots[1];
      }
      release(shared.empty[slots[0]]);
      at.advance();
    }
  }

  // The lane's address of the 16 tokens of two columns, as ldmatrix wants it, of a tile that begins with row `above` of the first of two row
  // blocks; of column 0 of a slot and its first tensor.
  FASTNA_DEVICE u32 left_address(const int (&slots)[2], int above) const {
    int lane = lane_index();
    keep(lane);  // worked out in every step: there is no register to keep it in
    const int row = (lane & 7) + above, token = row & 7;
    return shared_address(shared.ring[row < TILE_SIDE ? slots[0] : slots[1]]) + (lane >> 3 & 1) * COLUMN + token * ROW +
           (((lane >> 4) ^ swizzle(token)) << 4);
  }
  FASTNA_DEVICE static void load_left(Left& left, u32 address, StripSlotTensor tensor) {
    FASTNA_UNROLL
    for (int k = 0; k < K_STEPS; ++k) load_matrix_x4(left[k], (address ^ (k << 5)) + tensor_offset(tensor));
  }
  // scores = first columns^T and slopes = second columns^T of the warp's own tokens at `left_address`; the second is only asked
  // for. Registers hold one of the two left operands at a time, in `left`, which has to stay until the products are done.
  FASTNA_DEVICE static void multiply(Scores& scores, Scores& slopes, Left& left, u32 left_address, StripSlotTensor left_first,
                                     StripSlotTensor left_second, const Operand& columns, StripSlotTensor first, StripSlotTensor second) {
    load_left(left, left_address, left_first);
    wgmma_fence();
    multiply_transposed(scores, left, columns, tensor_offset(first));
    wgmma_commit();
    wgmma_wait<0>();
    load_left(left, left_address, left_second);
    wgmma_fence();
    multiply_transposed(slopes, left, columns, tensor_offset(second));
    wgmma_commit();
  }
  // result = left columns^T
  FASTNA_DEVICE static void multiply_transposed(Scores& result, const Left& left, const Operand& columns, int offset) {
    FASTNA_UNROLL
    for (int k = 0; k < K_STEPS; ++k) Wgmma<N>::template product_of_registers<T>(result, left[k], columns.at(offset + k * 32), k != 0);
  }
  // sum += factors columns
  FASTNA_DEVICE static void add(Gradient& sum, const Packed& factors, const Operand& columns, StripSlotTensor tensor) {
    FASTNA_UNROLL
    for (int k = 0; k < PAIRS; ++k) Wgmma<D>::template product_transposed<T>(sum, factors + 4 * k, columns.at(tensor_offset(tensor) + k * 2 * COLUMN));
  }
  // Writes the warp's 16 tokens times `factor` where wanted; `target` is the tile's first row of the first, `lane` a lane_offset from there.
  // Neighbouring lanes trade halves of two chunks, so that a store fills whole 32-byte sectors.
  FASTNA_DEVICE void store(const Gradient& sum, float factor, T* target, int lane, bool first, bool second) const {
    const bool odd = (lane & 8) != 0;
    target += lane;
    FASTNA_UNROLL
    for (int h = 0; h < 2; ++h) {
      FASTNA_UNROLL
      for (int c = 0; c < D / 8; c += 2) {
        const u32 even_chunk = pack2<T>(sum[4 * c + 2 * h] * factor, sum[4 * c + 2 * h + 1] * factor);
        const u32 odd_chunk = pack2<T>(sum[4 * c + 4 + 2 * h] * factor, sum[4 * c + 4 + 2 * h + 1] * factor);
        const u32 received = shuffle_xor(odd ? even_chunk : odd_chunk, 1);
        const uint2 half_ = odd ? uint2{received, odd_chunk} : uint2{even_chunk, received};
        if (h == 0 ? first : second) *reinterpret_cast<uint2*>(target + c * 8) = half_;
      }
      target += args.heads * D;
    }
  }
  // The lane's place in a gradient, counted from the first channel of a tile's first row.
  FASTNA_DEVICE int lane_offset() const {
    const int lane = lane_index();
    return (lane >> 2) * args.columns * args.heads * D + (lane & 1) * 8 + (lane & 2) * 2;
  }

  // pair(p) for those that `flags` name, one after another; none(p) for the others. Variants by warp, as queries have, would let pairs go side by
  // side, but all the code that an SM runs must stay below some 40 KB: beyond, it waits for instructions most of the time (measured: twice as long).
  template <class Pair, class None>
  FASTNA_DEVICE static void for_pairs(u32 flags, const Pair& pair, const None& none) {
    FASTNA_UNROLL
    for (int p = 0; p < PAIRS; ++p) {
      if (flags & (StripOwnColumns::PAIR << p)) pair(p);
      else none(p);
    }
  }

  // ---- Queries

  struct QueryRows {
    u32 both_lines;  // of the table, for this lane: see lines
    float lse[2], delta[2];
    int tables[2];
    u32 flags;
  };
  // A warp's windows lie in OWN_PAIRS pairs of columns, from that of its own number on. At the left border those of warp 0 reach one pair
  // further, at the right border the last ones begin one pair earlier.
  static constexpr FASTNA_DEVICE int border_pair(int warp) { return warp == 0 ? OWN_PAIRS : warp - 1; }

  // Scores become weights ...
  FASTNA_DEVICE void weigh(int warp, Scores& scores, int block, const QueryRows& rows) const {
    const int line = static_cast<int>(block == 0 ? rows.both_lines & 0xffffu : rows.both_lines >> 16) + Table::entry_offset(-LEFT - 2 * warp);
    const u8* const entries[2] = {shared.table + line + rows.tables[0], shared.table + line + rows.tables[1]};
    for_pairs(rows.flags, [&](int p) {
      FASTNA_UNROLL
      for (int i = 4 * p; i < 4 * p + 4; ++i) {
        const int n = 2 * i, h = i % 2;
        const float2 bias = *reinterpret_cast<const float2*>(entries[h] + (i / 2 - h) * 8);
        scores[n] = exp2_approx(scores[n] * args.scale_log2 + (bias.x - rows.lse[h]));
        scores[n + 1] = exp2_approx(scores[n + 1] * args.scale_log2 + (bias.y - rows.lse[h]));
      }
    }, [](int) {});
  }
  // ... and slopes what scores' gradients are, packed.
  FASTNA_DEVICE static void differentiate(const Scores& weights, const Scores& slopes, Packed& packed, const QueryRows& rows) {
    for_pairs(rows.flags, [&](int p) {
      FASTNA_UNROLL
      for (int i = 4 * p; i < 4 * p + 4; ++i) {
        const int n = 2 * i, h = i % 2;
        packed[i] = pack2<T>(weights[n] * (slopes[n] - rows.delta[h]), weights[n + 1] * (slopes[n + 1] - rows.delta[h]));
      }
    }, [&](int p) { clear_pair(p, packed); });
  }
  FASTNA_DEVICE static void clear_pair(int p, Packed& packed) {
    u32 zero = 0;
    keep(zero);
    packed[4 * p] = packed[4 * p + 1] = packed[4 * p + 2] = packed[4 * p + 3] = zero;
  }

  FASTNA_DEVICE void store_query(const Gradient& sum, i64 target, int row, u32 flags) const {
    const bool exists = row + (lane_index() >> 2) < args.rows;
    store(sum, args.scale, static_cast<T*>(args.grad_query) + target, lane_offset(), exists && (flags & StripOwnColumns::FIRST),
          exists && (flags & StripOwnColumns::SECOND));
  }

  FASTNA_DEVICE void queries() const {
    const int warp = warp_index() & 3;
    const int above = Config::ABOVE + args.lift;
    walk_down([&](const Walk& walk, int step, const int(&slots)[2]) {
      const int first_column = walk.first_column(args.columns);
      QueryRows rows;
      rows.both_lines = lines(step, false)[lane_index()];
      const i64 target = index_of(walk, step * TILE_SIDE, 0) * D;
#pragma unroll 1
      for (int i = 0; i < walk.tiles; ++i) {
        const StripOwnColumns& columns = own_columns(walk.first_tile + i, false)[warp];
        const int column = shuffle(columns.column, 0), own = column - first_column, seen = (own - LEFT - 2 * warp) * COLUMN;
        const u32 flags = shuffle(columns.flags, 0);
        int row = lane_index() >> 2;
        keep(row);  // as in left_address
        row += above;
        const int statistics = (row < TILE_SIDE ? slots[0] : slots[1]) * Config::TOKENS + own * TILE_SIDE + (row & 7);
        const float *lse = shared.lse[0] + statistics, *delta = shared.delta[0] + statistics;
        FASTNA_UNROLL
        for (int h = 0; h < 2; ++h) {
          rows.lse[h] = flags & (h == 0 ? StripOwnColumns::FIRST : StripOwnColumns::SECOND) ? lse[h * TILE_SIDE] : infinity();
        }
        rows.flags = flags;
        Gradient grad_query;
        FASTNA_UNROLL
        for (int n = 0; n < D / 2; ++n) grad_query[n] = 0.0f;
#pragma unroll 1
        for (int b = 0; b < 2; ++b) {
          const Operand block = {operand(b == 0 ? slots[0] : slots[1]).at(seen)};
          Scores scores, slopes;
          Packed packed;
          Left tokens;
          multiply(scores, slopes, tokens, left_address(slots, above) + own * COLUMN, STRIP_QUERY, STRIP_GRAD_OUTPUT, block, STRIP_KEY, STRIP_VALUE);
          rows.tables[0] = columns.tables[0], rows.tables[1] = columns.tables[1];
          weigh(warp, scores, b, rows);
          wgmma_wait<0>();
          rows.delta[0] = delta[0], rows.delta[1] = delta[TILE_SIDE];
          differentiate(scores, slopes, packed, rows);
          wgmma_fence();
          add(grad_query, packed, block, STRIP_KEY);
          wgmma_commit();
          wgmma_wait<0>();
        }
        store_query(grad_query, target + column * args.heads * D, step * TILE_SIDE, flags);
      }
    });
    named_barrier(CONSUMERS, 256);
  }

  // ---- Keys

  // What is said of the queries that a row block's columns are.
  struct QueryColumns {
    int line;                     // of the table, for this lane
    const int* tables;            // per column
    const float2 *lses, *deltas;  // of two rows
  };
  // Of a pair of columns, scores become weights ...
  FASTNA_DEVICE void weigh_pair(int p, Scores& scores, const QueryColumns& of) const {
    const int2 offsets = *reinterpret_cast<const int2*>(of.tables + 2 * p);
    FASTNA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int c = 2 * p + i;
      const float2 lse = of.lses[c * (TILE_SIDE / 2)];
      const u8* entry = shared.table + of.line + (i == 0 ? offsets.x : offsets.y);
      FASTNA_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int n = 4 * c + 2 * h;
        const float2 bias = *reinterpret_cast<const float2*>(entry + (h - c) * 8);
        scores[n] = exp2_approx(scores[n] * args.scale_log2 + (bias.y - lse.x));
        scores[n + 1] = exp2_approx(scores[n + 1] * args.scale_log2 + (bias.x - lse.y));
      }
    }
  }
  // ... which are packed ...
  FASTNA_DEVICE static void pack_pair(int p, const Scores& weights, Packed& packed) {
    FASTNA_UNROLL
    for (int i = 4 * p; i < 4 * p + 4; ++i) packed[i] = pack2<T>(weights[2 * i], weights[2 * i + 1]);
  }
  // ... and slopes what scores' gradients are.
  FASTNA_DEVICE static void differentiate_pair(int p, const Scores& weights, const Scores& slopes, Packed& packed, const QueryColumns& of) {
    FASTNA_UNROLL
    for (int c = 2 * p; c < 2 * p + 2; ++c) {
      const float2 delta = of.deltas[c * (TILE_SIDE / 2)];
      FASTNA_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int n = 4 * c + 2 * h;
        packed[2 * c + h] = pack2<T>(weights[n] * (slopes[n] - delta.x), weights[n + 1] * (slopes[n + 1] - delta.y));
      }
    }
  }
  // The gradient of the values is summed up while factors of the keys' are worked out.
  FASTNA_DEVICE void keys() const {
    const int warp = warp_index() & 3, q = lane_index() & 3;
    walk_down([&](const Walk& walk, int step, const int(&slots)[2]) {
      const int row = step * TILE_SIDE - args.lift, first_column = walk.first_column(args.columns);
      const u32 both_lines = lines(step, true)[lane_index()];
      const int entry = Table::entry_offset(LEFT + 2 * warp);
      const u32 left = left_address(slots, Config::ABOVE);
      const i64 target = index_of(walk, row, 0) * D;
#pragma unroll 1
      for (int i = 0; i < walk.tiles; ++i) {
        const StripOwnColumns columns = own_columns(walk.first_tile + i, true)[warp];
        const int column = shuffle(columns.column, 0), own = column - first_column, seen = own - LEFT - 2 * warp;
        const u32 flags = shuffle(columns.flags, 0);
        const int* tables = table_offsets() + column - 2 * warp;
        Gradient grad_key, grad_value;
        FASTNA_UNROLL
        for (int n = 0; n < D / 2; ++n) grad_key[n] = grad_value[n] = 0.0f;
#pragma unroll 1
        for (int b = 0; b < 2; ++b) {
          const int slot = b == 0 ? slots[0] : slots[1];
          const Operand block = {operand(slot).at(seen * COLUMN)};
          const QueryColumns of = {entry + static_cast<int>(b == 0 ? both_lines & 0xffffu : both_lines >> 16), tables,
                             reinterpret_cast<const float2*>(shared.lse[slot] + seen * TILE_SIDE) + q,
                             reinterpret_cast<const float2*>(shared.delta[slot] + seen * TILE_SIDE) + q};
          Scores scores, slopes;
          Packed weights, packed;
          const auto weigh = [&](int p) { weigh_pair(p, scores, of); };
          const auto pack = [&](int p) { pack_pair(p, scores, weights); };
          const auto differentiate = [&](int p) { differentiate_pair(p, scores, slopes, packed, of); };
          Left tokens;
          multiply(scores, slopes, tokens, left + own * COLUMN, STRIP_KEY, STRIP_VALUE, block, STRIP_QUERY, STRIP_GRAD_OUTPUT);
          for_pairs(flags, weigh, [](int) {});
          wgmma_wait<0>();
          for_pairs(flags, pack, [&](int p) { clear_pair(p, weights); });
          wgmma_fence();
          add(grad_value, weights, block, STRIP_GRAD_OUTPUT);
          wgmma_commit();
          for_pairs(flags, differentiate, [&](int p) { clear_pair(p, packed); });
          wgmma_fence();
          add(grad_key, packed, block, STRIP_QUERY);
          wgmma_commit();
          wgmma_wait<0>();
        }
        store_keys(grad_key, grad_value, target + column * args.heads * D, row, flags);
      }
    });
    named_barrier(CONSUMERS, 256);
  }
  FASTNA_DEVICE void store_keys(const Gradient& grad_key, const Gradient& grad_value, i64 target, int row, u32 flags) const {
    const bool exists = static_cast<u32>(row + (lane_index() >> 2)) < static_cast<u32>(args.rows);
    const bool first = exists && (flags & StripOwnColumns::FIRST), second = exists && (flags & StripOwnColumns::SECOND);
    store(grad_key, args.scale, static_cast<T*>(args.grad_key) + target, lane_offset(), first, second);
    store(grad_value, 1.0f, static_cast<T*>(args.grad_value) + target, lane_offset(), first, second);
  }

  // ---- Before: 256 threads

  FASTNA_DEVICE void prepare() const {
    const int thread = thread_index() - 128;
    Table::build(shared.table, thread, 256);
#pragma unroll 1
    for (int i = thread; i < args.tiles * 8; i += 256) own_columns(i / 8, false)[i % 8] = columns_of(i / 8, i / 4 % 2 != 0, i % 4);
#pragma unroll 1
    for (int i = thread; i < args.steps * 2 * WARP; i += 256) lines(0, false)[i] = lines_of(i / (2 * WARP), i / WARP % 2 != 0, i % WARP);
#pragma unroll 1
    for (int i = thread; i < args.columns + 2 * LEFT; i += 256) table_offsets()[i] = Table::table_offset(i - LEFT, args.columns);
    named_barrier(CONSUMERS, 256);
  }
  FASTNA_DEVICE u32 lines_of(int step, bool keys, int lane) const {
    const int g = lane >> 2, q = lane & 3, own = step * TILE_SIDE + g - (keys ? args.lift : 0);
    u32 result = 0;
#pragma unroll 1
    for (int b = 0; b < 2; ++b) {
      const int first = (step + b) * TILE_SIDE - Config::ABOVE - args.lift + 2 * q;  // of two rows of the row block
      // Of queries, the distance of the first row; of keys, that of the second, which is one less than that of the first.
      const int dr = keys ? own - first - 1 : first - own;
      const int line = Table::line_of(dr, keys ? first + 1 : own, keys ? first : own, args.rows);
      result |= static_cast<u32>(line) << 16 * b;
    }
    return result;
  }
  FASTNA_DEVICE StripOwnColumns columns_of(int number, bool keys, int warp) const {
    const StripOwnTile tile = strip_tile<Config::WINDOW_COLUMNS>(keys, number, args.tiles, args.columns);
    const int column = tile.first + 2 * warp, first = maximum(column, tile.own.begin), last = minimum(column + 2, tile.own.end) - 1;
    u32 flags = (tile.own.contains(column) ? StripOwnColumns::FIRST : 0) | (tile.own.contains(column + 1) ? StripOwnColumns::SECOND : 0);
    Interval pairs = {warp, warp + OWN_PAIRS};
    if (keys) {  // columns of queries that see them
      const int begin = first < Config::WINDOW_COLUMNS ? 0 : first - LEFT;
      const int end = last >= args.columns - Config::WINDOW_COLUMNS ? args.columns : last + LEFT + 1;
      pairs = {(begin - tile.first + LEFT) / 2, (end - tile.first + LEFT + 1) / 2};
    } else if (LEFT > 1 && (warp == 0 ? column == 0 : column >= args.columns - 2)) {
      pairs = {minimum(warp, border_pair(warp)), maximum(warp + OWN_PAIRS, border_pair(warp) + 1)};
    }
    if (first > last) flags = 0;
    else flags |= (StripOwnColumns::PAIR << pairs.end) - (StripOwnColumns::PAIR << pairs.begin);
    return {column, flags, {Table::table_offset(column, args.columns), Table::table_offset(column + 1, args.columns)}};
  }
};

template <class Config>
FASTNA_DEVICE void hopper_strip_backward(const HopperStripBackwardArguments& args) {
  using Kernel = HopperStripBackward<Config>;
  auto& shared = *dynamic_shared<typename Kernel::Shared>();
  if (thread_index() == 0) {
    barrier_init(shared.output_full, 1);
    for (int s = 0; s < Config::SLOTS; ++s) {
      barrier_init(shared.full[s], 1);
      barrier_init(shared.ready[s], Kernel::MEASURERS / WARP);  // one arrival per warp, here and below
      barrier_init(shared.empty[s], 8);
    }
    barrier_init_done();
  }
  sync_threads();
  const int warp = warp_index();
  if (warp < 4) {
    shrink_registers<Config::PRODUCER_REGISTERS>();
    if (thread_index() == 0) Kernel(args, shared).produce();
    if (warp > 0) Kernel(args, shared).measure();
  } else {
    grow_registers<Config::CONSUMER_REGISTERS>();
    Kernel(args, shared).prepare();
    // Each works out anew which block it is (hence `keep`): what is known to all before they part would be spilled.
    if (warp < 8) Kernel(args, shared).queries();
    else Kernel(args, shared).keys();
  }
}

}  // namespace fastna
