// The arithmetic of one query and its window.
//
// A window is a number of rows, and the same columns of each. Scores lie row after row, each row padded to a whole number
// of vectors: `width`.
#pragma once
#include <limits>

#include "layout.h"

namespace fastna {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

struct WindowRow {
  int row;       // of the task's keys
  int64_t bias;  // where its row of the bias starts
};

struct Window {
  const WindowRow* rows;
  int count;            // of rows
  int column;           // of the first score of each row
  int first, columns;   // which scores of a row are the window's own: two queries may share products
  int width;
};

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS_AT_ONCE = 8;  // 32 registers: 16 sums of two queries
#else
constexpr int ROWS_AT_ONCE = 4;
#endif

template <int LANES, int QUERIES, int ROWS>
inline void scores_of_rows(const Columns& keys, const float* const (&query)[QUERIES], const Window& window, int first,
                           int from, float* const (&scores)[QUERIES]) {
  const int64_t pitch = keys.pitch(), row = keys.dim * pitch;
  const float* source[ROWS];
  Floats<LANES> sum[QUERIES][ROWS];
  FASTNA_UNROLL
  for (int r = 0; r < ROWS; r++) {
    source[r] = keys.data + window.rows[first + r].row * row + window.column + from;
    FASTNA_UNROLL
    for (int q = 0; q < QUERIES; q++) sum[q][r] = Floats<LANES>{};
  }
  int64_t offset = 0;
  for (int d = 0; d < keys.dim; d++, offset += pitch) {
    FASTNA_UNROLL
    for (int r = 0; r < ROWS; r++) {
      const Floats<LANES> key = load<LANES>(source[r] + offset);
      FASTNA_UNROLL
      for (int q = 0; q < QUERIES; q++) sum[q][r] += query[q][d] * key;
    }
  }
  FASTNA_UNROLL
  for (int q = 0; q < QUERIES; q++) {
    float* to = scores[q] + int64_t(first) * window.width + from;
    FASTNA_UNROLL
    for (int r = 0; r < ROWS; r++) store(to + int64_t(r) * window.width, sum[q][r]);
  }
}

// scores[q] = keys . query[q] over all of `window.width`, for queries whose windows have the same rows
template <int LANES, int QUERIES>
inline void scores_of(const Columns& keys, const float* const (&query)[QUERIES], const Window& window,
                      float* const (&scores)[QUERIES]) {
  for (int first = 0; first < window.count; first += ROWS_AT_ONCE) {
    for (int from = 0; from < window.width; from += LANES) {
      switch (std::min(window.count - first, ROWS_AT_ONCE)) {
        case 1: scores_of_rows<LANES, QUERIES, 1>(keys, query, window, first, from, scores); break;
        case 2: scores_of_rows<LANES, QUERIES, 2>(keys, query, window, first, from, scores); break;
        case 3: scores_of_rows<LANES, QUERIES, 3>(keys, query, window, first, from, scores); break;
        case 4: scores_of_rows<LANES, QUERIES, 4>(keys, query, window, first, from, scores); break;
        case 5: scores_of_rows<LANES, QUERIES, 5>(keys, query, window, first, from, scores); break;
        case 6: scores_of_rows<LANES, QUERIES, 6>(keys, query, window, first, from, scores); break;
        case 7: scores_of_rows<LANES, QUERIES, 7>(keys, query, window, first, from, scores); break;
        default: scores_of_rows<LANES, QUERIES, ROWS_AT_ONCE>(keys, query, window, first, from, scores);
      }
    }
  }
}

// Adds the bias, if there is one; scores that are not the window's own become -inf. Returns the largest. `bias` is that of
// the window's first row and column.
template <int LANES>
inline float add_bias(const Window& window, const float* bias, float* scores) {
  Floats<LANES> largest = fill<LANES>(-INFINITE);
  for (int from = 0; from < window.width; from += LANES) {
    const Ints<LANES> own = lanes_between<LANES>(window.first - from, window.first + window.columns - from);
    for (int r = 0; r < window.count; r++) {
      float* at = scores + int64_t(r) * window.width + from;
      Floats<LANES> score = load<LANES>(at);
      if (bias) score += load<LANES>(bias + window.rows[r].bias + from - window.first);
      score = own ? score : fill<LANES>(-INFINITE);
      store(at, score);
      largest = larger(largest, score);
    }
  }
  return largest_of<LANES>(largest);
}

// scores = 2^(scores - subtracted) up to `end`. Returns their sum.
template <int LANES>
inline float exponentiate(float* scores, const float* end, float subtracted) {
  Floats<LANES> total{};
  for (; scores < end; scores += LANES) {
    const Floats<LANES> weights = exp2_of<LANES>(load<LANES>(scores) - subtracted);
    store(scores, weights);
    total += weights;
  }
  return sum_of<LANES>(total);
}

template <int PARTS, bool ADD>
inline void weighted_part(const Vectors& vectors, const Window& window, const float* weights, int from, float* to) {
  constexpr int CHAINS = PARTS < 4 ? 4 / PARTS : 1;  // as many sums as a multiply-add takes cycles
  Floats<WIDE> sum[CHAINS][PARTS];
  for (int c = 0; c < CHAINS; c++)
    for (int i = 0; i < PARTS; i++) sum[c][i] = ADD && c == 0 ? load<WIDE>(to + from + i * WIDE) : Floats<WIDE>{};
  const int64_t pitch = vectors.pitch();
  weights += window.first;
  for (int r = 0; r < window.count; r++, weights += window.width) {
    const float* vector = vectors.vector(window.rows[r].row, window.column + window.first) + from;
    int k = 0;
    for (; k + CHAINS <= window.columns; k += CHAINS, vector += CHAINS * pitch)
      for (int c = 0; c < CHAINS; c++)
        for (int i = 0; i < PARTS; i++) sum[c][i] += weights[k + c] * load<WIDE>(vector + c * pitch + i * WIDE);
    for (; k < window.columns; k++, vector += pitch)
      for (int i = 0; i < PARTS; i++) sum[0][i] += weights[k] * load<WIDE>(vector + i * WIDE);
  }
  for (int i = 0; i < PARTS; i++) {
    for (int c = 1; c < CHAINS; c++) sum[0][i] += sum[c][i];
    store(to + from + i * WIDE, sum[0][i]);
  }
}

// to = sum of weight * vector over the window; with ADD, to += that sum.
template <bool ADD>
inline void weighted(const Vectors& vectors, const Window& window, const float* weights, float* to) {
  const int end = vectors.pitch();
  int from = 0;
  for (; from + 4 * WIDE <= end; from += 4 * WIDE) weighted_part<4, ADD>(vectors, window, weights, from, to);
  for (; from + 2 * WIDE <= end; from += 2 * WIDE) weighted_part<2, ADD>(vectors, window, weights, from, to);
  for (; from < end; from += WIDE) weighted_part<1, ADD>(vectors, window, weights, from, to);
}

inline float dot(const float* a, const float* b, int count) {
  Floats<WIDE> sum{};
  int i = 0;
  for (; i + WIDE <= count; i += WIDE) sum += load<WIDE>(a + i) * load<WIDE>(b + i);
  float total = sum_of<WIDE>(sum);
  for (; i < count; i++) total += a[i] * b[i];
  return total;
}

// weights = 2^(scores + bias - lse), in the place of the scores; gradients = weights * (gradients - delta). Zero for scores
// that are not the window's own. `bias` as in `add_bias`.
template <int LANES>
inline void differentiate(const Window& window, const float* bias, float lse, float delta, float* scores, float* gradients) {
  for (int from = 0; from < window.width; from += LANES) {
    const Ints<LANES> own = lanes_between<LANES>(window.first - from, window.first + window.columns - from);
    for (int r = 0; r < window.count; r++) {
      const int64_t at = int64_t(r) * window.width + from;
      Floats<LANES> score = load<LANES>(scores + at);
      if (bias) score += load<LANES>(bias + window.rows[r].bias + from - window.first);
      const Floats<LANES> weight = exp2_of<LANES>(score - lse);
      const Floats<LANES> gradient = weight * (load<LANES>(gradients + at) - delta);
      store(scores + at, own ? weight : Floats<LANES>{});
      store(gradients + at, own ? gradient : Floats<LANES>{});
    }
  }
}

// Adds the gradients of the scores to that of the bias, which starts as in `add_bias`.
template <int LANES>
inline void add_to_bias(const Window& window, const float* gradients, float* bias) {
  for (int r = 0; r < window.count; r++, gradients += window.width) {
    float* to = bias + window.rows[r].bias - window.first;
    for (int from = 0; from < window.width; from += LANES)
      store(to + from, load<LANES>(to + from) + load<LANES>(gradients + from));
  }
}

template <int QUERIES>
inline void spread_columns(const Vectors& vectors, const Window& window, int first, int last,
                           const float* const (&weights)[QUERIES], const float* const (&addends)[QUERIES]) {
  const int64_t pitch = vectors.pitch();
  for (int from = 0; from < pitch; from += WIDE) {
    Floats<WIDE> addend[QUERIES];
    for (int q = 0; q < QUERIES; q++) addend[q] = load<WIDE>(addends[q] + from);
    for (int r = 0; r < window.count; r++) {
      float* vector = vectors.vector(window.rows[r].row, window.column + first) + from;
      const int64_t at = int64_t(r) * window.width;
      for (int k = first; k < last; k++, vector += pitch) {
        Floats<WIDE> sum = load<WIDE>(vector);
        FASTNA_UNROLL
        for (int q = 0; q < QUERIES; q++) sum += weights[q][at + k] * addend[q];
        store(vector, sum);
      }
    }
  }
}

// vector += weight * addend for every vector of the window
inline void spread(const Vectors& vectors, const Window (&windows)[1], const float* const (&weights)[1],
                   const float* const (&addends)[1]) {
  const Window& window = windows[0];
  spread_columns<1>(vectors, window, window.first, window.first + window.columns, weights, addends);
}

// The same for two windows that start together, each vector of both written once.
inline void spread(const Vectors& vectors, const Window (&windows)[2], const float* const (&weights)[2],
                   const float* const (&addends)[2]) {
  const int first = windows[1].first;
  const int ends[2] = {windows[0].columns, first + windows[1].columns};
  const int shared = std::max(std::min(ends[0], ends[1]), first);
  spread_columns<1>(vectors, windows[0], 0, std::min(first, ends[0]), {weights[0]}, {addends[0]});
  spread_columns<2>(vectors, windows[0], first, shared, weights, addends);
  for (int q = 0; q < 2; q++) spread_columns<1>(vectors, windows[q], shared, ends[q], {weights[q]}, {addends[q]});
}

}  // namespace fastna
