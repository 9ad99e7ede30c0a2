// Four bytes of a row of channels, accumulated in float: one 32-bit channel, or two 16-bit ones as the half2 kernels of old did.
#pragma once

#include "fastna/primitives.cuh"

namespace fastna {

template <class T>
constexpr int PAIR = 4 / static_cast<int>(sizeof(T));

struct Pair {
  float low = 0.f, high = 0.f;

  template <class T>
  FASTNA_DEVICE void add(float weight, const T* source) {
    if constexpr (sizeof(T) == 4) {
      low += weight * *source;
    } else {
      const float2 values = unpack2<T>(*reinterpret_cast<const u32*>(source));
      low += weight * values.x;
      high += weight * values.y;
    }
  }
  template <class T>
  FASTNA_DEVICE void store(T* target, float factor) const {
    if constexpr (sizeof(T) == 4)
      *target = low * factor;
    else
      *reinterpret_cast<u32*>(target) = pack2<T>(low * factor, high * factor);
  }
};

}  // namespace fastna
