// Neighborhood attention forward over small sliding 2-D windows on Hopper (sm_90a): see hopper_strip.cuh.
//
// One warp streams row blocks of keys and values, and tiles of queries, through rings of shared memory, without a gap from walk to walk.
// The other warpgroups take tiles in turn: scores of all 64 queries and both row blocks in registers, softmax, P V. A warp needs the keys of its
// own queries' windows only: PAIRS of the tile's pairs of columns, which code of its own for every first pair finds in static registers.
#pragma once

#include "fastna/hopper_strip.cuh"

namespace fastna {

struct HopperStripForwardArguments {
  TensorMap query, key, value;  // boxes of 8 rows
  void* output;                 // contiguous
  float* lse;
  const void* rpb;
  Geometry geometry;
  StripWalks walks;
};

// GROUPS: warpgroups that multiply, REGISTERS: of each of their threads. STAGES: row blocks in shared memory, QUERY_STAGES: steps of queries.
template <class Shape_, class Rpb_, bool HAS_RPB_, int GROUPS_, int STAGES_, int QUERY_STAGES_, int REGISTERS>
struct HopperStripForwardConfig {
  using Shape = Shape_;
  using Rpb = Rpb_;
  static constexpr bool HAS_RPB = HAS_RPB_;
  static constexpr int GROUPS = GROUPS_, STAGES = STAGES_, QUERY_STAGES = QUERY_STAGES_, CONSUMER_REGISTERS = REGISTERS;
};

// Of the 4 x 4 words of four neighbouring lanes, row r in lane r: gives lane r column r.
FASTNA_DEVICE void transpose_words(u32 (&words)[4], int quad) {
  FASTNA_UNROLL
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (quad & step) != 0;
    FASTNA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      const u32 received = shuffle_xor(upper ? words[i] : words[i + step], step);
      (upper ? words[i] : words[i + step]) = received;
    }
  }
}

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

  // What a lane knows of the queries of a step.
  struct Row {
    const u8* bias;  // the lane's first entry of its table
    T* output;       // channel 8 quad of the token in column 0
    float* lse;
    bool exists;
  };
  FASTNA_DEVICE Row row_of(int batch, int step) const {
    const Geometry& geometry = args.geometry;
    const int lane = lane_index(), rows = geometry.axis[1].length, row = step * TILE_SIDE + lane / 4;
    const i64 token = (static_cast<i64>(batch) * rows + row) * geometry.axis[2].length * geometry.heads + head;
    return {shared.bias + Table::lane_offset(lane) + Table::shift_offset(row, rows),
            static_cast<T*>(args.output) + token * D + lane % 4 * 8, args.lse + token, row < rows};
  }

  // 128 threads: every GROUPS-th tile.
  FASTNA_DEVICE void consume(int group) {
    const int thread = thread_index() - 128, lane = lane_index();
    Table::template build<Config::HAS_RPB>(shared.bias, static_cast<const typename Config::Rpb*>(args.rpb) + head * ((2 * Shape::WINDOW_ROWS - 1) * Table::LINES),
                                           1.0f / args.geometry.scale, thread, GROUPS * 128);
    named_barrier(ALL_CONSUMERS, GROUPS * 128);

    const auto release = [&](MemoryBarrier& barrier) {
      if (lane == 0) barrier_arrive(barrier);
    };
    RingPosition<STAGES> at;
    RingPosition<QUERY_STAGES> query_at;
    StripWalk walk;
    int tile = group;
    for (int round = 0; walk.template find<Shape::TILES>(args.walks, member, round); ++round) {
      barrier_wait(shared.full[at.slot], at.parity);
      for (int step = 0; step < args.walks.steps; ++step) {
        const RingPosition<STAGES> above = at;
        at.advance();
        const Row row = row_of(walk.batch, step);
        barrier_wait(shared.full[at.slot], at.parity);
        barrier_wait(shared.query_full[query_at.slot], query_at.parity);
#pragma unroll 1
        for (; tile < walk.tiles; tile += GROUPS) attend(row, (walk.first_tile + tile) * TILE_SIDE, tile * Shape::TILE_BYTES, above.slot, at.slot, query_at.slot);
        tile -= walk.tiles;
        sync_warp();
        release(shared.query_empty[query_at.slot]);
        release(shared.empty[above.slot]);
        query_at.advance();
      }
      release(shared.empty[at.slot]);
      at.advance();
    }
  }

  // Where a lane's initial scores are, for its first column of queries and its second one.
  struct Bias {
    const u8 *line[2], *first[2], *last[2];  // of a warp's first pair of columns; hidden ones in place of the first or the last column

    FASTNA_DEVICE void next_block() {
      FASTNA_UNROLL
      for (int i = 0; i < 2; ++i) line[i] += TILE_SIDE * 8, first[i] += TILE_SIDE * 8, last[i] += TILE_SIDE * 8;
    }
  };
  // Scores begin with bias / scale. PAIR: the first that the warp needs; others hold anything, since nobody looks at them.
  template <int PAIR>
  static FASTNA_DEVICE void begin(float (&scores)[N / 2], const Bias& bias) {
    FASTNA_UNROLL
    for (int j = 0; j < 2 * PAIRS; ++j) {
      FASTNA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const u8* line = j == 0 ? bias.first[i] : j == 2 * PAIRS - 1 ? bias.last[i] : bias.line[i] + j * Table::LINE;
        const float2 initial = *reinterpret_cast<const float2*>(line);
        scores[(2 * PAIR + j) * 4 + 2 * i] = initial.x, scores[(2 * PAIR + j) * 4 + 2 * i + 1] = initial.y;
      }
    }
  }

  // Online: the largest score times `scale`, and the sum of weights 2^(scale score - top), that of a lane alone.
  struct Softmax {
    float top[2], sum[2], rescale[2];
  };
  // Weights are packed as a left operand, none beyond the warp's own pairs; what was summed up before is to be rescaled.
  template <int PAIR>
  static FASTNA_DEVICE void soften(const float (&scores)[N / 2], float scale, Softmax& softmax, u32 (&weights)[N / 4]) {
    constexpr int FIRST = PAIR * 8, END = FIRST + PAIRS * 8;
    FASTNA_UNROLL
    for (int i = 0; i < 2; ++i) {
      float top = fmaxf(scores[FIRST + 2 * i], scores[FIRST + 2 * i + 1]);
      FASTNA_UNROLL
      for (int j = FIRST + 2 * i + 4; j < END; j += 4) top = fmaxf(top, fmaxf(scores[j], scores[j + 1]));
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(softmax.top[i], fmaxf(top, shuffle_xor(top, 2)) * scale);
      softmax.rescale[i] = exp2_approx(softmax.top[i] - top);
      softmax.sum[i] *= softmax.rescale[i];
      softmax.top[i] = top;
    }
    FASTNA_UNROLL
    for (int j = 0; j < N / 2; j += 2) {
      const int i = j / 2 % 2;
      weights[j / 2] = 0;
      if (j < FIRST || j >= END) continue;
      const float pair[2] = {exp2_approx(scores[j] * scale - softmax.top[i]), exp2_approx(scores[j + 1] * scale - softmax.top[i])};
      softmax.sum[i] += pair[0] + pair[1];
      weights[j / 2] = pack2<T>(pair[0], pair[1]);
    }
  }

  // Of the 64 queries from `column` of the map on, `offset` bytes into the strip's tiles and its row blocks, the one in slot `above` and the one `below`.
  FASTNA_DEVICE void attend(const Row& row, int column, u32 offset, int above, int below, int query_slot) {
    const int quad = lane_index() % 4, warp = warp_index() % 4, columns = args.geometry.axis[2].length;
    const StripColumns<Shape> place(warp, column - Shape::LEFT, columns);
    const float scale = args.geometry.scale * LOG2_E;

    Bias bias;
    FASTNA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const u8* const hidden = shared.bias + Table::lane_offset(lane_index());
      bias.line[i] = row.bias + Table::line_offset(2 * (place.pair - warp) - i - Shape::LEFT);
      bias.first[i] = place.sees_first[i] ? bias.line[i] : hidden;
      bias.last[i] = place.sees_first[i] ? hidden : bias.line[i] + (2 * PAIRS - 1) * Table::LINE;
    }
    float output[D / 2];
    FASTNA_UNROLL
    for (int i = 0; i < D / 2; ++i) output[i] = 0.0f;
    Softmax softmax = {{HIDDEN, HIDDEN}, {0.0f, 0.0f}, {1.0f, 1.0f}};
    const u32 query = shared_address(shared.query[query_slot]) + offset;
#pragma unroll 1
    for (int block = 0; block < 2; ++block) {
      float scores[N / 2];
      switch (place.pair) {
        case 0: begin<0>(scores, bias); break;
        case 1: begin<1>(scores, bias); break;
        case 2: begin<2>(scores, bias); break;
        default: begin<3>(scores, bias); break;
      }
      bias.next_block();
      const int slot = block == 0 ? above : below;
      const u32 key = shared_address(shared.key[slot]) + offset, value = shared_address(shared.value[slot]) + offset;
      wgmma_fence();
      FASTNA_UNROLL
      for (int k = 0; k < D / 16; ++k)
        Wgmma<N>::template product<T>(scores, matrix_descriptor<ROW>(query + k * 32), matrix_descriptor<ROW>(key + k * 32), true);
      wgmma_commit();
      wgmma_wait<0>();

      u32 weights[N / 4];
      switch (place.pair) {
        case 0: soften<0>(scores, scale, softmax, weights); break;
        case 1: soften<1>(scores, scale, softmax, weights); break;
        case 2: soften<2>(scores, scale, softmax, weights); break;
        default: soften<3>(scores, scale, softmax, weights); break;
      }
      FASTNA_UNROLL
      for (int i = 0; i < D / 2; ++i) output[i] *= softmax.rescale[i >> 1 & 1];
      wgmma_fence();
      FASTNA_UNROLL
      for (int pair = 0; pair < ALL_PAIRS; ++pair)
        Wgmma<D>::template product_transposed<T>(output, weights + pair * 4, matrix_descriptor<ROW>(value + pair * 2 * Shape::COLUMN_BYTES));
      wgmma_commit();
      wgmma_wait<0>();
    }

    FASTNA_UNROLL
    for (int i = 0; i < 2; ++i) {
      softmax.sum[i] += shuffle_xor(softmax.sum[i], 1);
      softmax.sum[i] += shuffle_xor(softmax.sum[i], 2);
    }
    FASTNA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int token = (column + 2 * warp + i) * args.geometry.heads;
      const bool exists = row.exists && column + 2 * warp + i < columns;
      const float inverse = reciprocal_approx(softmax.sum[i]);
      FASTNA_UNROLL
      for (int c = 0; c < D / 32; ++c) {
        u32 words[4];
        FASTNA_UNROLL
        for (int k = 0; k < 4; ++k) words[k] = pack2<T>(output[(c * 4 + k) * 4 + 2 * i] * inverse, output[(c * 4 + k) * 4 + 2 * i + 1] * inverse);
        transpose_words(words, quad);
        if (exists) store_global_16(row.output + static_cast<i64>(token) * D + c * 32, {words[0], words[1], words[2], words[3]});
      }
      if (exists && quad == i) row.lse[token] = (softmax.top[i] + log2_approx(softmax.sum[i])) * LN_2;
    }
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
