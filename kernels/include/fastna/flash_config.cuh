// What the host chooses for a flash kernel, and helpers that depend on all of it.
#pragma once

#include "fastna/flash_scores.cuh"

namespace fastna {

template <bool CONDITION, class A, class B>
struct Either {
  using type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using type = B;
};

// Rows are the box that a block keeps, 16 per warp; columns the box that streams past it, in STAGES buffers. VECTOR: bytes that every
// input address is aligned to. RESIDENT: the left operand of the scores stays in registers. ADDITIONAL: there are additional keys.
template <class Arithmetic_, int HEAD_DIM_, int VALUE_DIM_, class Rows_, class Columns_, int STAGES_, int VECTOR_, bool RESIDENT_,
          BiasKind BIAS_, class Rpb_, bool ADDITIONAL_>
struct FlashConfig {
  using Arithmetic = Arithmetic_;
  using Rows = Rows_;
  using Columns = Columns_;
  using Rpb = Rpb_;
  static constexpr int HEAD_DIM = HEAD_DIM_, VALUE_DIM = VALUE_DIM_, STAGES = STAGES_, VECTOR = VECTOR_;
  static constexpr int THREADS = Rows::SIZE / 16 * WARP;
  static constexpr bool RESIDENT = RESIDENT_, ADDITIONAL = ADDITIONAL_;
  static constexpr BiasKind BIAS = BIAS_;
  static_assert(Rows::SIZE % 16 == 0 && Columns::SIZE % 8 == 0, "a warp takes 16 rows, a product 8 columns");
};

// A query-gradient kernel, with the place of the bias gradient's table.
template <class Config, BiasKind BIAS_GRADIENT_>
struct QueryGradientConfig : Config {
  static constexpr BiasKind BIAS_GRADIENT = BIAS_GRADIENT_;
};

// A key-gradient kernel: which gradients it computes, and whether its rows are the additional keys instead of the map's.
template <class Config, bool GRAD_KEY_, bool GRAD_VALUE_, bool ADDITIONAL_ROWS_>
struct KeyGradientConfig : Config {
  static constexpr bool GRAD_KEY = GRAD_KEY_, GRAD_VALUE = GRAD_VALUE_, ADDITIONAL_ROWS = ADDITIONAL_ROWS_;
};

// Tile `index` of the additional keys or values.
template <class Config, int CHANNELS, class T>
FASTNA_DEVICE void load_additional(T* tile, const TensorArguments& tensor, const Geometry& geometry, int batch, int head, int index) {
  using Box = TileBox<1, 1, 1, Config::Columns::SIZE>;
  const int origin[3] = {0, 0, index * Box::SIZE}, length[3] = {1, 1, geometry.additional};
  load_tile<Box, CHANNELS, Config::THREADS, Config::VECTOR>(tile, GroupView<Box::FIRST, T>(tensor, batch, head), origin, length);
}

// Sum of the products of 16 bytes of elements.
template <class T>
FASTNA_DEVICE float dot_chunk(const uint4& a, const uint4& b) {
  const u32 left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
  FASTNA_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      sum += bits_float(left[i]) * bits_float(right[i]);
    } else {
      const float2 l = unpack2<T>(left[i]), r = unpack2<T>(right[i]);
      sum += l.x * r.x + l.y * r.y;
    }
  }
  return sum;
}

}  // namespace fastna
