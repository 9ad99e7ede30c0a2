// The forward pass.
#pragma once
#include <cmath>

#include "task.h"

namespace fastna {

template <int LANES>
struct Forward : Task<LANES> {
  using Base = Task<LANES>;
  using Base::a;
  Vectors values, extra_values;
  float* sum;

  Forward(const Arguments& a, int batch, int key_head, const Group& group, Memory& memory, int64_t)
      : Base(a, batch, key_head, group), values{a.value_dim, group.columns()}, extra_values{a.value_dim, a.additional} {
    this->want(memory);
    memory.want(values, group.rows());
    memory.want(extra_values, 1);
    memory.want(&sum, values.pitch());
    memory.provide();
    this->read(a.key, this->keys, a.additional_key, this->extra_keys);
    this->read(a.value, values, a.additional_value, extra_values);
  }

  template <int QUERIES>
  void attend(const Window (&windows)[QUERIES], const float* const (&from)[QUERIES], const int (&relative)[QUERIES],
              const float* bias, float* const (&output)[QUERIES], float* const (&lse)[QUERIES]) {
    const float* query[QUERIES];
    float *scores[QUERIES], *extra[QUERIES];
    for (int q = 0; q < QUERIES; q++) {
      padded_copy(from[q], a.head_dim, a.scale * LOG2_E, this->query[q]);
      query[q] = this->query[q];
      scores[q] = this->scores[q];
      extra[q] = this->extra_scores(windows[q], scores[q]);
    }
    const Window extra_window = this->extra_window();
    scores_of<LANES>(this->keys, query, windows[0], scores);
    if (a.additional) scores_of<LANES>(this->extra_keys, query, extra_window, extra);
    for (int q = 0; q < QUERIES; q++) {
      float largest = add_bias<LANES>(windows[q], bias ? bias + relative[q] : nullptr, scores[q]);
      if (a.additional) largest = std::max(largest, add_bias<LANES>(extra_window, nullptr, extra[q]));
      const float total = exponentiate<LANES>(scores[q], extra[q] + this->extra_width, largest);
      weighted<false>(values, windows[q], scores[q], sum);
      if (a.additional) weighted<true>(extra_values, extra_window, extra[q], sum);
      scaled_copy(sum, a.value_dim, 1 / total, output[q]);
      *lse[q] = (largest + std::log2(total)) * LN_2;
    }
  }

  void run() {
    for (int head = this->key_head * this->shared; head < (this->key_head + 1) * this->shared; head++) {
      const float* bias = a.bias ? a.bias + head * a.bias_size : nullptr;
      const auto& range = this->group.queries;
      each_row(range, [&](int y, int x) {
        const int rows = this->find_rows(y, x);
        const TensorRow query = this->row(a.query, head, range, y, x);
        const TensorRow output = this->row(a.output, head, range, y, x);
        const TensorRow lse = this->row(a.lse, head, range, y, x);
        auto read = [&](int column) { return query.read(column, a.head_dim); };
        this->each_pair(
            rows,
            [&](int c, const Window (&w)[2]) {
              attend<2>(w, {read(c), read(c + 1)}, {this->relative(w[0], c), this->relative(w[1], c + 1)}, bias,
                        {output.write(c), output.write(c + 1)}, {lse.write(c), lse.write(c + 1)});
            },
            [&](int c, const Window (&w)[1]) {
              attend<1>(w, {read(c)}, {this->relative(w[0], c)}, bias, {output.write(c)}, {lse.write(c)});
            });
      });
    }
  }
};

}  // namespace fastna
