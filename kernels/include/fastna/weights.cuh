// What the methods that keep the attention weights in memory share: `naive` and `gemm`.
//
// Weights are a matrix [batch, tokens, heads, pitch] of the inputs' type. Column w of a row is the key at place (w0, w1, w2) of the
// query's window, w = (w0 k1 + w1) k2 + w2; after the window come the additional keys; then padding up to `pitch`, a multiple of 8,
// which is never read. The places that a causal window cuts off hold 0 once the softmax is taken, and are never read elsewhere.
#pragma once

#include "fastna/primitives.cuh"
#include "fastna/window.cuh"

namespace fastna {

// What becomes of a product of query and key; see score_value.
enum class ScoreMode { SCORE, WEIGHT, GRADIENT };

FASTNA_DEVICE int token_count(const Geometry& geometry) {
  return geometry.axis[0].length * geometry.axis[1].length * geometry.axis[2].length;
}
FASTNA_DEVICE int window_size(const Geometry& geometry) {
  return geometry.axis[0].window * geometry.axis[1].window * geometry.axis[2].window;
}
FASTNA_DEVICE int heads_per_key(const Geometry& geometry) { return geometry.heads / geometry.key_heads; }

// Row of [batch, tokens, heads].
FASTNA_DEVICE i64 row_index(const Geometry& geometry, int batch, int token, int heads, int head) {
  return (static_cast<i64>(batch) * token_count(geometry) + token) * heads + head;
}

// RANK spares the leading axes of length 1 their arithmetic. `Point` is a token's coordinates, or positions inside dilation groups.
struct Point {
  int at[3];
};

template <int RANK>
FASTNA_DEVICE Point unravel(int index, int size1, int size2) {
  Point point = {{0, 0, index}};
  if constexpr (RANK > 1) {
    point.at[1] = index / size2;
    point.at[2] = index - point.at[1] * size2;
  }
  if constexpr (RANK > 2) {
    point.at[0] = point.at[1] / size1;
    point.at[1] -= point.at[0] * size1;
  }
  return point;
}

template <int RANK>
FASTNA_DEVICE int ravel(const Point& point, int size1, int size2) {
  int index = point.at[2];
  if constexpr (RANK > 1) index += point.at[1] * size2;
  if constexpr (RANK > 2) index += point.at[0] * size1 * size2;
  return index;
}

// Column of the weights that belongs to a place in the window; linear, so that differences of places may be ravelled apart.
template <int RANK>
FASTNA_DEVICE int window_column(const Geometry& geometry, const Point& place) {
  return ravel<RANK>(place, geometry.axis[1].window, geometry.axis[2].window);
}

// Entry of one head's bias [2 k0 - 1, 2 k1 - 1, 2 k2 - 1]; linear too. Offset (key - query) + k - 1 along every axis.
template <int RANK>
FASTNA_DEVICE int bias_entry(const Geometry& geometry, const Point& offset) {
  return ravel<RANK>(offset, 2 * geometry.axis[1].window - 1, 2 * geometry.axis[2].window - 1);
}
FASTNA_DEVICE int bias_size(const Geometry& geometry) {
  return (2 * geometry.axis[0].window - 1) * (2 * geometry.axis[1].window - 1) * (2 * geometry.axis[2].window - 1);
}

// Coordinates of a token as dilation groups and positions in them.
struct Grouped {
  Point group, position;
};

template <int RANK>
FASTNA_DEVICE Grouped grouped(const Geometry& geometry, const Point& token) {
  Grouped result = {{{0, 0, 0}}, {{0, 0, 0}}};
  FASTNA_UNROLL
  for (int i = 3 - RANK; i < 3; ++i) {
    const AxisArguments& axis = geometry.axis[i];
    result.position.at[i] = axis.dilation == 1 ? token.at[i] : position_of(axis, token.at[i]);
    result.group.at[i] = token.at[i] - result.position.at[i] * axis.dilation;
  }
  return result;
}

template <int RANK>
FASTNA_DEVICE Point token_point(const Geometry& geometry, const Point& group, const Point& position) {
  Point token = {{0, 0, 0}};
  FASTNA_UNROLL
  for (int i = 3 - RANK; i < 3; ++i) token.at[i] = token_at(geometry.axis[i], group.at[i], position.at[i]);
  return token;
}

template <int RANK>
FASTNA_DEVICE int token_index(const Geometry& geometry, const Point& token) {
  return ravel<RANK>(token, geometry.axis[1].length, geometry.axis[2].length);
}

// A box of positions: `begin` and `size` along every axis.
struct Box {
  Point begin, size;
};

template <int RANK>
FASTNA_DEVICE Box window_box(const Geometry& geometry, const Point& group, const Point& position) {
  Box box = {{{0, 0, 0}}, {{1, 1, 1}}};
  FASTNA_UNROLL
  for (int i = 3 - RANK; i < 3; ++i) {
    const AxisArguments& axis = geometry.axis[i];
    const Interval keys = window_at(axis, position.at[i], group_length(axis, group.at[i]));
    box.begin.at[i] = keys.begin;
    box.size.at[i] = keys.size();
  }
  return box;
}

template <int RANK>
FASTNA_DEVICE bool in_box(const Point& begin, const Point& size, const Point& position) {
  bool inside = true;
  FASTNA_UNROLL
  for (int i = 3 - RANK; i < 3; ++i)
    inside &= static_cast<u32>(position.at[i] - begin.at[i]) < static_cast<u32>(size.at[i]);
  return inside;
}

template <class T>
FASTNA_DEVICE const T* channels_at(const TensorArguments& tensor, int batch, const Point& token, int head) {
  return element<const T>(tensor, batch, token.at[0], token.at[1], token.at[2], head);
}

// Additional keys and values [batch, additional, head, channel] lie along the last axis of their TensorArguments.
template <class T>
FASTNA_DEVICE const T* additional_at(const TensorArguments& tensor, int batch, int index, int head) {
  return element<const T>(tensor, batch, 0, 0, index, head);
}

// From a product and its row's statistic (lse, or delta) to what the matrix stores. Scores pass through memory in the inputs' type
// in the forward pass, so the backward pass rounds them alike: its weights are exactly those that made the output.
template <class T, ScoreMode MODE>
FASTNA_DEVICE void score_value(T* weight, float product, float scale, float bias, float statistic) {
  if constexpr (MODE == ScoreMode::GRADIENT) {
    *weight = from_float<T>(to_float(*weight) * (product - statistic));
  } else {
    const T score = from_float<T>(product * scale + bias);
    *weight = MODE == ScoreMode::SCORE ? score : from_float<T>(exp2_approx((to_float(score) - statistic) * LOG2_E));
  }
}

// ---- Work shared out one element per thread

// Matrices of `rows` x `columns` elements, one per batch entry, are cut into chunks of whole rows small enough for 32-bit arithmetic.
struct Chunks {
  int rows, columns;                               // of one batch entry's matrix
  int rows_per_chunk, chunks, blocks_per_chunk;    // `chunks` per batch entry
};

struct MatrixElement {
  int batch, row, column;
  bool valid;
};

template <int THREADS>
FASTNA_DEVICE MatrixElement element_of_thread(const Chunks& chunks) {
  const u32 chunk = block_index() / static_cast<u32>(chunks.blocks_per_chunk);
  const u32 flat = (block_index() - chunk * chunks.blocks_per_chunk) * THREADS + thread_index();
  const u32 batch = chunk / static_cast<u32>(chunks.chunks);
  const u32 row = flat / static_cast<u32>(chunks.columns);
  const int first = static_cast<int>(chunk - batch * chunks.chunks) * chunks.rows_per_chunk;
  MatrixElement result;
  result.batch = static_cast<int>(batch);
  result.row = first + static_cast<int>(row);
  result.column = static_cast<int>(flat - row * chunks.columns);
  result.valid = static_cast<int>(row) < chunks.rows_per_chunk && result.row < chunks.rows;
  return result;
}

// ---- Registers of 16 bytes

template <class T>
constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));

template <class T>
FASTNA_DEVICE void unpack_vector(float (&values)[VECTOR<T>], const uint4& raw) {
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
  FASTNA_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = bits_float(words[i]);
    } else {
      const float2 pair = unpack2<T>(words[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

template <class T>
FASTNA_DEVICE uint4 pack_vector(const float (&values)[VECTOR<T>]) {
  u32 words[4];
  FASTNA_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      words[i] = float_bits(values[i]);
    else
      words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
  }
  return {words[0], words[1], words[2], words[3]};
}

// sum(a * b) over 16 bytes of each, added to `sum`.
template <class T>
FASTNA_DEVICE float dot_vector(const uint4& a, const uint4& b, float sum) {
  float left[VECTOR<T>], right[VECTOR<T>];
  unpack_vector<T>(left, a);
  unpack_vector<T>(right, b);
  FASTNA_UNROLL
  for (int i = 0; i < VECTOR<T>; ++i) sum += left[i] * right[i];
  return sum;
}

}  // namespace fastna
