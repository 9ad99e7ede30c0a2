// All three gradients of neighborhood attention for large windows in one kernel (sm_90a), 5 products per box instead of the 7 of
// hopper_gradient.cuh: fast, but not the same bits every time.
//
// Rows are keys and stay, with their values; boxes of queries and of grad_output stream past. grad_key and grad_value are summed up in
// registers. What a box of queries owes to the block's keys goes through shared memory: every warpgroup leaves its ds^T there, all
// multiply them with all the block's keys, each a part of the result, and the copy engine adds that to sums in global memory. Blocks do so
// in any order, hence the bits.
#pragma once

#include "fastna/hopper_bias.cuh"
#include "fastna/hopper_products.cuh"

namespace fastna {

struct HopperJointArguments {
  TensorMap key, value, query, grad_output;
  TensorMap statistics;  // of the queries: {lse * log2(e), delta, 0, 0}
  TensorArguments grad_key, grad_value;
  float* sums;  // see HopperSums
  Geometry geometry;
  int tiles[3];  // blocks along each axis of the longest dilation group
  const void* rpb;
};

// Where the gradient of a query is added up: [batch, heads, dilation groups, positions of the longest one, head_dim], float32, zero at
// first. Chunks of 8 channels are swapped within four, so that a warp's stores on the way there meet no bank conflict.
struct HopperSums {
  static FASTNA_DEVICE i64 row(const Geometry& geometry, int batch, int head, const int (&group)[3], const int (&position)[3]) {
    i64 index = static_cast<i64>(batch) * geometry.heads + head;
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) index = index * geometry.axis[a].dilation + group[a];
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) index = index * group_length(geometry.axis[a], 0) + position[a];
    return index;
  }
  static FASTNA_DEVICE int chunk(int channels, int last_position) { return channels ^ (last_position & 3); }
};

// Registers of each thread that copies or adds up, and of each that multiplies. Bias: NoBias or a HopperBias.
template <class Tiles_, int PRODUCER_REGISTERS_, int CONSUMER_REGISTERS_, class Bias_ = NoBias>
struct HopperJointConfig {
  using Tiles = Tiles_;
  using Bias = Bias_;
  static constexpr int PRODUCER_REGISTERS = PRODUCER_REGISTERS_, CONSUMER_REGISTERS = CONSUMER_REGISTERS_;
};

template <class Config>
struct HopperJoint {
  using Tiles = typename Config::Tiles;
  using T = typename Tiles::Element;
  using Place = HopperPlace<Tiles>;
  using Walk = typename Place::Walk;
  using Products = HopperProducts<Tiles>;
  using Bias = typename Config::Bias;
  static constexpr bool BIAS = Bias::PRESENT;
  static constexpr int D = Tiles::HEAD_DIM, N = Tiles::COLUMNS, GROUPS = Tiles::WARPGROUPS, STAGES = Tiles::STAGES;
  static constexpr int ROW = Tiles::ROW_BYTES, SLICE = Tiles::SLICE;
  // A warpgroup sums up grad_query of 64 queries of the box: its own, or all share them and it has a slice of the channels.
  static constexpr bool SHARED_QUERIES = N == 64;
  static constexpr int PART = SHARED_QUERIES ? SLICE : D;  // channels
  static constexpr int SLOPES_BYTES = 64 * N * 2;          // of a warpgroup's ds^T
  static constexpr int ALL_CONSUMERS = 7;                  // named barrier
  static_assert(Tiles::INVERSE, "rows are keys");
  static_assert(SHARED_QUERIES ? GROUPS == Tiles::SLICES : N == 64 * GROUPS, "the warpgroups divide grad_query among them");
  static_assert(Tiles::C[0] * Tiles::C[1] <= 32, "one lane per line of a box adds it up");

  struct Shared {
    u8 key[GROUPS][Tiles::ROWS_BYTES], value[GROUPS][Tiles::ROWS_BYTES];
    u8 query[STAGES][Tiles::BOX_BYTES], grad_output[STAGES][Tiles::BOX_BYTES];
    u8 slopes[2][GROUPS][SLOPES_BYTES];  // one is written while the last one may still be multiplied
    float grad_query[N][D];
    float4 statistics[STAGES][N];  // come and go with grad_output
    MemoryBarrier rows_full, query_full[STAGES], query_empty[STAGES], grad_full[STAGES], grad_empty[STAGES], sums_full, sums_empty;
    typename Place::Windows windows[GROUPS];
  };

  const HopperJointArguments& args;
  Shared& shared;
  const Place& place;
  const int shared_heads;  // query heads that share the rows

  FASTNA_DEVICE HopperJoint(const HopperJointArguments& args_, Shared& shared_, const Place& place_)
      : args(args_), shared(shared_), place(place_), shared_heads(args_.geometry.heads / args_.geometry.key_heads) {}

  FASTNA_DEVICE int steps() const { return place.steps() * shared_heads; }
  static FASTNA_DEVICE int stage(int step) { return step % STAGES; }
  static FASTNA_DEVICE u32 parity(int step) { return step / STAGES & 1; }

  // One thread: the rows once, then every box of queries as its stage falls free.
  FASTNA_DEVICE void produce() {
    barrier_expect(shared.rows_full, 2 * GROUPS * Tiles::ROWS_BYTES);
    FASTNA_UNROLL
    for (int w = 0; w < GROUPS; ++w) {
      int first[3];
      place.own_origin(w, first);
      place.copy_slices(shared.key[w], 64, args.key, shared.rows_full, place.head * D, first);
      place.copy_slices(shared.value[w], 64, args.value, shared.rows_full, place.head * D, first);
    }
    Walk walk{0, {0, 0, 0}, 0};
    for (const int count = steps(); walk.step < count; place.advance(walk)) {
      const int s = stage(walk.step), head = place.head * shared_heads + walk.head;
      const int at[3] = {place.box_begin(walk, 0), place.box_begin(walk, 1), place.box_begin(walk, 2)};
      barrier_wait(shared.query_empty[s], parity(walk.step) ^ 1);
      barrier_expect(shared.query_full[s], Tiles::BOX_BYTES);
      place.copy_slices(shared.query[s], N, args.query, shared.query_full[s], head * D, at);
      barrier_wait(shared.grad_empty[s], parity(walk.step) ^ 1);
      barrier_expect(shared.grad_full[s], Tiles::BOX_BYTES + N * sizeof(float4));
      place.copy_slices(shared.grad_output[s], N, args.grad_output, shared.grad_full[s], head * D, at);
      copy_box(shared.statistics[s], args.statistics, shared.grad_full[s], head * 4, place.token(2, at[2]), place.token(1, at[1]),
               place.token(0, at[0]), place.batch);
    }
  }

  // One warp: adds what a box of queries owes to this block's keys to the sums, a line per lane.
  FASTNA_DEVICE void add_up() {
    const int lane = lane_index(), c0 = lane / Tiles::C[1], c1 = lane % Tiles::C[1];
    Walk walk{0, {0, 0, 0}, 0};
    for (const int count = steps(); walk.step < count; place.advance(walk)) {
      const int at[3] = {place.box_begin(walk, 0) + c0, place.box_begin(walk, 1) + c1, place.box_begin(walk, 2)};
      const int size = minimum(Tiles::C[2], place.length[2] - at[2]);
      barrier_wait(shared.sums_full, walk.step & 1);
      if (lane < Tiles::C[0] * Tiles::C[1] && at[0] < place.length[0] && at[1] < place.length[1] && size > 0) {
        const int head = place.head * shared_heads + walk.head;
        reduce_add(args.sums + HopperSums::row(args.geometry, place.batch, head, place.group, at) * D, shared.grad_query[lane * Tiles::C[2]],
                   size * D * sizeof(float));
        commit_reductions();
        wait_reductions_read();
      }
      sync_warp();
      if (lane == 0) barrier_arrive(shared.sums_empty);
    }
  }

  // 128 threads: the gradients of 64 keys over the boxes that see them, and a part of every box's.
  FASTNA_DEVICE void consume(int w) {
    const int thread = thread_index() & 127, lane = lane_index(), quad = lane & 3;
    const int row = thread / 32 * 16 + lane / 4;  // and row + 8
    int own[3];
    place.own_origin(w, own);
    HopperSight<Tiles> sight(place, own, thread, shared.windows[w]);
    // Nobody sees a row that is no key. Elsewhere its garbage stays its own; here it would be multiplied by a row of zeros, and might be infinite.
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) {
      if (own[a] + Tiles::R[a] <= place.length[a]) continue;
      sight.all[a] = {0, 0};
      if (thread < 64 && own[a] + Place::row_offset(thread, a) >= place.length[a]) shared.windows[w][a][thread] = {0, 0};
    }
    const HopperBiasTable<Bias, Tiles> bias(reinterpret_cast<float*>(&shared + 1), own, row, quad);
    if constexpr (BIAS) {
      bias.load(args.rpb, place.head * shared_heads, w * 128 + thread, GROUPS * 128);
      named_barrier(ALL_CONSUMERS, GROUPS * 128);
    } else {
      named_barrier(1 + w, 128);
    }
    barrier_wait(shared.rows_full, 0);

    const float scale = args.geometry.scale * LOG2_E;
    float scores[N / 2], slopes[N / 2];  // s, then p; dp, then ds
    u32 weights[N / 4], packed_slopes[N / 4];
    float grad_key[D / 2], grad_value[D / 2];
    FASTNA_UNROLL
    for (int i = 0; i < D / 2; ++i) grad_key[i] = grad_value[i] = 0.0f;

    const auto release = [&](MemoryBarrier& barrier) {
      if (lane == 0) barrier_arrive(barrier);
    };
    // The weights of a box, and what its scores' gradients are.
    const auto differentiate = [&](const Walk& walk) {
      const float4* statistics = shared.statistics[stage(walk.step)];
      wgmma_wait<1>();
      if constexpr (BIAS) bias.add(scores, place, walk, scale);
      sight.hide(scores, walk, row, quad);
      FASTNA_UNROLL
      for (int i = 0; i < N / 2; ++i) scores[i] = exp2_approx(scores[i] * (BIAS ? 1.0f : scale) - statistics[i / 4 * 8 + 2 * quad + (i & 1)].x);
      wgmma_wait<0>();
      FASTNA_UNROLL
      for (int i = 0; i < N / 4; ++i) {
        const float4* pair = statistics + i / 2 * 8 + 2 * quad;
        weights[i] = pack2<T>(scores[2 * i], scores[2 * i + 1]);
        packed_slopes[i] = pack2<T>(scores[2 * i] * (slopes[2 * i] - pair[0].y), scores[2 * i + 1] * (slopes[2 * i + 1] - pair[1].y));
      }
    };
    // ds^T, rows of 64 queries: what the transposed operand of a product wants.
    const auto leave_slopes = [&](int step) {
      u8* to = shared.slopes[step & 1][w];
      FASTNA_UNROLL
      for (int i = 0; i < N / 4; ++i) {
        const int tile = i / 2;
        *reinterpret_cast<u32*>(to + tile / 8 * (64 * 128) + swizzled_chunk<128>(row + i % 2 * 8, tile % 8) + quad * 4) = packed_slopes[i];
      }
      fence_async_reads();
    };
    const auto multiply_slopes = [&](float(&result)[PART / 2], int step) {
      named_barrier(ALL_CONSUMERS, GROUPS * 128);
      wgmma_fence();
      FASTNA_UNROLL
      for (int v = 0; v < GROUPS; ++v) {
        const u32 factors = shared_address(shared.slopes[step & 1][v]) + (SHARED_QUERIES ? 0 : w * 64 * 128);
        const u32 keys = shared_address(shared.key[v]) + (SHARED_QUERIES ? w * 64 * ROW : 0);
        FASTNA_UNROLL
        for (int k = 0; k < 4; ++k)
          Wgmma<PART>::template product_both_transposed<T>(result, matrix_descriptor<128>(factors + k * 16 * 128),
                                                           matrix_descriptor<ROW>(keys + k * 16 * ROW, 64 * ROW), v + k != 0);
      }
      wgmma_commit();
    };
    // To where add_up takes them from.
    const auto leave_sums = [&](const Walk& walk, const float(&result)[PART / 2]) {
      barrier_wait(shared.sums_empty, (walk.step & 1) ^ 1);
      const int query = (SHARED_QUERIES ? 0 : w * 64) + row, first_chunk = SHARED_QUERIES ? w * (PART / 8) : 0;
      const int position = place.box_begin(walk, 2) + query % Tiles::C[2];  // eight queries further it is the same modulo 4
      FASTNA_UNROLL
      for (int i = 0; i < PART / 4; ++i) {
        float* to = shared.grad_query[query + i % 2 * 8] + HopperSums::chunk(first_chunk + i / 2, position) * 8 + quad * 2;
        *reinterpret_cast<float2*>(to) = {result[2 * i], result[2 * i + 1]};
      }
      fence_async_reads();
      sync_warp();
      release(shared.sums_full);
    };

    Walk walk{0, {0, 0, 0}, 0};
    for (const int count = steps(); walk.step < count; place.advance(walk)) {
      const int s = stage(walk.step);
      float grad_query[PART / 2];
      barrier_wait(shared.query_full[s], parity(walk.step));
      if (sight.needs(walk)) {
        Products::multiply(scores, shared_address(shared.key[w]), shared_address(shared.query[s]));
        barrier_wait(shared.grad_full[s], parity(walk.step));
        Products::multiply(slopes, shared_address(shared.value[w]), shared_address(shared.grad_output[s]));
        differentiate(walk);
        leave_slopes(walk.step);
        Products::add(grad_value, weights, shared_address(shared.grad_output[s]));
        Products::add(grad_key, packed_slopes, shared_address(shared.query[s]));
        multiply_slopes(grad_query, walk.step);
        wgmma_wait<1>();
        release(shared.query_empty[s]);
        release(shared.grad_empty[s]);
        wgmma_wait<0>();
        leave_sums(walk, grad_query);
      } else {
        // A stage is released only after it was filled, and by a warp whose lanes have all waited: see hopper_gradient.cuh.
        barrier_wait(shared.grad_full[s], parity(walk.step));
        sync_warp();
        release(shared.query_empty[s]);
        release(shared.grad_empty[s]);
        FASTNA_UNROLL
        for (int i = 0; i < N / 4; ++i) packed_slopes[i] = 0;
        leave_slopes(walk.step);
        multiply_slopes(grad_query, walk.step);
        wgmma_wait<0>();
        leave_sums(walk, grad_query);
      }
    }
    // Nobody multiplies with these keys any more.
    named_barrier(ALL_CONSUMERS, GROUPS * 128);
    if (sight.idle) return;
    place.store(w, own, thread, grad_key, args.geometry.scale, shared.key[w], args.grad_key);
    place.store(w, own, thread, grad_value, 1.0f, shared.value[w], args.grad_value);
  }
};

template <class Config>
FASTNA_DEVICE void hopper_joint(const HopperJointArguments& args) {
  using Kernel = HopperJoint<Config>;
  using Tiles = typename Config::Tiles;
  auto& shared = *dynamic_shared<typename Kernel::Shared>();
  const HopperPlace<Tiles> place(args.geometry, args.tiles, args.geometry.key_heads);
  if (place.empty) return;
  if (thread_index() == 0) {
    barrier_init(shared.rows_full, 1);
    barrier_init(shared.sums_full, 4 * Tiles::WARPGROUPS);  // one arrival per warp
    barrier_init(shared.sums_empty, 1);
    for (int s = 0; s < Kernel::STAGES; ++s) {
      barrier_init(shared.query_full[s], 1);
      barrier_init(shared.grad_full[s], 1);
      barrier_init(shared.query_empty[s], 4 * Tiles::WARPGROUPS);
      barrier_init(shared.grad_empty[s], 4 * Tiles::WARPGROUPS);
    }
    barrier_init_done();
  }
  sync_threads();
  Kernel kernel(args, shared, place);
  const int warp = warp_index();
  if (warp < 4) {
    shrink_registers<Config::PRODUCER_REGISTERS>();
    if (thread_index() == 0) kernel.produce();
    if (warp == 1) kernel.add_up();
  } else {
    grow_registers<Config::CONSUMER_REGISTERS>();
    kernel.consume(warp / 4 - 1);
  }
}

}  // namespace fastna
