// Everything a kernel may ask of the hardware, and nothing else asks the hardware for anything: one interface, two bodies.
//
// This file has the CUDA body (sm_80 and up). With FASTNA_EMULATE defined the emulator of tests/cuda_on_cpu supplies the CPU body,
// under which the kernels run in CI. A kernel therefore uses no threadIdx, no __shared__ and no assembly of its own.
//
// Fragment layouts are those of the PTX manual, section "Matrix multiply-accumulate operation using mma instruction".
#pragma once

#include "fastna/types.cuh"

#ifdef FASTNA_EMULATE
#include "emulated_primitives.h"
#else

namespace fastna {

// ---- Indices: blocks and threads are one-dimensional

FASTNA_DEVICE int thread_index() { return threadIdx.x; }
FASTNA_DEVICE int lane_index() { return threadIdx.x & 31; }
// Through a shuffle, so that the compiler knows it to be the same in the whole warp.
FASTNA_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x >> 5), 0); }
FASTNA_DEVICE u32 block_index() { return blockIdx.x; }
FASTNA_DEVICE u32 block_count() { return gridDim.x; }

// A value that the compiler shall keep in a register: it would rather work it out again, every time round a loop.
FASTNA_DEVICE void keep(u32& value) { asm volatile("" : "+r"(value)); }
FASTNA_DEVICE void keep(int& value) { asm volatile("" : "+r"(value)); }
template <class T>
FASTNA_DEVICE void keep(T*& value) {
  asm volatile("" : "+l"(value));
}

// ---- Numbers

FASTNA_DEVICE float infinity() { return __int_as_float(0x7f800000); }
FASTNA_DEVICE u32 float_bits(float value) { return __float_as_uint(value); }
FASTNA_DEVICE float bits_float(u32 bits) { return __uint_as_float(bits); }

FASTNA_DEVICE float to_float(float value) { return value; }
FASTNA_DEVICE float to_float(bf16 value) { return __uint_as_float(static_cast<u32>(value.bits) << 16); }
FASTNA_DEVICE float to_float(half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// Nearest, ties to even.
template <class T>
FASTNA_DEVICE T from_float(float value);
template <>
FASTNA_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
FASTNA_DEVICE bf16 from_float<bf16>(float value) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
FASTNA_DEVICE half from_float<half>(float value) {
  half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

// Two 16-bit numbers in one register; `low` has the lower address.
template <class T>
FASTNA_DEVICE u32 pack2(float low, float high);
template <>
FASTNA_DEVICE u32 pack2<bf16>(float low, float high) {
  u32 result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
FASTNA_DEVICE u32 pack2<half>(float low, float high) {
  u32 result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

template <class T>
FASTNA_DEVICE float2 unpack2(u32 pair) {
  return {to_float(T{static_cast<u16>(pair & 0xffffu)}), to_float(T{static_cast<u16>(pair >> 16)})};
}

// Rounded to the 10-bit mantissa of TF32, as bits.
FASTNA_DEVICE u32 to_tf32(float value) {
  u32 result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}

FASTNA_DEVICE float exp2_approx(float value) {  // exp2_approx(-infinity) is 0
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
FASTNA_DEVICE float log2_approx(float value) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
FASTNA_DEVICE float reciprocal_approx(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
FASTNA_DEVICE float rsqrt_approx(float value) {  // within 2^-22.9
  float result;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// ---- Memory

// Start of the dynamic shared memory, aligned to 1024 bytes.
template <class T>
FASTNA_DEVICE T* dynamic_shared() {
  extern __shared__ __align__(1024) u8 fastna_dynamic_shared[];
  return reinterpret_cast<T*>(fastna_dynamic_shared);
}

// What the asynchronous and matrix instructions take for an address in shared memory.
FASTNA_DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// Through the read-only path: nothing may write the memory while the kernel runs. T has 2, 4, 8 or 16 bytes.
template <class T>
FASTNA_DEVICE T load_readonly(const T* pointer) {
  if constexpr (sizeof(T) == 2) {
    const u16 raw = __ldg(reinterpret_cast<const u16*>(pointer));
    return reinterpret_cast<const T&>(raw);
  } else if constexpr (sizeof(T) == 4) {
    const u32 raw = __ldg(reinterpret_cast<const u32*>(pointer));
    return reinterpret_cast<const T&>(raw);
  } else if constexpr (sizeof(T) == 8) {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(pointer));
    return reinterpret_cast<const T&>(raw);
  } else {
    static_assert(sizeof(T) == 16, "load_readonly takes 2, 4, 8 or 16 bytes");
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(pointer));
    return reinterpret_cast<const T&>(raw);
  }
}
FASTNA_DEVICE uint4 load_global_16(const void* pointer) { return *static_cast<const uint4*>(pointer); }
FASTNA_DEVICE void store_global_16(void* pointer, uint4 value) { *static_cast<uint4*>(pointer) = value; }

// cp.async: BYTES (4, 8 or 16, both sides aligned to it) from global to shared memory. Where not `valid`, zeros are written and
// nothing is read. Seen by the issuing thread after wait_copies, by others after a barrier that follows it.
template <int BYTES>
FASTNA_DEVICE void copy_async(u32 shared, const void* global, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  const u64 source = __cvta_generic_to_global(global);
  const u32 bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(source), "n"(BYTES), "r"(bytes) : "memory");
  }
}
FASTNA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the PENDING groups committed last are still under way.
template <int PENDING>
FASTNA_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- Synchronisation: every thread of the block, warp or barrier must arrive

FASTNA_DEVICE void sync_threads() { __syncthreads(); }
FASTNA_DEVICE void sync_warp() { __syncwarp(); }
// Barrier `id` (1 to 15) of the `threads` threads (a multiple of 32) that call it.
FASTNA_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Warp: all 32 lanes must call

template <class T>
FASTNA_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
FASTNA_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
FASTNA_DEVICE bool any_in_warp(bool predicate) { return __any_sync(0xffffffffu, predicate); }
FASTNA_DEVICE bool all_in_warp(bool predicate) { return __all_sync(0xffffffffu, predicate); }

// ldmatrix: 8 x 8 matrices of 16-bit elements. Lanes 8 m to 8 m + 7 give the addresses of the rows (16 bytes, aligned) of matrix m;
// lane 4 g + q receives elements 2 q and 2 q + 1 of row g, or of column g when transposed. x2 ignores the addresses of lanes 16 up.
FASTNA_DEVICE void load_matrix_x4(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
FASTNA_DEVICE void load_matrix_x4_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
FASTNA_DEVICE void load_matrix_x2(u32 (&r)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}
FASTNA_DEVICE void load_matrix_x2_transposed(u32 (&r)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

// Transposes an 8 x 8 matrix of 16-bit elements held by the warp: two elements of a row per lane, as ldmatrix leaves it.
FASTNA_DEVICE u32 move_matrix(u32 value) {
  u32 result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(value));
  return result;
}

// d (16 x 8, float) += a (16 x 16) b (16 x 8). Lane 4 g + q holds
//   d: rows g, g, g + 8, g + 8, columns 2 q, 2 q + 1, 2 q, 2 q + 1
//   a: pairs of columns 2 q, 2 q + 1 of rows g, g + 8 (a[0], a[1]), and 2 q + 8, 2 q + 9 of rows g, g + 8 (a[2], a[3])
//   b: pairs of rows 2 q, 2 q + 1 (b0) and 2 q + 8, 2 q + 9 (b1) of column g
template <class T>
FASTNA_DEVICE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (is_same<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(is_same<T, half>, "mma_m16n8k16 multiplies bf16 or half");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// d (16 x 8, float) += a (16 x 8) b (8 x 8), bf16: half the depth. Lane 4 g + q holds d as above, of a columns 2 q and 2 q + 1 of rows g (a0)
// and g + 8 (a1), of b rows 2 q and 2 q + 1 of column g.
FASTNA_DEVICE void mma_m16n8k8_bf16(float (&d)[4], u32 a0, u32 a1, u32 b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b));
}

// d (16 x 8, float) += a (16 x 8) b (8 x 8) in TF32; operands went through to_tf32. Lane 4 g + q holds
//   a: column q of rows g, g + 8 (a[0], a[1]), column q + 4 of rows g, g + 8 (a[2], a[3]); b: rows q (b0), q + 4 (b1) of column g
FASTNA_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastna

#endif
