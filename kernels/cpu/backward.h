// The backward pass. With weights p = exp(s - lse), dp = grad_output . value and delta = grad_output . output - grad_lse:
// ds = p (dp - delta), grad_query = scale sum ds key, grad_key = scale sum ds query, grad_value = sum p grad_output, and
// the bias gets ds. A task has whole dilation groups, so it alone adds to the gradients of its keys.
#pragma once
#include "task.h"

namespace fastna {

template <int LANES>
struct Backward : Task<LANES> {
  using Base = Task<LANES>;
  using Base::a;
  Columns values, extra_values;
  Vectors key_vectors, grad_key, grad_value, extra_key_vectors, grad_extra_key, grad_extra_value;
  float *grad_output[2], *gradients[2];  // of the queries at work, and of their scores
  float *sum, *grad_bias;
  const int64_t task;

  Backward(const Arguments& a, int batch, int key_head, const Group& group, Memory& memory, int64_t task)
      : Base(a, batch, key_head, group), values(this->columns(a.value_dim)), extra_values(this->extra_columns(a.value_dim)),
        key_vectors{a.head_dim, group.columns()}, grad_key(key_vectors), grad_value{a.value_dim, group.columns()},
        extra_key_vectors{a.head_dim, a.additional}, grad_extra_key(extra_key_vectors),
        grad_extra_value{a.value_dim, a.additional}, task(task) {
    this->want(memory);
    memory.want(values, group.rows());
    memory.want(extra_values, 1);
    for (Vectors* vectors : {&key_vectors, &grad_key, &grad_value}) memory.want(*vectors, group.rows());
    for (Vectors* vectors : {&extra_key_vectors, &grad_extra_key, &grad_extra_value}) memory.want(*vectors, 1);
    for (float*& piece : grad_output) memory.want(&piece, grad_value.pitch());
    for (float*& piece : gradients) memory.want(&piece, this->scores_in(this->most_rows));
    memory.want(&sum, key_vectors.pitch());
    memory.provide();
    this->read(a.key, this->keys, a.additional_key, this->extra_keys);
    this->read(a.key, key_vectors, a.additional_key, extra_key_vectors);
    this->read(a.value, values, a.additional_value, extra_values);
    for (const Vectors* vectors : {&grad_key, &grad_value}) vectors->clear(group.rows());
    for (const Vectors* vectors : {&grad_extra_key, &grad_extra_value}) vectors->clear(1);
    grad_bias = a.grad_bias ? a.grad_bias + task * (this->shared * a.bias_size + 2 * WIDE) + WIDE : nullptr;
  }

  template <int QUERIES>
  struct At {
    int relative[QUERIES];
    const float *query[QUERIES], *output[QUERIES], *grad_output[QUERIES];
    float lse[QUERIES], grad_lse[QUERIES];
    float* grad_query[QUERIES];
  };

  template <int QUERIES>
  void attend(const Window (&windows)[QUERIES], const At<QUERIES>& at, const float* bias, float* head_grad_bias) {
    const float *query[QUERIES], *direction[QUERIES];
    float *scores[QUERIES], *extra[QUERIES], *ds[QUERIES], *extra_ds[QUERIES];
    float delta[QUERIES];
    for (int q = 0; q < QUERIES; q++) {
      padded_copy(at.query[q], a.head_dim, a.scale * LOG2_E, this->query[q]);
      padded_copy(at.grad_output[q], a.value_dim, 1, grad_output[q]);
      query[q] = this->query[q];
      direction[q] = grad_output[q];
      scores[q] = this->scores[q];
      extra[q] = this->extra_scores(windows[q], scores[q]);
      ds[q] = gradients[q];
      extra_ds[q] = this->extra_scores(windows[q], ds[q]);
      delta[q] = dot(grad_output[q], at.output[q], a.value_dim) - at.grad_lse[q];
    }
    const Window extra_window = this->extra_window();
    scores_of<LANES>(this->keys, query, windows[0], scores);
    scores_of<LANES>(values, direction, windows[0], ds);
    if (a.additional) {
      scores_of<LANES>(this->extra_keys, query, extra_window, extra);
      scores_of<LANES>(extra_values, direction, extra_window, extra_ds);
    }
    for (int q = 0; q < QUERIES; q++) {
      const Window& window = windows[q];
      const float lse = at.lse[q] * LOG2_E;
      differentiate<LANES>(window, bias ? bias + at.relative[q] : nullptr, lse, delta[q], scores[q], ds[q]);
      if (head_grad_bias) add_to_bias<LANES>(window, ds[q], head_grad_bias + at.relative[q]);
      weighted<false>(key_vectors, window, ds[q], sum);
      if (a.additional) {
        differentiate<LANES>(extra_window, nullptr, lse, delta[q], extra[q], extra_ds[q]);
        weighted<true>(extra_key_vectors, extra_window, extra_ds[q], sum);
        spread(grad_extra_key, {extra_window}, {extra_ds[q]}, {query[q]});
        spread(grad_extra_value, {extra_window}, {extra[q]}, {direction[q]});
      }
      scaled_copy(sum, a.head_dim, a.scale, at.grad_query[q]);
    }
    spread(grad_key, windows, ds, query);
    spread(grad_value, windows, scores, direction);
  }

  void run() {
    for (int i = 0; i < this->shared; i++) {
      const int head = this->key_head * this->shared + i;
      const float* bias = a.bias ? a.bias + head * a.bias_size : nullptr;
      float* head_grad_bias = grad_bias ? grad_bias + i * a.bias_size : nullptr;
      const auto& range = this->group.queries;
      each_row(range, [&](int y, int x) {
        const int rows = this->find_rows(y, x);
        const TensorRow query = this->row(a.query, head, range, y, x);
        const TensorRow output = this->row(a.output, head, range, y, x);
        const TensorRow grad_output = this->row(a.grad_output, head, range, y, x);
        const TensorRow grad_query = this->row(a.grad_query, head, range, y, x);
        const TensorRow lse = this->row(a.lse, head, range, y, x);
        const TensorRow grad_lse = this->row(a.grad_lse, head, range, y, x);
        auto find = [&](auto& at, int q, const Window& window, int column) {
          at.relative[q] = this->relative(window, column);
          at.query[q] = query.read(column, a.head_dim);
          at.output[q] = output.read(column, a.value_dim);
          at.grad_output[q] = grad_output.read(column, a.value_dim);
          at.grad_query[q] = grad_query.write(column);
          at.lse[q] = *lse.write(column);
          at.grad_lse[q] = a.grad_lse.data ? *grad_lse.write(column) : 0;
        };
        this->each_pair(
            rows,
            [&](int column, const Window (&windows)[2]) {
              At<2> at;
              for (int q = 0; q < 2; q++) find(at, q, windows[q], column + q);
              attend(windows, at, bias, head_grad_bias);
            },
            [&](int column, const Window (&windows)[1]) {
              At<1> at;
              find(at, 0, windows[0], column);
              attend(windows, at, bias, head_grad_bias);
            });
      });
    }
    write();
  }

  // Scores are in base 2, so grad_key was summed with a query that is log2(e) too long.
  void write() const {
    int number = 0;
    each_row(this->group.keys, [&](int y, int x) {
      const TensorRow key = this->row(a.grad_key, this->key_head, this->group.keys, y, x);
      const TensorRow value = this->row(a.grad_value, this->key_head, this->group.keys, y, x);
      for (int column = 0; column < this->group.columns(); column++) {
        scaled_copy(grad_key.vector(number, column), a.head_dim, LN_2, key.write(column));
        scaled_copy(grad_value.vector(number, column), a.value_dim, 1, value.write(column));
      }
      number++;
    });
    for (int i = 0; i < a.additional; i++) {
      const int64_t number = task * a.additional + i;
      scaled_copy(grad_extra_key.vector(0, i), a.head_dim, LN_2, a.grad_additional_key + number * a.head_dim);
      scaled_copy(grad_extra_value.vector(0, i), a.value_dim, 1, a.grad_additional_value + number * a.value_dim);
    }
  }
};

}  // namespace fastna
