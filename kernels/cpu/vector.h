// Vectors of floats by GCC's and Clang's extension: AVX-512, AVX2, SSE or NEON, whatever the processor has.
#pragma once
#include <cstring>

#define FASTNA_UNROLL _Pragma("GCC unroll 16")
// Loops that want all registers for themselves.
#define FASTNA_APART __attribute__((noinline))

namespace fastna {

template <int LANES>
struct Vector;

template <>
struct Vector<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef int Ints __attribute__((vector_size(32)));
  static constexpr Ints INDEX = {0, 1, 2, 3, 4, 5, 6, 7};
};

template <>
struct Vector<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef int Ints __attribute__((vector_size(64)));
  static constexpr Ints INDEX = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

template <int LANES>
using Floats = typename Vector<LANES>::Floats;

template <int LANES>
using Ints = typename Vector<LANES>::Ints;

template <int LANES>
inline Floats<LANES> load(const float* from) {
  Floats<LANES> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Floats>
inline void store(float* to, Floats vector) {
  std::memcpy(to, &vector, sizeof vector);
}

template <int LANES>
inline Floats<LANES> fill(float value) {
  return value - Floats<LANES>{};
}

template <class Floats>
inline Floats larger(Floats a, Floats b) {
  return a > b ? a : b;
}

// One number from all lanes, by halves.
template <int LANES, class Combine>
inline float reduce(Floats<LANES> vector, Combine combine) {
  float lanes[LANES];
  store(lanes, vector);
  FASTNA_UNROLL
  for (int half = LANES / 2; half; half /= 2) {
    FASTNA_UNROLL
    for (int i = 0; i < half; i++) lanes[i] = combine(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

template <int LANES>
inline float sum_of(Floats<LANES> vector) {
  return reduce<LANES>(vector, [](float a, float b) { return a + b; });
}

template <int LANES>
inline float largest_of(Floats<LANES> vector) {
  return reduce<LANES>(vector, [](float a, float b) { return a > b ? a : b; });
}

// Which lanes are in [first, last).
template <int LANES>
inline Ints<LANES> lanes_between(int first, int last) {
  return (Vector<LANES>::INDEX >= first) & (Vector<LANES>::INDEX < last);
}

// 2^x to 2e-7; 2^-126 for all x below -126; a NaN stays one. x < 128.
// x is split into a whole number and a rest within half: adding 1.5 * 2^23 leaves the whole number in the lowest bits.
template <int LANES>
inline Floats<LANES> exp2_of(Floats<LANES> x) {
  x = x < -126.0f ? fill<LANES>(-126.0f) : x;
  const Floats<LANES> shifted = x + 12582912.0f;
  const Floats<LANES> rest = x - (shifted - 12582912.0f);
  Floats<LANES> power = rest * 1.5403530e-4f + 1.3333558e-3f;
  power = power * rest + 9.6181291e-3f;
  power = power * rest + 5.5504109e-2f;
  power = power * rest + 2.4022651e-1f;
  power = power * rest + 6.9314718e-1f;
  power = power * rest + 1.0f;
  Ints<LANES> exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent << 23) + (127 << 23);
  Floats<LANES> scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return power * scale;
}

}  // namespace fastna
