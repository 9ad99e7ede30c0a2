// A warp's product of two tiles in shared memory: 16 rows by N columns over K, in three arithmetics that share one accumulator layout.
//
// Either operand may have its K index contiguous (K_MAJOR: [row or column][K]) or not ([K][row or column]). Pitches are such that
// neither ldmatrix nor a plain read has a bank conflict: K_PITCH for the former, 8 elements more than the width for the latter.
#pragma once

#include "fastna/primitives.cuh"

namespace fastna {

enum class Major { K, ROW };

// How operands are multiplied: float exactly, float rounded to TF32 on the tensor cores, 16-bit types on the tensor cores.
template <class T_, bool TF32_>
struct GemmType {
  using T = T_;
  static constexpr bool TF32 = TF32_;
};

template <class T>
FASTNA_DEVICE constexpr int k_pitch(int depth) {
  return depth + 16 / static_cast<int>(sizeof(T));
}
FASTNA_DEVICE constexpr int row_pitch(int width) { return width + 8; }

// accumulator[j] is the 16 x 8 tile of columns 8 j, laid out as mma.m16n8 leaves it.
template <int N>
using Accumulator = float[N / 8][4];

template <class T, Major A, Major B, int N, int K, int A_PITCH, int B_PITCH>
FASTNA_DEVICE void multiply_16bit(Accumulator<N>& sum, const T* a, const T* b) {
  static_assert(N % 16 == 0 && K % 16 == 0, "");
  const int lane = lane_index(), low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
  FASTNA_UNROLL
  for (int k = 0; k < K; k += 16) {
    u32 left[4];
    if constexpr (A == Major::K)
      load_matrix_x4(left, shared_address(a + (low + middle) * A_PITCH + k + high));
    else
      load_matrix_x4_transposed(left, shared_address(a + (k + low + high) * A_PITCH + middle));
    FASTNA_UNROLL
    for (int n = 0; n < N; n += 16) {
      u32 right[4];
      if constexpr (B == Major::K)
        load_matrix_x4(right, shared_address(b + (n + low + high) * B_PITCH + k + middle));
      else
        load_matrix_x4_transposed(right, shared_address(b + (k + low + middle) * B_PITCH + n + high));
      mma_m16n8k16<T>(sum[n / 8], left, right[0], right[1]);
      mma_m16n8k16<T>(sum[n / 8 + 1], left, right[2], right[3]);
    }
  }
}

template <Major MAJOR, int PITCH>
FASTNA_DEVICE float element_of(const float* tile, int row, int k) {
  return MAJOR == Major::K ? tile[row * PITCH + k] : tile[k * PITCH + row];
}

template <Major A, Major B, int N, int K, int A_PITCH, int B_PITCH>
FASTNA_DEVICE void multiply_tf32(Accumulator<N>& sum, const float* a, const float* b) {
  const int group = lane_index() / 4, member = lane_index() % 4;
  FASTNA_UNROLL
  for (int k = member; k < K; k += 8) {
    u32 left[4];
    FASTNA_UNROLL
    for (int i = 0; i < 4; ++i) left[i] = to_tf32(element_of<A, A_PITCH>(a, group + i % 2 * 8, k + i / 2 * 4));
    FASTNA_UNROLL
    for (int n = 0; n < N; n += 8)
      mma_m16n8k8_tf32(sum[n / 8], left, to_tf32(element_of<B, B_PITCH>(b, n + group, k)),
                       to_tf32(element_of<B, B_PITCH>(b, n + group, k + 4)));
  }
}

// Four consecutive K of one row or column.
template <Major MAJOR, int PITCH>
FASTNA_DEVICE float4 four_of(const float* tile, int row, int k) {
  if constexpr (MAJOR == Major::K) return *reinterpret_cast<const float4*>(tile + row * PITCH + k);
  const float* first = tile + k * PITCH + row;
  return {first[0], first[PITCH], first[2 * PITCH], first[3 * PITCH]};
}

FASTNA_DEVICE void add_products(float& sum, const float4& a, const float4& b) {
  sum += a.x * b.x;
  sum += a.y * b.y;
  sum += a.z * b.z;
  sum += a.w * b.w;
}

template <Major A, Major B, int N, int K, int A_PITCH, int B_PITCH>
FASTNA_DEVICE void multiply_float(Accumulator<N>& sum, const float* a, const float* b) {
  const int group = lane_index() / 4, column = lane_index() % 4 * 2;
#pragma unroll 2
  for (int k = 0; k < K; k += 4) {
    const float4 top = four_of<A, A_PITCH>(a, group, k), bottom = four_of<A, A_PITCH>(a, group + 8, k);
    FASTNA_UNROLL
    for (int n = 0; n < N; n += 8) {
      float4 first, second;
      if constexpr (B == Major::K) {
        first = four_of<B, B_PITCH>(b, n + column, k);
        second = four_of<B, B_PITCH>(b, n + column + 1, k);
      } else {
        float2 pair[4];
        FASTNA_UNROLL
        for (int i = 0; i < 4; ++i) pair[i] = *reinterpret_cast<const float2*>(b + (k + i) * B_PITCH + n + column);
        first = {pair[0].x, pair[1].x, pair[2].x, pair[3].x};
        second = {pair[0].y, pair[1].y, pair[2].y, pair[3].y};
      }
      add_products(sum[n / 8][0], top, first);
      add_products(sum[n / 8][1], top, second);
      add_products(sum[n / 8][2], bottom, first);
      add_products(sum[n / 8][3], bottom, second);
    }
  }
}

// sum[16 x N] += a[16 x K] b[K x N].
template <class Type, Major A, Major B, int N, int K, int A_PITCH, int B_PITCH>
FASTNA_DEVICE void multiply_tiles(Accumulator<N>& sum, const typename Type::T* a, const typename Type::T* b) {
  if constexpr (sizeof(typename Type::T) == 2)
    multiply_16bit<typename Type::T, A, B, N, K, A_PITCH, B_PITCH>(sum, a, b);
  else if constexpr (Type::TF32)
    multiply_tf32<A, B, N, K, A_PITCH, B_PITCH>(sum, a, b);
  else
    multiply_float<A, B, N, K, A_PITCH, B_PITCH>(sum, a, b);
}

}  // namespace fastna
