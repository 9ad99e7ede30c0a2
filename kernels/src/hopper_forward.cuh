// Fused neighborhood attention for large windows on Hopper (sm_90a): tensor copies, wgmma, specialised warps. Forward.
//
// Rows are queries, columns keys: see hopper_tiles.cuh. Warpgroup 0 only copies; every other one computes the attention of 64 queries.
// While the softmax of one box runs on the ordinary units, the next box's scores and the last one's P V run on the matrix units
// (FlashAttention-3, arXiv 2407.08608, section 3.2).
#pragma once

#include "fastna/hopper_additional.cuh"
#include "fastna/hopper_bias.cuh"
#include "fastna/hopper_products.cuh"

namespace fastna {

struct HopperForwardArguments {
  TensorMap query, key, value;
  TensorMap additional_keys, additional_values;  // a box is a row of as many tokens as one of keys has
  TensorArguments output;
  float* lse;  // [batch, *space, heads], contiguous, natural logarithm
  Geometry geometry;
  int tiles[3];  // blocks along each axis of the longest dilation group
  const void* rpb;
};

// REGISTERS: of each thread that multiplies. Bias: NoBias or a HopperBias. ADDITIONAL: there are keys that every query sees.
template <class Tiles_, int REGISTERS, class Bias_ = NoBias, bool ADDITIONAL_ = false>
struct HopperForwardConfig {
  static constexpr bool ADDITIONAL = ADDITIONAL_;
  using Tiles = Tiles_;
  using Bias = Bias_;
  static constexpr int CONSUMER_REGISTERS = REGISTERS;
};

template <class Config>
struct HopperForward {
  using Tiles = typename Config::Tiles;
  using T = typename Tiles::Element;
  using Place = HopperPlace<Tiles>;
  using Walk = typename Place::Walk;
  using Products = HopperProducts<Tiles>;
  using Bias = typename Config::Bias;
  static constexpr bool BIAS = Bias::PRESENT, ADDITIONAL = Config::ADDITIONAL;
  static constexpr int D = Tiles::HEAD_DIM, N = Tiles::COLUMNS, STAGES = Tiles::STAGES, GROUPS = Tiles::WARPGROUPS;
  static constexpr bool TURNS = GROUPS == 2;
  static constexpr int ALL_CONSUMERS = 7, FIRST_TURN = 8;  // named barriers
  static constexpr float SLACK = 8.0f;  // log2

  struct Shared {
    u8 query[GROUPS][Tiles::ROWS_BYTES];
    u8 key[STAGES][Tiles::BOX_BYTES];
    u8 value[STAGES][Tiles::BOX_BYTES];
    MemoryBarrier query_full, key_full[STAGES], value_full[STAGES], key_empty[STAGES], value_empty[STAGES];
    typename Place::Windows windows[GROUPS];
  };

  const HopperForwardArguments& args;
  Shared& shared;
  const Place& place;
  const HopperBoxes<Tiles, ADDITIONAL> boxes;

  FASTNA_DEVICE HopperForward(const HopperForwardArguments& args_, Shared& shared_, const Place& place_)
      : args(args_), shared(shared_), place(place_), boxes{place_} {}

  static FASTNA_DEVICE int stage(int step) { return step % STAGES; }
  static FASTNA_DEVICE u32 parity(int step) { return step / STAGES & 1; }

  // One thread: the queries once, then every box of keys as its stage falls free.
  FASTNA_DEVICE void produce() {
    barrier_expect(shared.query_full, GROUPS * Tiles::ROWS_BYTES);
    FASTNA_UNROLL
    for (int w = 0; w < GROUPS; ++w) {
      int first[3];
      place.own_origin(w, first);
      place.copy_slices(shared.query[w], 64, args.query, shared.query_full, place.head * D, first);
    }
    const int channel = place.head / (args.geometry.heads / args.geometry.key_heads) * D;
    Walk walk{0, {0, 0, 0}, 0};
    for (const int count = boxes.steps(); walk.step < count; place.advance(walk)) {
      const int s = stage(walk.step);
      const u32 free = parity(walk.step) ^ 1;
      const int first[3] = {place.box_begin(walk, 0), place.box_begin(walk, 1), place.box_begin(walk, 2)};
      barrier_wait(shared.key_empty[s], free);
      barrier_expect(shared.key_full[s], Tiles::BOX_BYTES);
      boxes.copy(shared.key[s], walk.step, args.key, args.additional_keys, shared.key_full[s], channel, first);
      barrier_wait(shared.value_empty[s], free);
      barrier_expect(shared.value_full[s], Tiles::BOX_BYTES);
      boxes.copy(shared.value[s], walk.step, args.value, args.additional_values, shared.value_full[s], channel, first);
    }
  }

  // 128 threads: attention of 64 queries over the boxes they need.
  FASTNA_DEVICE void consume(int w) {
    const int thread = thread_index() & 127, lane = lane_index(), quad = lane & 3;
    const int row = thread / 32 * 16 + lane / 4;  // and row + 8
    int own[3];
    place.own_origin(w, own);
    const HopperSight<Tiles> sight(place, own, thread, shared.windows[w]);
    const HopperBiasTable<Bias, Tiles> bias(reinterpret_cast<float*>(&shared + 1), own, row, quad);
    if constexpr (BIAS) {
      bias.load(args.rpb, place.head, w * 128 + thread, GROUPS * 128);
      named_barrier(ALL_CONSUMERS, GROUPS * 128);
    } else {
      named_barrier(1 + w, 128);
    }
    barrier_wait(shared.query_full, 0);

    const float scale = args.geometry.scale * LOG2_E;
    const float unit = BIAS ? 1.0f : scale;  // what makes exponents of 2 of scores: the bias is added to scaled ones
    const u32 query = shared_address(shared.query[w]);
    float scores[N / 2], output[D / 2];
    u32 weights[N / 4];
    float peak[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f}, rescale[2];
    FASTNA_UNROLL
    for (int i = 0; i < D / 2; ++i) output[i] = 0.0f;

    const auto release = [&](MemoryBarrier& barrier) {
      if (lane == 0) barrier_arrive(barrier);
    };
    const auto multiply_query_key = [&](int step) {
      barrier_wait(shared.key_full[stage(step)], parity(step));
      Products::multiply(scores, query, shared_address(shared.key[stage(step)]));
    };
    const auto multiply_weights_value = [&](int step) {
      barrier_wait(shared.value_full[stage(step)], parity(step));
      Products::add(output, weights, shared_address(shared.value[stage(step)]));
    };
    // Scores become weights 2^(unit (s - peak)); the sums and what is already summed up are brought to the new peak.
    const auto soften = [&](const Walk& walk) {
      if (boxes.is_additional(walk.step)) {
        boxes.hide(scores, walk.step, quad, BIAS ? scale : 1.0f);
      } else {
        if constexpr (BIAS) bias.add(scores, place, walk, scale);
        sight.hide(scores, walk, row, quad);
      }
      FASTNA_UNROLL
      for (int half_ = 0; half_ < 2; ++half_) {
        float top = peak[half_];
        FASTNA_UNROLL
        for (int i = half_ * 2; i < N / 2; i += 4) top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        // A peak that is a little too low only makes weights up to 2^SLACK; keeping it spares the rescaling of the output.
        if ((top - peak[half_]) * unit <= SLACK) top = peak[half_];
        rescale[half_] = exp2_approx((peak[half_] - top) * unit);
        peak[half_] = top;
        const float shift = top * unit;
        float total = 0.0f;
        FASTNA_UNROLL
        for (int i = half_ * 2; i < N / 2; i += 4) {
          scores[i] = exp2_approx(scores[i] * unit - shift);
          scores[i + 1] = exp2_approx(scores[i + 1] * unit - shift);
          total += scores[i] + scores[i + 1];
        }
        sum[half_] = sum[half_] * rescale[half_] + total;
      }
    };
    const auto pack = [&]() {
      FASTNA_UNROLL
      for (int i = 0; i < N / 4; ++i) weights[i] = pack2<T>(scores[2 * i], scores[2 * i + 1]);
    };
    const auto rescale_output = [&]() {
      if (all_in_warp(rescale[0] == 1.0f && rescale[1] == 1.0f)) return;
      FASTNA_UNROLL
      for (int i = 0; i < D / 2; ++i) output[i] *= rescale[i >> 1 & 1];
    };

    // Two warpgroups take turns on the matrix units: while one multiplies, the other works on its softmax. There is a turn for
    // every box, needed or not: else one warpgroup could wait for a turn that the other takes only when it sees a later box.
    const auto begin_turn = [&]() {
      if constexpr (TURNS) named_barrier(FIRST_TURN + w, 256);
    };
    const auto end_turn = [&]() {
      if constexpr (TURNS) named_barrier_arrive(FIRST_TURN + (w ^ 1), 256);
    };
    if (w == 1) end_turn();

    const int count = boxes.steps();
    Walk walk{0, {0, 0, 0}, 0};
    const auto skip_unneeded = [&]() {
      for (; walk.step < count && !boxes.needs(sight, walk); place.advance(walk)) {
        begin_turn();
        end_turn();
        // The stage is released only after it was filled: an arrival before that would count for its last use. Every warp releases it
        // for itself, after all its lanes have waited: whoever still waits while the stage is filled anew twice would wait for ever.
        barrier_wait(shared.key_full[stage(walk.step)], parity(walk.step));
        barrier_wait(shared.value_full[stage(walk.step)], parity(walk.step));
        sync_warp();
        release(shared.key_empty[stage(walk.step)]);
        release(shared.value_empty[stage(walk.step)]);
      }
    };
    while (true) {
      skip_unneeded();
      if (walk.step >= count) break;
      begin_turn();
      multiply_query_key(walk.step);
      end_turn();
      wgmma_wait<0>();
      release(shared.key_empty[stage(walk.step)]);
      soften(walk);
      rescale_output();
      pack();
      int last = walk.step;
      place.advance(walk);
      while (walk.step < count && boxes.needs(sight, walk)) {
        begin_turn();
        multiply_query_key(walk.step);
        multiply_weights_value(last);
        end_turn();
        wgmma_wait<1>();
        release(shared.key_empty[stage(walk.step)]);
        soften(walk);
        wgmma_wait<0>();
        release(shared.value_empty[stage(last)]);
        rescale_output();
        pack();
        last = walk.step;
        place.advance(walk);
      }
      // The next box is not this warpgroup's: its stages must not be waited for while an older value is still held.
      multiply_weights_value(last);
      wgmma_wait<0>();
      release(shared.value_empty[stage(last)]);
    }
    if (sight.idle) return;
    FASTNA_UNROLL
    for (int half_ = 0; half_ < 2; ++half_) {
      float total = sum[half_];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const float inverse = 1.0f / total;
      FASTNA_UNROLL
      for (int i = half_ * 2; i < D / 2; i += 4) {
        output[i] *= inverse;
        output[i + 1] *= inverse;
      }
      int at[3];
      if (quad == 0 && place.locate(own, row + 8 * half_, at))
        args.lse[place.query_index(at)] = (peak[half_] * unit + log2_approx(total)) * LN_2;
    }
    place.store(w, own, thread, output, 1.0f, shared.query[w], args.output);
  }
};

template <class Config>
FASTNA_DEVICE void hopper_forward(const HopperForwardArguments& args) {
  using Kernel = HopperForward<Config>;
  auto& shared = *dynamic_shared<typename Kernel::Shared>();
  const HopperPlace<typename Config::Tiles> place(args.geometry, args.tiles, args.geometry.heads);
  if (place.empty) return;
  Kernel kernel(args, shared, place);
  if (thread_index() == 0) {
    barrier_init(shared.query_full, 1);
    for (int s = 0; s < Kernel::STAGES; ++s) {
      barrier_init(shared.key_full[s], 1);
      barrier_init(shared.value_full[s], 1);
      barrier_init(shared.key_empty[s], 4 * Kernel::GROUPS);  // one arrival per warp
      barrier_init(shared.value_empty[s], 4 * Kernel::GROUPS);
    }
    barrier_init_done();
  }
  sync_threads();
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
