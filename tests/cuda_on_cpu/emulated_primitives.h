// The CPU body of fastna/primitives.cuh: the same names, run by the engine and checked where CUDA would be silent.
#pragma once

#include "fastna/types.cuh"

namespace fastna {

// ---- Indices

inline int thread_index() { return emulator::emulator_current.thread; }
inline int lane_index() { return thread_index() & 31; }
inline u32 block_index() { return emulator::emulator_current.block; }
inline u32 block_count() { return emulator::emulator_current.blocks; }
inline int warp_index() {
  emulator::emulator_collective(emulator::WARP_INDEX, nullptr, 0, nullptr, 0);
  return thread_index() >> 5;
}

template <class T>
void keep(T&) {}

// ---- Numbers

template <class To, class From>
inline To emulated_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

inline float infinity() { return __builtin_inff(); }
inline u32 float_bits(float value) { return emulated_bit_cast<u32>(value); }
inline float bits_float(u32 bits) { return emulated_bit_cast<float>(bits); }

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return bits_float(static_cast<u32>(value.bits) << 16); }
inline float to_float(half value) { return emulator::emulator_half_to_float(value.bits); }

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {
  const u32 bits = float_bits(value);
  if (value != value) return {0x7fff};
  return {static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline half from_float<half>(float value) {
  return {emulator::emulator_float_to_half(value)};
}

template <class T>
inline u32 pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<u32>(from_float<T>(high).bits) << 16;
}
template <class T>
inline float2 unpack2(u32 pair) {
  return {to_float(T{static_cast<u16>(pair & 0xffffu)}), to_float(T{static_cast<u16>(pair >> 16)})};
}

inline u32 to_tf32(float value) {
  const u32 bits = float_bits(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

inline float emulated_flush(float value) { return fabsf(value) < 0x1p-126f ? copysignf(0.0f, value) : value; }
inline float exp2_approx(float value) { return emulated_flush(exp2f(emulated_flush(value))); }
inline float log2_approx(float value) { return log2f(emulated_flush(value)); }
inline float reciprocal_approx(float value) { return emulated_flush(1.0f / emulated_flush(value)); }
inline float rsqrt_approx(float value) { return 1.0f / sqrtf(value); }

// ---- Memory

template <class T>
inline T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::emulator_current.shared);
}
inline u32 shared_address(const void* pointer) { return emulator::emulator_shared_address(pointer); }

inline void emulated_alignment(const void* pointer, unsigned bytes, const char* what) {
  if (reinterpret_cast<u64>(pointer) % bytes != 0) emulator::emulator_fail("%s at %p is not aligned to %u bytes", what, pointer, bytes);
}
template <class T>
inline T load_readonly(const T* pointer) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "load_readonly takes 2, 4, 8 or 16 bytes");
  emulated_alignment(pointer, sizeof(T), "load_readonly");
  return *pointer;
}
inline uint4 load_global_16(const void* pointer) {
  emulated_alignment(pointer, 16, "load_global_16");
  return *static_cast<const uint4*>(pointer);
}
inline void store_global_16(void* pointer, uint4 value) {
  emulated_alignment(pointer, 16, "store_global_16");
  *static_cast<uint4*>(pointer) = value;
}

template <int BYTES>
inline void copy_async(u32 shared, const void* global, bool valid) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::emulator_copy_async(shared, global, BYTES, valid);
}
inline void commit_copies() { emulator::emulator_commit_copies(); }
template <int PENDING>
inline void wait_copies() {
  emulator::emulator_wait_copies(PENDING);
}

// ---- Synchronisation

inline void sync_threads() { emulator::emulator_barrier(0, 0); }
inline void sync_warp() { emulator::emulator_collective(emulator::SYNC_WARP, nullptr, 0, nullptr, 0); }
inline void named_barrier(int id, int threads) { emulator::emulator_barrier(id, threads); }

// ---- Warp

template <class T>
inline T shuffle(T value, int lane) {
  const u32 in[2] = {emulated_bit_cast<u32>(value), static_cast<u32>(lane)};
  u32 out;
  emulator::emulator_collective(emulator::SHUFFLE, in, 2, &out, 1);
  return emulated_bit_cast<T>(out);
}
template <class T>
inline T shuffle_xor(T value, int mask) {
  return shuffle(value, lane_index() ^ mask);
}
inline bool any_in_warp(bool predicate) {
  const u32 in = predicate;
  u32 out;
  emulator::emulator_collective(emulator::ANY, &in, 1, &out, 1);
  return out != 0;
}
inline bool all_in_warp(bool predicate) {
  const u32 in = predicate;
  u32 out;
  emulator::emulator_collective(emulator::ALL, &in, 1, &out, 1);
  return out != 0;
}

inline void load_matrix_x4(u32 (&r)[4], u32 address) { emulator::emulator_collective(emulator::LOAD_MATRIX_X4, &address, 1, r, 4); }
inline void load_matrix_x4_transposed(u32 (&r)[4], u32 address) {
  emulator::emulator_collective(emulator::LOAD_MATRIX_X4_TRANSPOSED, &address, 1, r, 4);
}
inline void load_matrix_x2(u32 (&r)[2], u32 address) { emulator::emulator_collective(emulator::LOAD_MATRIX_X2, &address, 1, r, 2); }
inline void load_matrix_x2_transposed(u32 (&r)[2], u32 address) {
  emulator::emulator_collective(emulator::LOAD_MATRIX_X2_TRANSPOSED, &address, 1, r, 2);
}
inline u32 move_matrix(u32 value) {
  u32 result;
  emulator::emulator_collective(emulator::MOVE_MATRIX, &value, 1, &result, 1);
  return result;
}

inline void emulated_mma(emulator::Operation operation, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const u32 in[6] = {a[0], a[1], a[2], a[3], b0, b1};
  float product[4];
  emulator::emulator_collective(operation, in, 6, reinterpret_cast<u32*>(product), 4);
  for (int i = 0; i < 4; ++i) d[i] += product[i];
}
template <class T>
inline void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static_assert(is_same<T, bf16> || is_same<T, half>, "mma_m16n8k16 multiplies bf16 or half");
  emulated_mma(is_same<T, bf16> ? emulator::MMA_BF16 : emulator::MMA_HALF, d, a, b0, b1);
}
inline void mma_m16n8k8_bf16(float (&d)[4], u32 a0, u32 a1, u32 b) { mma_m16n8k16<bf16>(d, {a0, a1, 0, 0}, b, 0); }
inline void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulated_mma(emulator::MMA_TF32, d, a, b0, b1); }

}  // namespace fastna
