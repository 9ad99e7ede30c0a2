// Softmax of the scores of each query, in place, and its lse. LANES lanes share a row and read it in vectors of 16 bytes.
#pragma once

#include "fastna/weights.cuh"

namespace fastna {

struct WeightsSoftmaxArguments {
  Geometry geometry;
  void* weights;    // [batch, tokens, heads, pitch]: scores in, weights out
  float* lse;       // [batch, tokens, heads], natural logarithm
  i64 pitch;
  int blocks;       // per batch entry
};

// MASKED: an axis is causal, so that a window may be cut and places of it hold nothing.
template <class T_, int RANK_, int LANES_, bool MASKED_, int THREADS_>
struct WeightsSoftmaxConfig {
  using T = T_;
  static constexpr int RANK = RANK_, LANES = LANES_, THREADS = THREADS_;
  static constexpr bool MASKED = MASKED_;
};

template <class Config>
FASTNA_DEVICE void weights_softmax(const WeightsSoftmaxArguments& args) {
  using T = typename Config::T;
  constexpr int LANES = Config::LANES, ROWS = Config::THREADS / LANES;
  const Geometry& geometry = args.geometry;

  const int rows = token_count(geometry) * geometry.heads;
  const int batch = static_cast<int>(block_index() / args.blocks);
  const int row = static_cast<int>(block_index() - batch * args.blocks) * ROWS + thread_index() / LANES;
  const bool valid = row < rows;
  const i64 index = static_cast<i64>(batch) * rows + row;
  T* weights = static_cast<T*>(args.weights) + index * args.pitch;
  const int in_window = window_size(geometry), columns = valid ? in_window + geometry.additional : 0;

  Point cut = {{0, 0, 0}};
  if constexpr (Config::MASKED) {
    if (valid) {
      const int token = row / geometry.heads;
      const Grouped at = grouped<Config::RANK>(
          geometry, unravel<Config::RANK>(token, geometry.axis[1].length, geometry.axis[2].length));
      cut = window_box<Config::RANK>(geometry, at.group, at.position).size;
    }
  }
  // What was never written, behind the row or outside the window, is not read either.
  const auto scores_at = [&](float(&scores)[VECTOR<T>], int first) {
    bool present[VECTOR<T>], all = true;
    FASTNA_UNROLL
    for (int i = 0; i < VECTOR<T>; ++i) {
      const int column = first + i;
      present[i] = column < columns;
      if constexpr (Config::MASKED) {
        if (column < in_window) {
          const Point place = unravel<Config::RANK>(column, geometry.axis[1].window, geometry.axis[2].window);
          present[i] &= in_box<Config::RANK>({{0, 0, 0}}, cut, place);
        }
      }
      all &= present[i];
    }
    if (all) {
      unpack_vector<T>(scores, load_global_16(weights + first));
    } else {
      FASTNA_UNROLL
      for (int i = 0; i < VECTOR<T>; ++i) scores[i] = present[i] ? to_float(weights[first + i]) : -infinity();
    }
  };

  // One pass for the maximum and the sum relative to it, rescaled whenever the maximum grows.
  float largest = -infinity(), sum = 0.f;
  const int begin = thread_index() % LANES * VECTOR<T>;
  for (int first = begin; first < columns; first += LANES * VECTOR<T>) {
    float scores[VECTOR<T>];
    scores_at(scores, first);
    float peak = largest;
    FASTNA_UNROLL
    for (int i = 0; i < VECTOR<T>; ++i) peak = fmaxf(peak, scores[i]);
    if (peak > -infinity()) {
      sum *= exp2_approx((largest - peak) * LOG2_E);
      FASTNA_UNROLL
      for (int i = 0; i < VECTOR<T>; ++i) sum += exp2_approx((scores[i] - peak) * LOG2_E);
      largest = peak;
    }
  }
  FASTNA_UNROLL
  for (int mask = LANES / 2; mask > 0; mask /= 2) {
    const float other_largest = shuffle_xor(largest, mask), other_sum = shuffle_xor(sum, mask);
    const float peak = fmaxf(largest, other_largest);
    if (peak > -infinity()) {
      sum = sum * exp2_approx((largest - peak) * LOG2_E) + other_sum * exp2_approx((other_largest - peak) * LOG2_E);
      largest = peak;
    }
  }
  if (!valid) return;

  const float lse = largest + log2_approx(sum) * LN_2;
  if (begin == 0) args.lse[index] = lse;
  const float normaliser = 1.f / sum;
  for (int first = begin; first < columns; first += LANES * VECTOR<T>) {
    float scores[VECTOR<T>];
    scores_at(scores, first);
    FASTNA_UNROLL
    for (int i = 0; i < VECTOR<T>; ++i) scores[i] = exp2_approx((scores[i] - largest) * LOG2_E) * normaliser;
    store_global_16(weights + first, pack_vector<T>(scores));
  }
}

}  // namespace fastna
