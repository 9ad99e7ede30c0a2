// Query times key, one thread per (query, neighbour): the attention weights of arXiv 2403.04690's "naive" baseline.
//
// Also grad_output times value, which is the same operator. See ScoreMode for what is stored.
#pragma once

#include "fastna/weights.cuh"

namespace fastna {

struct NaiveScoresArguments {
  Geometry geometry;
  TensorArguments query, key, additional;    // grad_output, value and additional values for the gradient
  void* weights;                             // [batch, tokens, heads, pitch]; the gradient replaces the weights
  const float* rpb;                          // [heads, offsets], or null
  const float* statistic;                    // lse, or delta for the gradient: [batch, tokens, heads]
  i64 pitch;
  int channels;
  Chunks chunks;                             // rows: tokens * heads, columns: window_size + additional
};

template <class T_, int RANK_, ScoreMode MODE_, int THREADS_>
struct NaiveScoresConfig {
  using T = T_;
  static constexpr int RANK = RANK_, THREADS = THREADS_;
  static constexpr ScoreMode MODE = MODE_;
};

template <class Config>
FASTNA_DEVICE void naive_scores(const NaiveScoresArguments& args) {
  using T = typename Config::T;
  constexpr int RANK = Config::RANK;
  constexpr ScoreMode MODE = Config::MODE;
  const Geometry& geometry = args.geometry;
  const MatrixElement at = element_of_thread<Config::THREADS>(args.chunks);
  if (!at.valid) return;

  const int token = at.row / geometry.heads, head = at.row - token * geometry.heads;
  const int key_head = head / heads_per_key(geometry), in_window = window_size(geometry);
  const Point point = unravel<RANK>(token, geometry.axis[1].length, geometry.axis[2].length);
  const T* key;
  float bias = 0.f;
  if (at.column < in_window) {
    const Grouped query = grouped<RANK>(geometry, point);
    const Box keys = window_box<RANK>(geometry, query.group, query.position);
    const Point place = unravel<RANK>(at.column, geometry.axis[1].window, geometry.axis[2].window);
    if (!in_box<RANK>({{0, 0, 0}}, keys.size, place)) return;
    Point position = {{0, 0, 0}}, offset = {{0, 0, 0}};
    FASTNA_UNROLL
    for (int i = 3 - RANK; i < 3; ++i) {
      position.at[i] = keys.begin.at[i] + place.at[i];
      offset.at[i] = position.at[i] - query.position.at[i] + geometry.axis[i].window - 1;
    }
    key = channels_at<T>(args.key, at.batch, token_point<RANK>(geometry, query.group, position), key_head);
    if (MODE != ScoreMode::GRADIENT && args.rpb)
      bias = args.rpb[static_cast<i64>(head) * bias_size(geometry) + bias_entry<RANK>(geometry, offset)];
  } else {
    key = additional_at<T>(args.additional, at.batch, at.column - in_window, key_head);
  }

  const T* query = channels_at<T>(args.query, at.batch, point, head);
  float product = 0.f;
#pragma unroll 4
  for (int c = 0; c < args.channels; c += VECTOR<T>)
    product = dot_vector<T>(load_global_16(query + c), load_global_16(key + c), product);

  const i64 row = static_cast<i64>(at.batch) * args.chunks.rows + at.row;
  const float statistic = MODE == ScoreMode::SCORE ? 0.f : args.statistic[row];
  score_value<T, MODE>(static_cast<T*>(args.weights) + row * args.pitch + at.column, product, geometry.scale, bias, statistic);
}

}  // namespace fastna
