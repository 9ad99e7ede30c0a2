// Names that every device header uses: integers of known width, storage types of the 16-bit floats, function qualifiers.
//
// No CUDA or standard header is included: NVRTC then compiles a kernel in a fraction of a second, and needs none installed.
// With FASTNA_EMULATE defined the same headers compile for a CPU; the emulator supplies CUDA's keywords and vector types.
#pragma once

#ifdef FASTNA_EMULATE
#include "emulator.h"
#define FASTNA_DEVICE inline
#define FASTNA_UNROLL
#else
#define FASTNA_DEVICE __device__ __forceinline__
#define FASTNA_UNROLL _Pragma("unroll")
#endif

namespace fastna {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "");

// Storage only: arithmetic happens in float. Conversions are in primitives.cuh.
struct bf16 {
  u16 bits;
};
struct half {
  u16 bits;
};

constexpr int WARP = 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

template <class A, class B>
struct IsSame {
  static constexpr bool value = false;
};
template <class A>
struct IsSame<A, A> {
  static constexpr bool value = true;
};
template <class A, class B>
constexpr bool is_same = IsSame<A, B>::value;

template <class T>
FASTNA_DEVICE constexpr T minimum(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FASTNA_DEVICE constexpr T maximum(T a, T b) {
  return a < b ? b : a;
}
FASTNA_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }  // a >= 0, b > 0
FASTNA_DEVICE constexpr int round_up(int a, int multiple) { return ceil_div(a, multiple) * multiple; }

}  // namespace fastna
