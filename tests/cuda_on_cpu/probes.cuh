// Kernels that show one primitive each, or one mistake each. The tests run them under the emulator and, where there is one, on a GPU.
#pragma once

#include "fastna/primitives.cuh"
#include "fastna/window.cuh"

namespace fastna {

struct ProbeArguments {
  const void* a;
  const void* b;
  void* out;
  int count;
};

struct WindowProbeArguments {
  AxisArguments axis;
  int* out;
};

// ---- Primitives

// out[i] = a[i] rounded to T, as float: through from_float, and through pack2 of (a[i], -a[i]).
template <class T>
FASTNA_DEVICE void round_probe(const ProbeArguments& args) {
  const int i = block_index() * 32 + thread_index();
  if (i >= args.count) return;
  const float value = load_readonly(static_cast<const float*>(args.a) + i);
  float* out = static_cast<float*>(args.out) + 3 * i;
  const float2 pair = unpack2<T>(pack2<T>(value, -value));
  out[0] = to_float(from_float<T>(value));
  out[1] = pair.x;
  out[2] = pair.y;
}

FASTNA_DEVICE void functions_probe(const ProbeArguments& args) {
  const int i = block_index() * 32 + thread_index();
  if (i >= args.count) return;
  const float value = load_readonly(static_cast<const float*>(args.a) + i);
  float* out = static_cast<float*>(args.out) + 5 * i;
  out[0] = exp2_approx(value);
  out[1] = log2_approx(value);
  out[2] = reciprocal_approx(value);
  out[3] = bits_float(to_tf32(value));
  out[4] = rsqrt_approx(value);
}

// Lane by lane: shuffle from 31 - lane, shuffle_xor 5, any and all of a[lane] > 0, the warp and block indices.
FASTNA_DEVICE void warp_probe(const ProbeArguments& args) {
  const int i = block_index() * 64 + thread_index();
  const float value = static_cast<const float*>(args.a)[i];
  float* out = static_cast<float*>(args.out) + 8 * i;
  out[0] = shuffle(value, 31 - lane_index());
  out[1] = shuffle_xor(value, 5);
  out[2] = any_in_warp(value > 0);
  out[3] = all_in_warp(value > 0);
  out[4] = warp_index();
  out[5] = block_index();
  out[6] = block_count();
  out[7] = shuffle(thread_index(), 3);
}

// out = the fragments of matrices that lie row by row (16 bytes each) in a: x4, x4 transposed, x2, x2 transposed, and movmatrix
// of x4's first: 13 words per lane.
FASTNA_DEVICE void matrix_probe(const ProbeArguments& args) {
  u32* shared = dynamic_shared<u32>();
  for (int i = thread_index(); i < 128; i += 32) shared[i] = static_cast<const u32*>(args.a)[i];
  sync_threads();
  const u32 row = shared_address(shared) + 16 * lane_index();
  u32 four[4], two[2];
  u32* out = static_cast<u32*>(args.out) + 13 * lane_index();
  load_matrix_x4(four, row);
  for (int i = 0; i < 4; ++i) out[i] = four[i];
  out[12] = move_matrix(four[0]);
  load_matrix_x4_transposed(four, row);
  for (int i = 0; i < 4; ++i) out[4 + i] = four[i];
  load_matrix_x2(two, row);
  for (int i = 0; i < 2; ++i) out[8 + i] = two[i];
  load_matrix_x2_transposed(two, row);
  for (int i = 0; i < 2; ++i) out[10 + i] = two[i];
}

// out (16 x 8, float) = 1 + a (16 x K) b (8 x K, transposed); K = 16 of T, 8 of bf16 with HALF_DEPTH, or 8 floats in TF32.
template <class T, bool HALF_DEPTH = false>
FASTNA_DEVICE void mma_probe(const ProbeArguments& args) {
  const int g = lane_index() / 4, q = lane_index() % 4;
  float d[4] = {1, 1, 1, 1};
  u32 a[4], b[2];
  if constexpr (is_same<T, float>) {
    const float *A = static_cast<const float*>(args.a), *B = static_cast<const float*>(args.b);
    for (int r = 0; r < 4; ++r) a[r] = to_tf32(A[(g + 8 * (r & 1)) * 8 + q + 4 * (r >> 1)]);
    for (int r = 0; r < 2; ++r) b[r] = to_tf32(B[g * 8 + q + 4 * r]);
    mma_m16n8k8_tf32(d, a, b[0], b[1]);
  } else if constexpr (HALF_DEPTH) {
    const u32 *A = static_cast<const u32*>(args.a), *B = static_cast<const u32*>(args.b);
    mma_m16n8k8_bf16(d, A[g * 4 + q], A[(g + 8) * 4 + q], B[g * 4 + q]);
  } else {
    const u32 *A = static_cast<const u32*>(args.a), *B = static_cast<const u32*>(args.b);
    for (int r = 0; r < 4; ++r) a[r] = A[(g + 8 * (r & 1)) * 8 + q + 4 * (r >> 1)];
    for (int r = 0; r < 2; ++r) b[r] = B[g * 8 + q + 4 * r];
    mma_m16n8k16<T>(d, a, b[0], b[1]);
  }
  float* out = static_cast<float*>(args.out);
  for (int i = 0; i < 4; ++i) out[(g + 8 * (i >> 1)) * 8 + 2 * q + (i & 1)] = d[i];
}

// Copies `count` chunks of BYTES through shared memory, two groups in flight; chunk i is not valid where i % 5 == 3. Threads read what
// other threads copied. WAIT and BARRIER false leave those out: mistakes.
template <int BYTES, bool WAIT = true, bool BARRIER = true>
FASTNA_DEVICE void copy_probe(const ProbeArguments& args) {
  constexpr int THREADS = 64, WORDS = BYTES / 4;
  u32* shared = dynamic_shared<u32>();
  const int steps = ceil_div(args.count, THREADS);
  const auto fetch = [&](int step) {
    const int chunk = step * THREADS + thread_index();
    if (step < steps && chunk < args.count)
      copy_async<BYTES>(shared_address(shared + ((step & 1) * THREADS + thread_index()) * WORDS), static_cast<const u32*>(args.a) + chunk * WORDS,
                        chunk % 5 != 3);
    commit_copies();
  };
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    fetch(step + 1);
    if (WAIT) wait_copies<1>();
    if (BARRIER) sync_threads();
    const int other = THREADS - 1 - thread_index(), chunk = step * THREADS + other;
    if (chunk < args.count)
      for (int w = 0; w < WORDS; ++w) static_cast<u32*>(args.out)[chunk * WORDS + w] = shared[((step & 1) * THREADS + other) * WORDS + w];
    if (BARRIER) sync_threads();
  }
}

// Two warps meet at barrier 1, two others at barrier 2; each pair exchanges its numbers.
FASTNA_DEVICE void barrier_probe(const ProbeArguments& args) {
  int* shared = dynamic_shared<int>();
  const int pair = warp_index() / 2;
  shared[thread_index()] = thread_index();
  named_barrier(1 + pair, 64);
  static_cast<int*>(args.out)[thread_index()] = shared[thread_index() ^ 32];
}

FASTNA_DEVICE void vector_probe(const ProbeArguments& args) {
  const int i = thread_index();
  store_global_16(static_cast<uint4*>(args.out) + i, load_global_16(static_cast<const uint4*>(args.a) + i));
}

// For every dilation group and position: begin and end of window_at and queries_at.
FASTNA_DEVICE void window_probe(const WindowProbeArguments& args) {
  for (int token = thread_index(); token < args.axis.length; token += 32) {
    const int group = group_of(args.axis, token), position = position_of(args.axis, token), length = group_length(args.axis, group);
    const Interval window = window_at(args.axis, position, length), queries = queries_at(args.axis, position, length);
    int* out = args.out + 5 * token;
    out[0] = window.begin;
    out[1] = window.end;
    out[2] = queries.begin;
    out[3] = queries.end;
    out[4] = token_at(args.axis, group, position);
  }
}

// ---- Mistakes, each of which the emulator must notice. `count` picks a variant or an offset.

FASTNA_DEVICE void divergent_probe(const ProbeArguments& args) {
  if (lane_index() < 16) {
    sync_warp();
  } else {
    static_cast<float*>(args.out)[thread_index()] = shuffle_xor(1.0f, 1);
  }
}
FASTNA_DEVICE void partial_barrier_probe(const ProbeArguments&) {
  if (lane_index() < 16) sync_threads();
}
FASTNA_DEVICE void exited_lanes_probe(const ProbeArguments&) {
  if (lane_index() == 7) return;
  sync_warp();
}
FASTNA_DEVICE void deadlock_probe(const ProbeArguments&) { named_barrier(1 + warp_index(), 64); }
FASTNA_DEVICE void missing_barrier_probe(const ProbeArguments& args) {
  int* shared = dynamic_shared<int>();
  shared[thread_index()] = thread_index();
  static_cast<int*>(args.out)[thread_index()] = shared[thread_index() ^ 32];
}
FASTNA_DEVICE void missing_warp_barrier_probe(const ProbeArguments& args) {
  int* shared = dynamic_shared<int>();
  shared[thread_index()] = thread_index();
  static_cast<int*>(args.out)[thread_index()] = shared[thread_index() ^ 1];
}
FASTNA_DEVICE void shared_write_probe(const ProbeArguments& args) { dynamic_shared<u8>()[args.count] = 1; }
FASTNA_DEVICE void shared_read_probe(const ProbeArguments& args) { *static_cast<u8*>(args.out) = dynamic_shared<u8>()[args.count]; }
FASTNA_DEVICE void matrix_address_probe(const ProbeArguments& args) {
  u32 fragment[4];
  load_matrix_x4(fragment, shared_address(dynamic_shared<u8>()) + args.count);
}
FASTNA_DEVICE void copy_address_probe(const ProbeArguments& args) {
  copy_async<16>(shared_address(dynamic_shared<u8>()), static_cast<const u8*>(args.a) + args.count, true);
}
FASTNA_DEVICE void invalid_copy_probe(const ProbeArguments&) {  // no mistake: what is not valid is never read
  copy_async<16>(shared_address(dynamic_shared<u8>()), nullptr, false);
  commit_copies();
  wait_copies<0>();
}
FASTNA_DEVICE void global_probe(const ProbeArguments& args) {
  static_cast<float*>(args.out)[0] = static_cast<const float*>(args.a)[args.count];
}
FASTNA_DEVICE void global_write_probe(const ProbeArguments& args) { static_cast<float*>(args.out)[args.count] = 1; }
FASTNA_DEVICE void endless_probe(const ProbeArguments& args) {
  volatile int* flag = static_cast<int*>(args.out);
  while (*flag == 0) {
  }
}
FASTNA_DEVICE void array_index_probe(const ProbeArguments& args) {
  float values[4] = {1, 2, 3, 4};
  static_cast<float*>(args.out)[0] = values[args.count];
}
FASTNA_DEVICE void division_probe(const ProbeArguments& args) { static_cast<int*>(args.out)[0] = 7 / args.count; }
FASTNA_DEVICE void poison_probe(const ProbeArguments& args) {  // every block finds shared memory as it was before the first
  if (thread_index() == 0) static_cast<u32*>(args.out)[block_index()] = dynamic_shared<u32>()[8 * block_index()]++;
}

}  // namespace fastna
