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

// Of which scores are found at once: eight sums of two queries keep the multipliers busy, and the keys stay in the nearest
// cache for all queries of a block.
constexpr int ROWS_AT_ONCE = 4;

template <int LANES, int QUERIES, int ROWS>
FASTNA_APART void scores_of_rows(const Columns& keys, const float* const (&query)[QUERIES], const Window& window, int first,
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

// scores[q] = keys . query[q] over rows [first, first + ROWS_AT_ONCE) and all of `window.width`, for queries whose windows
// have the same rows
template <int LANES, int QUERIES>
inline void scores_of(const Columns& keys, const float* const (&query)[QUERIES], const Window& window, int first,
                      float* const (&scores)[QUERIES]) {
  for (int from = 0; from < window.width; from += LANES) {
    switch (window.count - first) {
      case 1: scores_of_rows<LANES, QUERIES, 1>(keys, query, window, first, from, scores); break;
      case 2: scores_of_rows<LANES, QUERIES, 2>(keys, query, window, first, from, scores); break;
      case 3: scores_of_rows<LANES, QUERIES, 3>(keys, query, window, first, from, scores); break;
      default: scores_of_rows<LANES, QUERIES, ROWS_AT_ONCE>(keys, query, window, first, from, scores);
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
FASTNA_APART void weighted_part(const Vectors& vectors, const Window& window, const float* weights, int from, float* to) {
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

// Queries of a block as the sums over them see them: whose `weights` for the key in column c of row r are at
// weights[query] + r * width + c, and which see keys [start, end) of each row. Neither start nor end ever falls.
struct Addends {
  static constexpr int MOST = 16;
  int count, width;
  const WindowRow* rows;
  int row_count;
  const float* weights[MOST];
  const float* vectors[MOST];
  int start[MOST], end[MOST];
};

// to[k] += sum over queries [first, last) of the weight of key `column` + k * the query's vector, for KEYS keys, PARTS * WIDE elements.
template <int KEYS, int PARTS>
inline void add_queries(const Addends& from, int first, int last, int64_t weight, int element, float* const (&to)[KEYS]) {
  Floats<WIDE> sum[KEYS][PARTS];
  FASTNA_UNROLL
  for (int k = 0; k < KEYS; k++) {
    FASTNA_UNROLL
    for (int i = 0; i < PARTS; i++) sum[k][i] = load<WIDE>(to[k] + i * WIDE);
  }
  for (int q = first; q < last; q++) {
    const float* weights = from.weights[q] + weight;
    FASTNA_UNROLL
    for (int i = 0; i < PARTS; i++) {
      const Floats<WIDE> vector = load<WIDE>(from.vectors[q] + element + i * WIDE);
      FASTNA_UNROLL
      for (int k = 0; k < KEYS; k++) sum[k][i] += weights[k] * vector;
    }
  }
  FASTNA_UNROLL
  for (int k = 0; k < KEYS; k++) {
    FASTNA_UNROLL
    for (int i = 0; i < PARTS; i++) store(to[k] + i * WIDE, sum[k][i]);
  }
}

template <int PARTS>
FASTNA_APART void spread_part(const Vectors& vectors, const Addends& from, int element) {
  const int last_column = from.end[from.count - 1];
  for (int r = 0; r < from.row_count; r++) {
    int first[2] = {0, 0}, last[2] = {0, 0};  // the queries that see each of the two keys
    for (int column = from.start[0]; column < last_column; column += 2) {
      for (int k = 0; k < 2; k++) {
        while (first[k] < from.count && from.end[first[k]] <= column + k) first[k]++;
        while (last[k] < from.count && from.start[last[k]] <= column + k) last[k]++;
      }
      const int64_t weight = int64_t(r) * from.width + column;
      float* key = vectors.vector(from.rows[r].row, column) + element;
      float* next = key + vectors.pitch();
      const int both = std::min(first[1], last[0]);
      if (first[0] < both) add_queries<1, PARTS>(from, first[0], both, weight, element, {key});
      if (both < last[0]) add_queries<2, PARTS>(from, both, last[0], weight, element, {key, next});
      const int alone = std::max(last[0], first[1]);
      if (alone < last[1]) add_queries<1, PARTS>(from, alone, last[1], weight + 1, element, {next});
    }
  }
}

// vector += sum of weight * the query's vector, for every key that some query sees
inline void spread(const Vectors& vectors, const Addends& from) {
  const int end = vectors.pitch();
  int element = 0;
  for (; element + 2 * WIDE <= end; element += 2 * WIDE) spread_part<2>(vectors, from, element);
  for (; element < end; element += WIDE) spread_part<1>(vectors, from, element);
}

}  // namespace fastna
