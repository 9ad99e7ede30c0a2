// Gradients of neighborhood attention for large windows on Hopper (sm_90a): tensor copies, wgmma, specialised warps.
//
//   p = exp(s - lse)    ds = p * (dp - delta)    grad_query = scale * ds key
//   dp = grad_output value^T                     grad_key = scale * ds^T query    grad_value = p^T grad_output
//
// One kernel, two ways. Rows are queries: a row's two vectors are query and grad_output, key and value stream past, and one gradient
// is summed up. Rows are keys: theirs are key and value, query and grad_output of all heads that share them stream past, and two
// gradients are summed up; or one of them per launch, where registers do not hold both. Nothing is added by more than one block, so the result is the same bits every time.
//
// Weights and their gradients go to the second products in registers: an accumulator of s^T or ds^T is laid out as the operand wants it.
#pragma once

#include "fastna/hopper_additional.cuh"
#include "fastna/hopper_bias.cuh"
#include "fastna/hopper_products.cuh"

namespace fastna {

struct HopperGradientArguments {
  TensorMap first_rows, second_rows, first_columns, second_columns;
  TensorMap additional_keys, additional_values;  // rows are queries; a box is a row of as many tokens as one of columns has
  TensorMap column_statistics;     // rows are keys: of the queries
  const float4* row_statistics;    // rows are queries: [batch, *space, heads] of {lse * log2(e), delta, 0, 0}
  TensorArguments grad_first, grad_second;  // grad_query; or grad_key and grad_value
  Geometry geometry;
  int tiles[3];  // blocks along each axis of the longest dilation group
  const void* rpb;
};

// QUEUED: dp of a box is asked for before the last box's gradients are summed up. It keeps the matrix units busy longer, and costs the
// registers of the factors of those sums.
// FIRST, SECOND: which gradients are summed up, grad_query or grad_key, and grad_value. Bias: NoBias or a HopperBias.
// ADDITIONAL: there are keys that every query sees, and rows are queries.
template <class Tiles_, int REGISTERS, bool QUEUED_, bool FIRST_, bool SECOND_, class Bias_ = NoBias, bool ADDITIONAL_ = false>
struct HopperGradientConfig {
  using Tiles = Tiles_;
  using Bias = Bias_;
  static constexpr int CONSUMER_REGISTERS = REGISTERS;
  static constexpr bool QUEUED = QUEUED_, FIRST = FIRST_, SECOND = SECOND_;
  static constexpr bool KEYS = Tiles::INVERSE;  // rows are keys
  static constexpr bool ADDITIONAL = ADDITIONAL_;
  static_assert(FIRST || SECOND, "a gradient is summed up");
  static_assert(KEYS || !SECOND, "queries have one gradient");
  static_assert(FIRST || !QUEUED, "dp is for the first gradient");
  static_assert(!KEYS || !ADDITIONAL, "additional keys owe nothing to those of the map");
};

template <class Config>
struct HopperGradient {
  using Tiles = typename Config::Tiles;
  using T = typename Tiles::Element;
  using Place = HopperPlace<Tiles>;
  using Walk = typename Place::Walk;
  using Products = HopperProducts<Tiles>;
  using Bias = typename Config::Bias;
  static constexpr bool KEYS = Config::KEYS, FIRST = Config::FIRST, SECOND = Config::SECOND, QUEUED = Config::QUEUED;
  static constexpr int D = Tiles::HEAD_DIM, N = Tiles::COLUMNS, GROUPS = Tiles::WARPGROUPS;
  static constexpr bool BIAS = Bias::PRESENT;
  static constexpr int ALL_CONSUMERS = 7;  // named barrier
  // A box is held until the next one's scores are computed, save for the second half where it has no gradient.
  static constexpr int STAGES = Tiles::STAGES, SECOND_STAGES = SECOND ? STAGES : minimum(STAGES, 2);
  static_assert(STAGES >= 2, "two boxes are in use at once");

  struct Shared {
    u8 first_rows[GROUPS][Tiles::ROWS_BYTES];
    u8 second_rows[FIRST ? GROUPS : 1][FIRST ? Tiles::ROWS_BYTES : 1024];
    u8 first[STAGES][Tiles::BOX_BYTES], second[SECOND_STAGES][Tiles::BOX_BYTES];
    float4 statistics[KEYS ? SECOND_STAGES : 1][KEYS ? N : 1];  // come and go with `second`
    MemoryBarrier rows_full, first_full[STAGES], first_empty[STAGES], second_full[SECOND_STAGES], second_empty[SECOND_STAGES];
    typename Place::Windows windows[GROUPS];
  };

  const HopperGradientArguments& args;
  Shared& shared;
  const Place& place;
  const HopperBoxes<Tiles, Config::ADDITIONAL> boxes;
  const int shared_heads;  // rows are keys: query heads that share them

  FASTNA_DEVICE HopperGradient(const HopperGradientArguments& args_, Shared& shared_, const Place& place_)
      : args(args_), shared(shared_), place(place_), boxes{place_}, shared_heads(KEYS ? args_.geometry.heads / args_.geometry.key_heads : 1) {}

  FASTNA_DEVICE int steps() const { return boxes.steps() * shared_heads; }
  static FASTNA_DEVICE int first_stage(int step) { return step % STAGES; }
  static FASTNA_DEVICE u32 first_parity(int step) { return step / STAGES & 1; }
  static FASTNA_DEVICE int second_stage(int step) { return step % SECOND_STAGES; }
  static FASTNA_DEVICE u32 second_parity(int step) { return step / SECOND_STAGES & 1; }

  FASTNA_DEVICE int first_column_head() const {
    return KEYS ? place.head * shared_heads : place.head / (args.geometry.heads / args.geometry.key_heads);
  }

  // One thread: the rows once, then every box of columns as its stage falls free.
  FASTNA_DEVICE void produce() {
    barrier_expect(shared.rows_full, (FIRST ? 2 : 1) * GROUPS * Tiles::ROWS_BYTES);
    FASTNA_UNROLL
    for (int w = 0; w < GROUPS; ++w) {
      int first[3];
      place.own_origin(w, first);
      place.copy_slices(shared.first_rows[w], 64, args.first_rows, shared.rows_full, place.head * D, first);
      if constexpr (FIRST) place.copy_slices(shared.second_rows[w], 64, args.second_rows, shared.rows_full, place.head * D, first);
    }
    const int first_head = first_column_head();
    Walk walk{0, {0, 0, 0}, 0};
    for (const int count = steps(); walk.step < count; place.advance(walk)) {
      const int f = first_stage(walk.step), s = second_stage(walk.step), head = first_head + walk.head;
      const int at[3] = {place.box_begin(walk, 0), place.box_begin(walk, 1), place.box_begin(walk, 2)};
      barrier_wait(shared.first_empty[f], first_parity(walk.step) ^ 1);
      barrier_expect(shared.first_full[f], Tiles::BOX_BYTES);
      boxes.copy(shared.first[f], walk.step, args.first_columns, args.additional_keys, shared.first_full[f], head * D, at);
      barrier_wait(shared.second_empty[s], second_parity(walk.step) ^ 1);
      barrier_expect(shared.second_full[s], Tiles::BOX_BYTES + (KEYS ? N * sizeof(float4) : 0));
      boxes.copy(shared.second[s], walk.step, args.second_columns, args.additional_values, shared.second_full[s], head * D, at);
      if constexpr (KEYS)
        copy_box(shared.statistics[s], args.column_statistics, shared.second_full[s], head * 4, place.token(2, at[2]), place.token(1, at[1]),
                 place.token(0, at[0]), place.batch);
    }
  }

  // 128 threads: the gradients of 64 rows over the boxes they need.
  FASTNA_DEVICE void consume(int w) {
    const int thread = thread_index() & 127, lane = lane_index(), quad = lane & 3;
    const int row = thread / 32 * 16 + lane / 4;  // and row + 8
    int own[3];
    place.own_origin(w, own);
    const HopperSight<Tiles> sight(place, own, thread, shared.windows[w]);
    float2 statistics[2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};  // of the rows, where they are queries
    if constexpr (!KEYS) {
      FASTNA_UNROLL
      for (int half_ = 0; half_ < 2; ++half_) {
        int at[3];
        if (place.locate(own, row + 8 * half_, at)) {
          const float4 both = load_readonly(args.row_statistics + place.query_index(at));
          statistics[half_] = {both.x, both.y};
        }
      }
    }
    const HopperBiasTable<Bias, Tiles> bias(reinterpret_cast<float*>(&shared + 1), own, row, quad);
    if constexpr (BIAS) {
      bias.load(args.rpb, KEYS ? first_column_head() : place.head, w * 128 + thread, GROUPS * 128);
      named_barrier(ALL_CONSUMERS, GROUPS * 128);
    } else {
      named_barrier(1 + w, 128);
    }
    barrier_wait(shared.rows_full, 0);

    const float scale = args.geometry.scale * LOG2_E;
    const u32 first_rows = shared_address(shared.first_rows[w]), second_rows = shared_address(shared.second_rows[FIRST ? w : 0]);
    float scores[N / 2], slopes[N / 2];  // s, then p; dp, then ds
    u32 weights[N / 4], packed_slopes[N / 4];
    float grad_first[D / 2], grad_second[D / 2];
    FASTNA_UNROLL
    for (int i = 0; i < D / 2; ++i) grad_first[i] = grad_second[i] = 0.0f;

    const auto release = [&](MemoryBarrier& barrier) {
      if (lane == 0) barrier_arrive(barrier);
    };
    const auto multiply_first = [&](int step) {
      barrier_wait(shared.first_full[first_stage(step)], first_parity(step));
      Products::multiply(scores, first_rows, shared_address(shared.first[first_stage(step)]));
    };
    const auto multiply_second = [&](int step) {
      barrier_wait(shared.second_full[second_stage(step)], second_parity(step));
      Products::multiply(slopes, second_rows, shared_address(shared.second[second_stage(step)]));
    };
    // lse (which = 0) or delta (1) of accumulator i: of its row, or of its column.
    const auto statistic = [&](int step, int i, int which) {
      if constexpr (KEYS) {
        const float4& column = shared.statistics[second_stage(step)][i / 4 * 8 + 2 * quad + (i & 1)];
        return which == 0 ? column.x : column.y;
      } else {
        const float2& own_row = statistics[i >> 1 & 1];
        return which == 0 ? own_row.x : own_row.y;
      }
    };

    const int count = steps();
    Walk walk{0, {0, 0, 0}, 0};
    const auto skip_unneeded = [&]() {
      for (; walk.step < count && !boxes.needs(sight, walk); place.advance(walk)) {
        // A stage is released only after it was filled: an arrival before that would count for its last use. Every warp releases it
        // for itself, after all its lanes have waited: whoever still waits while the stage is filled anew twice would wait for ever.
        barrier_wait(shared.first_full[first_stage(walk.step)], first_parity(walk.step));
        barrier_wait(shared.second_full[second_stage(walk.step)], second_parity(walk.step));
        sync_warp();
        release(shared.first_empty[first_stage(walk.step)]);
        release(shared.second_empty[second_stage(walk.step)]);
      }
    };
    // lse comes with the second half of a box.
    const auto weigh = [&]() {
      if constexpr (KEYS && !QUEUED) barrier_wait(shared.second_full[second_stage(walk.step)], second_parity(walk.step));
      if (boxes.is_additional(walk.step)) {
        boxes.hide(scores, walk.step, quad, BIAS ? scale : 1.0f);
      } else {
        if constexpr (BIAS) bias.add(scores, place, walk, scale);
        sight.hide(scores, walk, row, quad);
      }
      FASTNA_UNROLL
      for (int i = 0; i < N / 2; ++i) scores[i] = exp2_approx(scores[i] * (BIAS ? 1.0f : scale) - statistic(walk.step, i, 0));
    };
    const auto differentiate = [&]() {
      FASTNA_UNROLL
      for (int i = 0; i < N / 4; ++i) {
        if constexpr (SECOND) weights[i] = pack2<T>(scores[2 * i], scores[2 * i + 1]);
        if constexpr (FIRST) {
          const float low = scores[2 * i] * (slopes[2 * i] - statistic(walk.step, 2 * i, 1));
          const float high = scores[2 * i + 1] * (slopes[2 * i + 1] - statistic(walk.step, 2 * i + 1, 1));
          packed_slopes[i] = pack2<T>(low, high);
        }
      }
      if constexpr (!SECOND) {
        sync_warp();  // all lanes have read the statistics
        release(shared.second_empty[second_stage(walk.step)]);
      }
    };
    const auto add_gradients = [&](int step) {
      if constexpr (SECOND) Products::add(grad_second, weights, shared_address(shared.second[second_stage(step)]));
      if constexpr (FIRST) Products::add(grad_first, packed_slopes, shared_address(shared.first[first_stage(step)]));
    };
    const auto release_added = [&](int step) {
      release(shared.first_empty[first_stage(step)]);
      if constexpr (SECOND) release(shared.second_empty[second_stage(step)]);
    };
    while (true) {
      skip_unneeded();
      if (walk.step >= count) break;
      multiply_first(walk.step);
      if constexpr (FIRST) multiply_second(walk.step);
      wgmma_wait<FIRST>();
      weigh();
      wgmma_wait<0>();
      differentiate();
      int last = walk.step;
      place.advance(walk);
      while (walk.step < count && boxes.needs(sight, walk)) {
        // The weights of this box are computed while the last one's gradients are summed up.
        multiply_first(walk.step);
        add_gradients(last);
        if constexpr (QUEUED) multiply_second(walk.step);
        wgmma_wait<FIRST + SECOND + QUEUED>();
        weigh();
        wgmma_wait<QUEUED>();
        release_added(last);
        if constexpr (FIRST && !QUEUED) multiply_second(walk.step);
        wgmma_wait<0>();
        differentiate();
        last = walk.step;
        place.advance(walk);
      }
      add_gradients(last);
      wgmma_wait<0>();
      release_added(last);
    }
    if (sight.idle) return;
    if constexpr (FIRST) place.store(w, own, thread, grad_first, args.geometry.scale, shared.first_rows[w], args.grad_first);
    if constexpr (SECOND) place.store(w, own, thread, grad_second, 1.0f, FIRST ? shared.second_rows[w] : shared.first_rows[w], args.grad_second);
  }
};

template <class Config>
FASTNA_DEVICE void hopper_gradient(const HopperGradientArguments& args) {
  using Kernel = HopperGradient<Config>;
  using Tiles = typename Config::Tiles;
  auto& shared = *dynamic_shared<typename Kernel::Shared>();
  const HopperPlace<Tiles> place(args.geometry, args.tiles, Config::KEYS ? args.geometry.key_heads : args.geometry.heads);
  if (place.empty) return;
  if (thread_index() == 0) {
    barrier_init(shared.rows_full, 1);
    for (int s = 0; s < Kernel::STAGES; ++s) {
      barrier_init(shared.first_full[s], 1);
      barrier_init(shared.first_empty[s], 4 * Tiles::WARPGROUPS);  // one arrival per warp
    }
    for (int s = 0; s < Kernel::SECOND_STAGES; ++s) {
      barrier_init(shared.second_full[s], 1);
      barrier_init(shared.second_empty[s], 4 * Tiles::WARPGROUPS);
    }
    barrier_init_done();
  }
  sync_threads();
  Kernel kernel(args, shared, place);
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
