// Neighborhood attention forward over small sliding 2-D windows on Hopper (sm_90a): see hopper_strip.cuh.
//
// One warp streams row blocks of keys and values, and tiles of queries, through rings of shared memory, without a gap from walk to walk.
// The other warpgroups take tiles in turn: scores of all 64 queries and both row blocks in registers, softmax, P V. A warp needs the keys of its
// own queries' windows only: PAIRS of the tile's pairs of columns, which code of its own for every first pair finds in static registers.
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

// GROUPS: warpgroups that multiply, REGISTERS: of each of their threads. STAGES: row blocks in shared memory, QUERY_STAGES: steps of queries.
template <class Shape_, class Rpb_, bool HAS_RPB_, int GROUPS_, int STAGES_, int QUERY_STAGES_, int REGISTERS>
struct HopperStripForwardConfig {
  using Shape = Shape_;
  using Rpb = Rpb_;
  static constexpr bool HAS_RPB = HAS_RPB_;
  static constexpr int GROUPS = GROUPS_, STAGES = STAGES_, QUERY_STAGES = QUERY_STAGES_, CONSUMER_REGISTERS = REGISTERS;
};

template <class Config>
struct HopperStripForward {
  using Shape = typename Config::Shape;
  using T = typename Shape::Element;
  using Table = StripTable<Shape::WINDOW_ROWS, Shape::WINDOW_COLUMNS, true>;
  static constexpr int D = Shape::HEAD_DIM, N = Shape::N, ROW = Shape::ROW_BYTES, PAIRS = Shape::PAIRS, ALL_PAIRS = Shape::ALL_PAIRS;
  static constexpr int GROUPS = Config::GROUPS, STAGES = Config::STAGES, QUERY_STAGES = Config::QUERY_STAGES;
  static constexpr int ALL_CONSUMERS = 1;  // a named barrier

  struct Shared {
    u8 key[STAGES][Shape::BLOCK_BYTES], value[STAGES][Shape::BLOCK_BYTES];
    u8 query[QUERY_STAGES][Shape::ROWS_BYTES];
    u8 bias[Table::BYTES];
    int own_bias[3][WARP];  // of a lane: bytes into `bias`, in the first step, in those between, and in the last one
    MemoryBarrier full[STAGES], empty[STAGES], query_full[QUERY_STAGES], query_empty[QUERY_STAGES];
  };

  const HopperStripForwardArguments& args;
  Shared& shared;
  const int head, member;  // the block's head, and its number among the blocks of that head

  FASTNA_DEVICE HopperStripForward(const HopperStripForwardArguments& args_, Shared& shared_)
      : args(args_), shared(shared_), head(block_index() % args_.geometry.heads), member(block_index() / args_.geometry.heads) {}

  // One thread. The queries of a step come behind its first row block: were they first, they could wait for a step that lacks its second one.
  FASTNA_DEVICE void produce() {
    RingPosition<STAGES> at;
    RingPosition<QUERY_STAGES> query_at;
    StripWalk walk;
    for (int round = 0; walk.template find<Shape::TILES>(args.walks, member, round); ++round) {
      const int column = walk.first_tile * TILE_SIDE;
      for (int block = 0; block <= args.walks.steps; ++block) {
        const int row = block * TILE_SIDE;
        barrier_wait(shared.empty[at.slot], at.parity ^ 1);
        barrier_expect(shared.full[at.slot], 2 * Shape::BLOCK_BYTES);
        copy_box(shared.key[at.slot], args.key, shared.full[at.slot], head * D, row - Shape::ABOVE, column - Shape::LEFT, 0, walk.batch);
        copy_box(shared.value[at.slot], args.value, shared.full[at.slot], head * D, row - Shape::ABOVE, column - Shape::LEFT, 0, walk.batch);
        at.advance();
        if (block == args.walks.steps) break;
        barrier_wait(shared.query_empty[query_at.slot], query_at.parity ^ 1);
        barrier_expect(shared.query_full[query_at.slot], Shape::ROWS_BYTES);
        copy_box(shared.query[query_at.slot], args.query, shared.query_full[query_at.slot], head * D, row, column, 0, walk.batch);
        query_at.advance();
      }
    }
  }

  // 128 threads: every GROUPS-th tile.
  FASTNA_DEVICE void consume(int group) {
    const int thread = thread_index() - 128, lane = lane_index(), warp = warp_index() % 4;
    const auto* rpb = static_cast<const typename Config::Rpb*>(args.rpb) + head * ((2 * Shape::WINDOW_ROWS - 1) * Table::LINES);
    Table::template build<Config::HAS_RPB>(shared.bias, rpb, args.inverse_scale, thread, GROUPS * 128);
    if (thread < 3 * WARP) {
      const int kind = thread / WARP, step = kind == 0 ? 0 : kind == 1 ? 1 : args.walks.steps - 1, rows = args.geometry.axis[1].length;
      const int row = step * TILE_SIDE + lane / 4;
      shared.own_bias[kind][lane] = Table::lane_offset(lane) + (kind == 1 ? Shape::ABOVE * Table::SHIFT : Table::shift_offset(row, rows));
    }
    named_barrier(ALL_CONSUMERS, GROUPS * 128);

    const Geometry& geometry = args.geometry;
    const int rows = geometry.axis[1].length, columns = geometry.axis[2].length;
    const int last_tile = args.walks.tiles - 1;
    const auto seen_in = [&](int tile) { return StripColumns<Shape>(warp, tile * TILE_SIDE - Shape::LEFT, columns).code(); };
    const int left = seen_in(0), right = seen_in(last_tile), inside = StripColumns<Shape>::interior(warp);
    const auto release = [&](MemoryBarrier& barrier) {
      if (lane == 0) barrier_arrive(barrier);
    };
    RingPosition<STAGES> at;
    RingPosition<QUERY_STAGES> query_at;
    StripWalk walk;
    int in_strip = group;
    for (int round = 0; walk.template find<Shape::TILES>(args.walks, member, round); ++round) {
      int row = 0;  // of the map; `token` is the number of the one there in the warp's first column, among all tokens and heads
      const int column = walk.first_tile * TILE_SIDE + 2 * warp;
      u32 token = (walk.batch * rows * columns + column) * geometry.heads + head;
      barrier_wait(shared.full[at.slot], at.parity);
      for (int step = 0; step < args.walks.steps; ++step) {
        const RingPosition<STAGES> above = at;
        at.advance();
        const int* own_bias = shared.own_bias[step == 0 ? 0 : step < args.walks.steps - 1 ? 1 : 2];
        barrier_wait(shared.full[at.slot], at.parity);
        barrier_wait(shared.query_full[query_at.slot], query_at.parity);
#pragma unroll 1
        for (; in_strip < walk.tiles; in_strip += GROUPS) {
          const int tile = walk.first_tile + in_strip;
          const Place place(shared.bias, warp, tile == 0 ? left : tile == last_tile ? right : inside);
          attend(own_bias, place, in_strip * Shape::TILE_BYTES, above.slot, at.slot, query_at.slot,
                 token + in_strip * TILE_SIDE * geometry.heads, rows - row, columns - column - in_strip * TILE_SIDE);
        }
        in_strip -= walk.tiles;
        sync_warp();
        release(shared.query_empty[query_at.slot]);
        release(shared.empty[above.slot]);
        query_at.advance();
        row += TILE_SIDE;
        token += TILE_SIDE * columns * geometry.heads;
      }
      release(shared.empty[at.slot]);
      at.advance();
    }
  }

  // Where a warp's queries of a tile have their windows, and so where the tables of initial scores begin for them, in both columns.
  struct Place {
    int pair;
    const u8 *line, *first[2], *last[2];

    FASTNA_DEVICE Place(const u8* bias, int warp, int seen) {
      pair = seen & 3;
      line = bias + Table::line_offset(2 * (pair - warp) - Shape::LEFT);
      FASTNA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const bool sees_first = (seen >> (2 + i) & 1) != 0;
        first[i] = sees_first ? line - i * Table::LINE : bias;  // of which the first line is hidden
        last[i] = sees_first ? bias : line + (2 * PAIRS - 1 - i) * Table::LINE;
      }
    }
    // Of the warp's column `j` of keys; `own` is where the lane's entries are.
    FASTNA_DEVICE float2 initial(int own, int j, int i) const {
      const u8* table = j == 0 ? first[i] : j == 2 * PAIRS - 1 ? last[i] : line + (j - i) * Table::LINE;
      return *reinterpret_cast<const float2*>(table + own);
    }
  };

  // Scores begin with bias / scale. PAIR: the first that the warp needs; others hold anything, since nobody looks at them.
  template <int PAIR>
  static FASTNA_DEVICE void begin(float (&scores)[N / 2], int own, const Place& place) {
    FASTNA_UNROLL
    for (int j = 0; j < 2 * PAIRS; ++j) {
      FASTNA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float2 initial = place.initial(own, j, i);
        scores[(2 * PAIR + j) * 4 + 2 * i] = initial.x, scores[(2 * PAIR + j) * 4 + 2 * i + 1] = initial.y;
      }
    }
  }

  // Weights are 2^(scale score - top). Any top will do that keeps them finite and does not let all of them vanish: it is the largest of some
  // scores of the first row block, and raised where the sum of weights shows that it was too low.
  struct Softmax {
    float top[2], sum[4];  // sum: as an accumulator of weights times ones holds it
  };
  static constexpr float MOST = is_same<T, half> ? 32768.0f : 1e18f;

  // The larger one of two scores and of all in a row's four lanes.
  static FASTNA_DEVICE float largest(float a, float b) {
    a = fmaxf(a, b);
    a = fmaxf(a, shuffle_xor(a, 1));
    return fmaxf(a, shuffle_xor(a, 2));
  }

  // Scores of a row block become weights, packed as left operands, none beyond the warp's own pairs.
  template <int PAIR>
  static FASTNA_DEVICE void soften(int block, const float (&scores)[N / 2], float scale, Softmax& softmax, u32 (&weights)[ALL_PAIRS][4]) {
    if (block == 0) {
      // Every query sees these two columns, and some row of the first block in them.
      const float *first = scores + (2 * PAIR + 1) * 4, *last = scores + (2 * PAIR + 2 * PAIRS - 2) * 4;
      FASTNA_UNROLL
      for (int i = 0; i < 4; i += 2) softmax.top[i / 2] = largest(fmaxf(first[i], first[i + 1]), fmaxf(last[i], last[i + 1])) * scale;
    }
    const u32 ones = pack2<T>(1.0f, 1.0f);
    FASTNA_UNROLL
    for (int pair = 0; pair < ALL_PAIRS; ++pair) {
      const bool needed = pair >= PAIR && pair < PAIR + PAIRS;
      FASTNA_UNROLL
      for (int k = 0; k < 4; ++k) weights[pair][k] = needed ? weigh(scores + pair * 8 + k * 2, scale, softmax.top[k % 2]) : 0;
      if (needed) mma_m16n8k16<T>(softmax.sum, weights[pair], ones, ones);
    }
  }
  static FASTNA_DEVICE u32 weigh(const float* scores, float scale, float top) {
    return pack2<T>(exp2_approx(fmaf(scores[0], scale, -top)), exp2_approx(fmaf(scores[1], scale, -top)));
  }

  // The weights of a row block once more, for a top that is the largest score up to now. Rare, so that a warp multiplies for itself, twice and
  // anew with the block before, rather than to hold anything in registers for it. `query` is the address of the tile, `keys` of its columns in
  // the first row block, `next` bytes before the second one; `output` is that of the block before.
  FASTNA_DEVICE void raise(int block, u32 query, u32 keys, u32 next, const int* own_bias, const Place& place, Softmax& softmax, u32 (&weights)[ALL_PAIRS][4],
                           float (&output)[D / 2]) const {
    const int warp = warp_index() % 4, count = (block + 1) * PAIRS;
    float top[2] = {HIDDEN, HIDDEN};
#pragma unroll 1
    for (int p = 0; p < 2 * count; ++p) {
      const int first = p % PAIRS * 2, of_block = p % count >= PAIRS ? 1 : 0;  // column of the pair
      int lane = lane_index();
      keep(lane);  // rather than what follows from it
      const int own = own_bias[lane] + of_block * (TILE_SIDE * 8);
      float scores[2][4];
      FASTNA_UNROLL
      for (int j = 0; j < 2; ++j) {
        FASTNA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float2 initial = place.initial(own, first + j, i);
          scores[j][2 * i] = initial.x, scores[j][2 * i + 1] = initial.y;
        }
      }
      FASTNA_UNROLL
      for (int k = 0; k < D / 16; ++k) {
        u32 left[4], right[4];
        load_matrix_x4(left, query + swizzled_chunk<ROW>(warp * 16 + lane % 16, 2 * k + lane / 16));
        load_matrix_x4(right, keys + of_block * next + (2 * place.pair + first + lane / 16) * Shape::COLUMN_BYTES + swizzled_chunk<ROW>(lane % 8, 2 * k + lane / 8 % 2));
        mma_m16n8k16<T>(scores[0], left, right[0], right[1]);
        mma_m16n8k16<T>(scores[1], left, right[2], right[3]);
      }
      if (p < count) {
        FASTNA_UNROLL
        for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], fmaxf(scores[0][i], scores[1][i]));
        if (p < count - 1) continue;
        FASTNA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float before = softmax.top[i];
          softmax.top[i] = largest(top[i], top[i]) * args.scale_log2e;
          softmax.sum[2 * i] = softmax.sum[2 * i + 1] = 0.0f;
          const float rescale = exp2_approx(before - softmax.top[i]);
          FASTNA_UNROLL
          for (int j = 2 * i; j < D / 2; j += 4) output[j] *= rescale, output[j + 1] *= rescale;
        }
        continue;
      }
      u32 raised[4];
      FASTNA_UNROLL
      for (int k = 0; k < 4; ++k) raised[k] = weigh(scores[k / 2] + k % 2 * 2, args.scale_log2e, softmax.top[k % 2]);
      const u32 ones = pack2<T>(1.0f, 1.0f);
      mma_m16n8k16<T>(softmax.sum, raised, ones, ones);
      if (of_block < block) continue;
      FASTNA_UNROLL
      for (int pair = 0; pair < ALL_PAIRS; ++pair) {
        FASTNA_UNROLL
        for (int k = 0; k < 4; ++k) weights[pair][k] = 2 * pair == 2 * place.pair + first ? raised[k] : weights[pair][k];
      }
    }
  }

  // Of the 64 queries `offset` bytes into the strip's tiles, and row blocks in slots `above` and `below`. `token`: of the warp's first query,
  // from which on there are so many rows and columns in the map.
  FASTNA_DEVICE void attend(const int* own_bias, const Place& place, u32 offset, int above, int below, int query_slot, u32 token, int rows, int columns) {
    float output[D / 2];
    FASTNA_UNROLL
    for (int i = 0; i < D / 2; ++i) output[i] = 0.0f;
    Softmax softmax{{0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};

    const u64 query = matrix_descriptor<ROW>(shared_address(shared.query[query_slot]) + offset);
    const u64 key = matrix_descriptor<ROW>(shared_address(shared.key[0]) + offset), value = matrix_descriptor<ROW>(shared_address(shared.value[0]) + offset);
#pragma unroll 1
    for (int block = 0; block < 2; ++block) {
      float scores[N / 2];
      u32 weights[ALL_PAIRS][4];
      const u32 slot = (block == 0 ? above : below) * Shape::BLOCK_BYTES;
      const int lane = lane_index();
      const int own = own_bias[lane] + block * (TILE_SIDE * 8);
      switch (place.pair) {
        case 0: begin<0>(scores, own, place); break;
        case 1: begin<1>(scores, own, place); break;
        case 2: begin<2>(scores, own, place); break;
        default: begin<3>(scores, own, place); break;
      }
      wgmma_fence();
      FASTNA_UNROLL
      for (int k = 0; k < D / 16; ++k) Wgmma<N>::template product<T>(scores, operand_at(query, k * 32), operand_at(key, slot + k * 32), true);
      wgmma_commit();
      wgmma_wait<0>();
      switch (place.pair) {
        case 0: soften<0>(block, scores, args.scale_log2e, softmax, weights); break;
        case 1: soften<1>(block, scores, args.scale_log2e, softmax, weights); break;
        case 2: soften<2>(block, scores, args.scale_log2e, softmax, weights); break;
        default: soften<3>(block, scores, args.scale_log2e, softmax, weights); break;
      }
      if (!all_in_warp(softmax.sum[0] < MOST && softmax.sum[2] < MOST))
        raise(block, shared_address(shared.query[query_slot]) + offset, shared_address(shared.key[above]) + offset, (below - above) * Shape::BLOCK_BYTES, own_bias,
              place, softmax, weights, output);
      wgmma_fence();
      FASTNA_UNROLL
      for (int pair = 0; pair < ALL_PAIRS; ++pair)
        Wgmma<D>::template product_transposed<T>(output, weights[pair], operand_at(value, slot + pair * 2 * Shape::COLUMN_BYTES));
      wgmma_commit();
      wgmma_wait<0>();
    }

    // Neighbouring lanes swap words, so that each has 8 bytes of one of two chunks, and four lanes fill a sector.
    u32 lane = lane_index();
    keep(lane);  // rather than what follows from it, all through the kernel
    const bool odd = (lane & 1) != 0;
    const int seen = static_cast<int>(lane / 4) < rows ? columns : 0;
    token += lane / 4 * (args.geometry.axis[2].length * args.geometry.heads);
    T* results = static_cast<T*>(args.output) + (lane & 1) * 8 + (lane & 2) * 2;
    keep(results);
    FASTNA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float inverse = reciprocal_approx(softmax.sum[2 * i]);
      T* const to = results + static_cast<u64>(token + i * args.geometry.heads) * D;
      FASTNA_UNROLL
      for (int n = 0; n < D / 8; n += 2) {
        const float *even_pair = output + n * 4 + 2 * i, *odd_pair = even_pair + 4;
        const u32 words[2] = {pack2<T>(even_pair[0] * inverse, even_pair[1] * inverse), pack2<T>(odd_pair[0] * inverse, odd_pair[1] * inverse)};
        const u32 received = shuffle_xor(odd ? words[0] : words[1], 1);
        if (i < seen) *reinterpret_cast<uint2*>(to + n * 8) = {odd ? received : words[0], odd ? words[1] : received};
      }
    }
    const float top = odd ? softmax.top[1] : softmax.top[0], sum = odd ? softmax.sum[2] : softmax.sum[0];
    if (static_cast<int>(lane % 4) < minimum(seen, 2)) args.lse[token + (odd ? args.geometry.heads : 0)] = (top + log2_approx(sum)) * LN_2;
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
      barrier_init(shared.empty[s], 4 * Kernel::GROUPS);  // one arrival per warp
    }
    for (int s = 0; s < Kernel::QUERY_STAGES; ++s) {
      barrier_init(shared.query_full[s], 1);
      barrier_init(shared.query_empty[s], 4 * Kernel::GROUPS);
    }
    barrier_init_done();
  }
  sync_threads();
  Kernel kernel(args, shared);
  const int warpgroup = warp_index() / 4;
  if (warpgroup == 0) {
    shrink_registers<24>();
    if (thread_index() == 0) kernel.produce();
  } else {
    grow_registers<Config::CONSUMER_REGISTERS>();
    kernel.consume(warpgroup - 1);
  }
}

}  // namespace fastna
