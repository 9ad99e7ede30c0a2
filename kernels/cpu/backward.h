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
  Vectors directions;       // grad_output of the queries at work
  float* gradient_memory;   // of their scores
  float *sum, *grad_bias;
  const int64_t task;

  Backward(const Arguments& a, int batch, int key_head, const Group& group, Memory& memory, int64_t task)
      : Base(a, batch, key_head, group), values(this->columns(a.value_dim)), extra_values(this->extra_columns(a.value_dim)),
        key_vectors{a.head_dim, group.columns()}, grad_key(key_vectors), grad_value{a.value_dim, group.columns()},
        extra_key_vectors{a.head_dim, a.additional}, grad_extra_key(extra_key_vectors),
        grad_extra_value{a.value_dim, a.additional}, directions{a.value_dim, Block::MOST}, task(task) {
    this->want(memory);
    memory.want(values, group.rows());
    memory.want(extra_values, 1);
    for (Vectors* vectors : {&key_vectors, &grad_key, &grad_value}) memory.want(*vectors, group.rows());
    for (Vectors* vectors : {&extra_key_vectors, &grad_extra_key, &grad_extra_value}) memory.want(*vectors, 1);
    memory.want(directions, 1);
    memory.want(&gradient_memory, this->block_size() * this->scores_each());
    memory.want(&sum, key_vectors.pitch());
    memory.provide();
    this->read(a.key, this->keys, a.additional_key, this->extra_keys);
    this->read(a.key, key_vectors, a.additional_key, extra_key_vectors);
    this->read(a.value, values, a.additional_value, extra_values);
    for (const Vectors* vectors : {&grad_key, &grad_value}) vectors->clear(group.rows());
    for (const Vectors* vectors : {&grad_extra_key, &grad_extra_value}) vectors->clear(1);
    grad_bias = a.grad_bias ? a.grad_bias + task * (this->shared * a.bias_size + 2 * WIDE) + WIDE : nullptr;
  }

  void run() {
    for (int i = 0; i < this->shared; i++) {
      const int head = this->key_head * this->shared + i;
      const float* bias = a.bias ? a.bias + head * a.bias_size : nullptr;
      float* head_grad_bias = grad_bias ? grad_bias + i * a.bias_size : nullptr;
      const auto& range = this->group.queries;
      each_row(range, [&](int y, int x) {
        const TensorRow query = this->row(a.query, head, range, y, x);
        const TensorRow output = this->row(a.output, head, range, y, x);
        const TensorRow grad_output = this->row(a.grad_output, head, range, y, x);
        const TensorRow grad_query = this->row(a.grad_query, head, range, y, x);
        const TensorRow lse = this->row(a.lse, head, range, y, x);
        const TensorRow grad_lse = this->row(a.grad_lse, head, range, y, x);
        this->each_block(this->find_rows(y, x), [&](const Block& block) {
          float delta[Block::MOST];
          for (int i = 0; i < block.count; i++) {
            const int column = block.column + i;
            padded_copy(query.read(column, a.head_dim), a.head_dim, a.scale * LOG2_E, this->query(i));
            padded_copy(grad_output.read(column, a.value_dim), a.value_dim, 1, direction(i));
            delta[i] = dot(direction(i), output.read(column, a.value_dim), a.value_dim);
            if (a.grad_lse.data) delta[i] -= *grad_lse.write(column);
          }
          auto query_of = [&](int i) { return this->query(i); };
          auto direction_of = [&](int i) { return direction(i); };
          auto scores_of = [&](int i) { return this->scores(i); };
          auto gradients_of = [&](int i) { return gradients(i); };
          this->multiply(block, this->keys, this->extra_keys, query_of, scores_of);
          this->multiply(block, values, extra_values, direction_of, gradients_of);
          for (int i = 0; i < block.count; i++)
            find_gradients(block.windows[i], i, this->relative(block.windows[i], block.column + i), bias, head_grad_bias,
                           *lse.write(block.column + i) * LOG2_E, delta[i]);
          this->combine(block, key_vectors, extra_key_vectors, sum, gradients_of, [&](int i, const float* sum) {
            scaled_copy(sum, a.head_dim, a.scale, grad_query.write(block.column + i));
          });
          add_to_all(block, grad_key, grad_extra_key, gradients_of, query_of);
          add_to_all(block, grad_value, grad_extra_value, scores_of, direction_of);
        });
      });
    }
    write();
  }

 private:
  float* direction(int i) const { return directions.vector(0, i); }
  float* gradients(int i) const { return gradient_memory + i * this->scores_each(); }

  // Query i's scores become weights, its products with the values gradients of the scores; those of the bias are added.
  void find_gradients(const Window& window, int i, int relative, const float* bias, float* head_grad_bias, float lse,
                      float delta) const {
    float *weights = this->scores(i), *ds = gradients(i);
    differentiate<LANES>(window, bias ? bias + relative : nullptr, lse, delta, weights, ds);
    if (head_grad_bias) add_to_bias<LANES>(window, ds, head_grad_bias + relative);
    if (a.additional)
      differentiate<LANES>(this->extra_window(), nullptr, lse, delta, this->extra(window, weights), this->extra(window, ds));
  }

  // vectors += weight * the query's own vector, for every key of every query of the block
  template <class WeightsOf, class VectorOf>
  void add_to_all(const Block& block, const Vectors& vectors, const Vectors& extra_vectors, WeightsOf weights_of,
                  VectorOf vector_of) const {
    Addends addends = {block.count, this->width, block.windows[0].rows, block.windows[0].count, {}, {}, {}, {}};
    for (int i = 0; i < block.count; i++) {
      const Window& window = block.windows[i];
      addends.weights[i] = weights_of(i) - window.column;
      addends.vectors[i] = vector_of(i);
      addends.start[i] = window.column + window.first;
      addends.end[i] = addends.start[i] + window.columns;
    }
    spread(vectors, addends);
    if (!a.additional) return;
    addends.rows = &ONE_ROW;
    addends.row_count = 1;
    for (int i = 0; i < block.count; i++) {
      addends.weights[i] = this->extra(block.windows[i], weights_of(i));
      addends.start[i] = 0;
      addends.end[i] = a.additional;
    }
    spread(extra_vectors, addends);
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
