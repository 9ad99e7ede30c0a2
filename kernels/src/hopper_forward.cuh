// Fused neighborhood attention for large windows on Hopper (sm_90a): tensor copies, wgmma, specialised warps. Forward.
//
// One block computes WARPGROUPS boxes of 64 queries of one head and dilation group. Warpgroup 0 only copies: it streams the key and
// value boxes that cover the union of the block's windows, starting where the union starts. Every other warpgroup owns 64 queries,
// and multiplies a box only if it meets the union of its own windows; a box inside all of its windows needs no mask.
// While the softmax of one box runs on the ordinary units, the next box's scores and the last one's P V run on the matrix units
// (FlashAttention-3, arXiv 2407.08608, section 3.2).
#pragma once

#include "fastna/hopper.cuh"
#include "fastna/wgmma.cuh"
#include "fastna/window.cuh"

namespace fastna {

struct HopperForwardArguments {
  TensorMap query, key, value;
  TensorArguments output;
  float* lse;  // [batch, *space, heads], contiguous, natural logarithm
  Geometry geometry;
  int tiles[3];  // blocks along each axis of the longest dilation group
};

// Q: queries of one warpgroup along each axis, 64 in all. W: warpgroups along each axis. K: keys of a box along each axis.
// REGISTERS: of each thread that multiplies.
template <class T, int HEAD_DIM_, int Q0, int Q1, int Q2, int W0, int W1, int W2, int K0_, int K1_, int K2_, int STAGES_,
          int REGISTERS>
struct HopperConfig {
  using Element = T;
  static constexpr int HEAD_DIM = HEAD_DIM_, STAGES = STAGES_;
  static constexpr int Q[3] = {Q0, Q1, Q2}, W[3] = {W0, W1, W2}, K[3] = {K0_, K1_, K2_};
  static constexpr int WARPGROUPS = W0 * W1 * W2, KEYS = K0_ * K1_ * K2_;
  static constexpr int ROW_BYTES = HEAD_DIM % 64 == 0 ? 128 : HEAD_DIM % 32 == 0 ? 64 : 32;  // of a slice of channels, and its swizzle
  static constexpr int SLICE = ROW_BYTES / 2, SLICES = HEAD_DIM / SLICE;
  static constexpr int QUERY_BYTES = 64 * HEAD_DIM * 2, BOX_BYTES = KEYS * HEAD_DIM * 2;
  static constexpr int CONSUMER_REGISTERS = REGISTERS;
  static_assert(K1_ <= 32, "rows of a box are hidden by the bits of one word");
  static_assert(Q0 * Q1 * Q2 == 64, "a warpgroup multiplies 64 queries");
  static_assert(K2_ % 8 == 0 && KEYS % 16 == 0 && KEYS <= 256, "eight keys of a box lie in one row; wgmma takes 16 to 256");
  static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head_dim is a multiple of 16 up to 256");
};

// What a warpgroup or a block sees: boxes of positions, one interval per axis.
struct Box {
  Interval axis[3];
};

// Bits [begin, end) of 32; what lies outside them is cut off.
FASTNA_DEVICE u32 bits(int begin, int end) {
  const auto below = [](int i) { return i <= 0 ? 0u : i >= 32 ? ~0u : (1u << i) - 1; };
  return below(end) & ~below(begin);
}

// Chunk `c` of 16 bytes of row `r` in a slice with rows of ROW_BYTES: where TMA and wgmma expect it.
template <int ROW_BYTES>
FASTNA_DEVICE u32 swizzled_chunk(int r, int c) {
  constexpr int mask = ROW_BYTES / 16 - 1;
  return r * ROW_BYTES + ((c ^ ((r * ROW_BYTES >> 7) & mask)) << 4);
}

template <class Config>
struct HopperForward {
  using T = typename Config::Element;
  static constexpr int D = Config::HEAD_DIM, N = Config::KEYS, STAGES = Config::STAGES, GROUPS = Config::WARPGROUPS;
  static constexpr bool TURNS = GROUPS == 2;
  static constexpr int FIRST_TURN = 8;  // named barriers
  static constexpr float SLACK = 8.0f;  // log2
  static constexpr int ROW = Config::ROW_BYTES, SLICE = Config::SLICE, SLICES = Config::SLICES;

  struct Shared {
    u8 query[GROUPS][Config::QUERY_BYTES];
    u8 key[STAGES][Config::BOX_BYTES];
    u8 value[STAGES][Config::BOX_BYTES];
    MemoryBarrier query_full, key_full[STAGES], value_full[STAGES], key_empty[STAGES], value_empty[STAGES];
    Interval windows[GROUPS][3][64];
  };

  const HopperForwardArguments& args;
  Shared& shared;
  int batch, head, key_head;
  int origin[3], group[3], length[3];  // the block's first query, its dilation group and that group's length
  int start[3], boxes[3];              // first key of the union of the block's windows, and boxes along each axis
  bool empty;                          // the dilation group is shorter than the longest one, and ends before this block

  FASTNA_DEVICE HopperForward(const HopperForwardArguments& args_, Shared& shared_) : args(args_), shared(shared_) {
    u32 index = block_index();
    const auto next = [&](int count) {
      const int value = index % static_cast<u32>(count);
      index /= static_cast<u32>(count);
      return value;
    };
    // Tiles first: blocks that run together share keys in the L2 cache.
    FASTNA_UNROLL
    for (int a = 2; a >= 0; --a) origin[a] = next(args.tiles[a]) * Config::Q[a] * Config::W[a];
    FASTNA_UNROLL
    for (int a = 2; a >= 0; --a) group[a] = next(args.geometry.axis[a].dilation);
    head = next(args.geometry.heads);
    batch = index;
    key_head = head / (args.geometry.heads / args.geometry.key_heads);
    empty = false;
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) {
      const AxisArguments& axis = args.geometry.axis[a];
      length[a] = group_length(axis, group[a]);
      empty |= origin[a] >= length[a];
      const int last = minimum(origin[a] + Config::Q[a] * Config::W[a], length[a]) - 1;
      start[a] = window_at(axis, minimum(origin[a], last), length[a]).begin;
      boxes[a] = ceil_div(window_at(axis, last, length[a]).end - start[a], Config::K[a]);
    }
  }

  // A walk over the key boxes, the last axis fastest; the same in every warpgroup.
  struct Walk {
    int step, at[3];
    FASTNA_DEVICE void advance(const int (&boxes)[3]) {
      ++step;
      if (++at[2] < boxes[2]) return;
      at[2] = 0;
      if (++at[1] < boxes[1]) return;
      at[1] = 0;
      ++at[0];
    }
  };
  static FASTNA_DEVICE int stage(int step) { return step % STAGES; }
  static FASTNA_DEVICE u32 parity(int step) { return step / STAGES & 1; }
  FASTNA_DEVICE int steps() const { return boxes[0] * boxes[1] * boxes[2]; }
  FASTNA_DEVICE int box_begin(const Walk& walk, int a) const { return start[a] + walk.at[a] * Config::K[a]; }
  FASTNA_DEVICE int token(int a, int position) const { return position * args.geometry.axis[a].dilation + group[a]; }

  FASTNA_DEVICE void copy_slices(u8* to, int rows, const TensorMap& map, MemoryBarrier& full, int channel, const int (&first)[3]) {
    FASTNA_UNROLL
    for (int s = 0; s < SLICES; ++s)
      copy_box(to + s * rows * ROW, map, full, channel + s * SLICE, token(2, first[2]), token(1, first[1]), token(0, first[0]), batch);
  }

  // One thread: the queries once, then every box of the union as its stage falls free.
  FASTNA_DEVICE void produce() {
    barrier_expect(shared.query_full, GROUPS * Config::QUERY_BYTES);
    FASTNA_UNROLL
    for (int w = 0; w < GROUPS; ++w) {
      int first[3];
      own_origin(w, first);
      copy_slices(shared.query[w], 64, args.query, shared.query_full, head * D, first);
    }
    Walk walk{0, {0, 0, 0}};
    for (const int count = steps(); walk.step < count; walk.advance(boxes)) {
      const int s = stage(walk.step);
      const u32 free = parity(walk.step) ^ 1;
      const int first[3] = {box_begin(walk, 0), box_begin(walk, 1), box_begin(walk, 2)};
      barrier_wait(shared.key_empty[s], free);
      barrier_expect(shared.key_full[s], Config::BOX_BYTES);
      copy_slices(shared.key[s], N, args.key, shared.key_full[s], key_head * D, first);
      barrier_wait(shared.value_empty[s], free);
      barrier_expect(shared.value_full[s], Config::BOX_BYTES);
      copy_slices(shared.value[s], N, args.value, shared.value_full[s], key_head * D, first);
    }
  }

  FASTNA_DEVICE void own_origin(int w, int (&first)[3]) const {
    first[0] = origin[0] + w / (Config::W[1] * Config::W[2]) * Config::Q[0];
    first[1] = origin[1] + w / Config::W[2] % Config::W[1] * Config::Q[1];
    first[2] = origin[2] + w % Config::W[2] * Config::Q[2];
  }
  // Position of query `row` of a warpgroup along axis `a`, from the warpgroup's first.
  static FASTNA_DEVICE int row_offset(int row, int a) {
    return a == 2 ? row % Config::Q[2] : a == 1 ? row / Config::Q[2] % Config::Q[1] : row / (Config::Q[1] * Config::Q[2]);
  }

  // 128 threads: attention of 64 queries over the boxes they need.
  FASTNA_DEVICE void consume(int w) {
    const int thread = thread_index() & 127, lane = lane_index(), quad = lane & 3;
    const int row = thread / 32 * 16 + lane / 4;  // and row + 8
    int own[3];
    own_origin(w, own);
    bool idle = false;
    Box any, all;  // the union of this warpgroup's windows, and their intersection
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) {
      const AxisArguments& axis = args.geometry.axis[a];
      idle |= own[a] >= length[a];
      const int last = minimum(own[a] + Config::Q[a], length[a]) - 1;
      const Interval head_window = window_at(axis, minimum(own[a], length[a] - 1), length[a]);
      const Interval tail_window = window_at(axis, last, length[a]);
      any.axis[a] = {head_window.begin, tail_window.end};
      all.axis[a] = {tail_window.begin, head_window.end};
      if (thread < 64) {
        const int position = minimum(own[a] + row_offset(thread, a), length[a] - 1);
        shared.windows[w][a][thread] = window_at(axis, position, length[a]);
      }
    }
    named_barrier(1 + w, 128);
    barrier_wait(shared.query_full, 0);

    const float scale = args.geometry.scale * LOG2_E;
    const u32 query = shared_address(shared.query[w]);
    float scores[N / 2], output[D / 2];
    u32 weights[N / 4];
    float peak[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f}, rescale[2];
    FASTNA_UNROLL
    for (int i = 0; i < D / 2; ++i) output[i] = 0.0f;

    const auto needed = [&](const Walk& walk) {
      bool meets = !idle;
      FASTNA_UNROLL
      for (int a = 0; a < 3; ++a) {
        const int begin = box_begin(walk, a);
        meets &= begin < any.axis[a].end && begin + Config::K[a] > any.axis[a].begin;
      }
      return meets;
    };
    const auto release = [&](MemoryBarrier& barrier) {
      if (lane == 0) barrier_arrive(barrier);
    };
    const auto multiply_query_key = [&](int step) {
      barrier_wait(shared.key_full[stage(step)], parity(step));
      const u32 key = shared_address(shared.key[stage(step)]);
      wgmma_fence();
      FASTNA_UNROLL
      for (int k = 0; k < D / 16; ++k) {
        const int slice = k * 16 / SLICE, offset = k * 16 % SLICE * 2;
        Wgmma<N>::template product<T>(scores, matrix_descriptor<ROW>(query + slice * 64 * ROW + offset),
                                      matrix_descriptor<ROW>(key + slice * N * ROW + offset), k != 0);
      }
      wgmma_commit();
    };
    const auto multiply_weights_value = [&](int step) {
      barrier_wait(shared.value_full[stage(step)], parity(step));
      const u32 value = shared_address(shared.value[stage(step)]);
      wgmma_fence();
      FASTNA_UNROLL
      for (int k = 0; k < N / 16; ++k)
        Wgmma<D>::template product_transposed<T>(output, weights + 4 * k, matrix_descriptor<ROW>(value + k * 16 * ROW, N * ROW));
      wgmma_commit();
    };
    // Queries that do not see a row of the box, or a column of it: their scores become -infinity.
    const auto hide_rows = [&](const Walk& walk) {
      FASTNA_UNROLL
      for (int half_ = 0; half_ < 2; ++half_) {
        const Interval planes = shared.windows[w][0][row + 8 * half_], rows = shared.windows[w][1][row + 8 * half_];
        const int plane = box_begin(walk, 0), line = box_begin(walk, 1);
        const u32 visible = bits(rows.begin - line, rows.end - line);
        FASTNA_UNROLL
        for (int r0 = 0; r0 < Config::K[0]; ++r0) {
          const u32 in_plane = planes.contains(plane + r0) ? visible : 0;
          FASTNA_UNROLL
          for (int r1 = 0; r1 < Config::K[1]; ++r1) {
            FASTNA_UNROLL
            for (int n = 0; n < Config::K[2] / 8; ++n) {
              float* score = scores + ((r0 * Config::K[1] + r1) * (Config::K[2] / 8) + n) * 4 + half_ * 2;
              if (!(in_plane >> r1 & 1)) score[0] = score[1] = -infinity();
            }
          }
        }
      }
    };
    const auto hide_columns = [&](const Walk& walk) {
      FASTNA_UNROLL
      for (int half_ = 0; half_ < 2; ++half_) {
        const Interval columns = shared.windows[w][2][row + 8 * half_];
        const int first = box_begin(walk, 2) + 2 * quad;
        FASTNA_UNROLL
        for (int n = 0; n < Config::K[2] / 8; ++n) {
          const int word = n / 4 * 32;
          const u32 visible = bits(columns.begin - first - word, columns.end - first - word);
          FASTNA_UNROLL
          for (int c = 0; c < 2; ++c) {
            FASTNA_UNROLL
            for (int r = 0; r < Config::K[0] * Config::K[1]; ++r)
              if (!(visible >> (n * 8 + c - word) & 1)) scores[(r * (Config::K[2] / 8) + n) * 4 + half_ * 2 + c] = -infinity();
          }
        }
      }
    };
    // Scores become weights 2^(scale (s - peak)); the sums and what is already summed up are brought to the new peak.
    const auto soften = [&](const Walk& walk) {
      const auto inside = [&](int a) {
        const int begin = box_begin(walk, a);
        return begin >= all.axis[a].begin && begin + Config::K[a] <= all.axis[a].end;
      };
      if (!inside(0) || !inside(1)) hide_rows(walk);
      if (!inside(2)) hide_columns(walk);
      FASTNA_UNROLL
      for (int half_ = 0; half_ < 2; ++half_) {
        float top = peak[half_];
        FASTNA_UNROLL
        for (int i = half_ * 2; i < N / 2; i += 4) top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        // A peak that is a little too low only makes weights up to 2^SLACK; keeping it spares the rescaling of the output.
        if ((top - peak[half_]) * scale <= SLACK) top = peak[half_];
        rescale[half_] = exp2_approx((peak[half_] - top) * scale);
        peak[half_] = top;
        const float shift = top * scale;
        float total = 0.0f;
        FASTNA_UNROLL
        for (int i = half_ * 2; i < N / 2; i += 4) {
          scores[i] = exp2_approx(scores[i] * scale - shift);
          scores[i + 1] = exp2_approx(scores[i + 1] * scale - shift);
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

    const int count = steps();
    Walk walk{0, {0, 0, 0}};
    const auto skip_unneeded = [&]() {
      for (; walk.step < count && !needed(walk); walk.advance(boxes)) {
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
      walk.advance(boxes);
      while (walk.step < count && needed(walk)) {
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
        walk.advance(boxes);
      }
      // The next box is not this warpgroup's: its stages must not be waited for while an older value is still held.
      multiply_weights_value(last);
      wgmma_wait<0>();
      release(shared.value_empty[stage(last)]);
    }
    if (!idle) store(w, own, row, quad, thread, output, peak, sum, scale);
  }

  FASTNA_DEVICE void store(int w, const int (&own)[3], int row, int quad, int thread, const float (&output)[D / 2], const float (&peak)[2],
                           const float (&sum)[2], float scale) {
    u8* slot = shared.query[w];  // this warpgroup's queries are no longer needed
    FASTNA_UNROLL
    for (int half_ = 0; half_ < 2; ++half_) {
      const int r = row + 8 * half_;
      float total = sum[half_];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      const float inverse = 1.0f / total;
      FASTNA_UNROLL
      for (int n = 0; n < D / 8; ++n) {
        const u32 at = n * 8 / SLICE * 64 * ROW + swizzled_chunk<ROW>(r, n * 8 % SLICE / 8) + quad * 4;
        *reinterpret_cast<u32*>(slot + at) = pack2<T>(output[4 * n + 2 * half_] * inverse, output[4 * n + 2 * half_ + 1] * inverse);
      }
      int at[3];
      if (quad == 0 && locate(own, r, at)) {
        const Geometry& geometry = args.geometry;
        i64 index = batch;
        FASTNA_UNROLL
        for (int a = 0; a < 3; ++a) index = index * geometry.axis[a].length + at[a];
        args.lse[index * geometry.heads + head] = (peak[half_] * scale + log2_approx(total)) * LN_2;
      }
    }
    named_barrier(1 + w, 128);
    constexpr int CHUNKS = D / 8;
    for (int i = thread; i < 64 * CHUNKS; i += 128) {
      const int r = i / CHUNKS, chunk = i % CHUNKS;
      int at[3];
      if (!locate(own, r, at)) continue;
      const u32 from = chunk * 8 / SLICE * 64 * ROW + swizzled_chunk<ROW>(r, chunk % (SLICE / 8));
      store_global_16(element<T>(args.output, batch, at[0], at[1], at[2], head) + chunk * 8, load_global_16(slot + from));
    }
  }

  // Token of query `row` of the warpgroup that begins at `own`; false beyond the end of the dilation group.
  FASTNA_DEVICE bool locate(const int (&own)[3], int row, int (&at)[3]) const {
    bool inside = true;
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) {
      const int position = own[a] + row_offset(row, a);
      inside &= position < length[a];
      at[a] = token(a, position);
    }
    return inside;
  }
};

template <class Config>
FASTNA_DEVICE void hopper_forward(const HopperForwardArguments& args) {
  using Kernel = HopperForward<Config>;
  auto& shared = *dynamic_shared<typename Kernel::Shared>();
  Kernel kernel(args, shared);
  if (kernel.empty) return;
  if (thread_index() == 0) {
    barrier_init(shared.query_full, 1);
    for (int s = 0; s < Config::STAGES; ++s) {
      barrier_init(shared.key_full[s], 1);
      barrier_init(shared.value_full[s], 1);
      barrier_init(shared.key_empty[s], 4 * Config::WARPGROUPS);  // one arrival per warp
      barrier_init(shared.value_empty[s], 4 * Config::WARPGROUPS);
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
