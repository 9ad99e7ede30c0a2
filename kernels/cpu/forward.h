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

  void run() {
    for (int head = this->key_head * this->shared; head < (this->key_head + 1) * this->shared; head++) {
      const float* bias = a.bias ? a.bias + head * a.bias_size : nullptr;
      const auto& range = this->group.queries;
      each_row(range, [&](int y, int x) {
        const TensorRow query = this->row(a.query, head, range, y, x);
        const TensorRow output = this->row(a.output, head, range, y, x);
        const TensorRow lse = this->row(a.lse, head, range, y, x);
        this->each_block(this->find_rows(y, x), [&](const Block& block) {
          for (int i = 0; i < block.count; i++)
            padded_copy(query.read(block.column + i, a.head_dim), a.head_dim, a.scale * LOG2_E, this->query(i));
          auto query_of = [&](int i) { return this->query(i); };
          auto scores_of = [&](int i) { return this->scores(i); };
          this->multiply(block, this->keys, this->extra_keys, query_of, scores_of);
          float totals[Block::MOST];
          for (int i = 0; i < block.count; i++)
            totals[i] = weigh(block.windows[i], this->relative(block.windows[i], block.column + i), bias, this->scores(i),
                              lse.write(block.column + i));
          this->combine(block, values, extra_values, sum, scores_of, [&](int i, const float* sum) {
            scaled_copy(sum, a.value_dim, 1 / totals[i], output.write(block.column + i));
          });
        });
      });
    }
  }

 private:
  // Scores become weights, divided by nothing yet; returns their sum.
  float weigh(const Window& window, int relative, const float* bias, float* scores, float* lse) const {
    float* extra = this->extra(window, scores);
    float largest = add_bias<LANES>(window, bias ? bias + relative : nullptr, scores);
    if (a.additional) largest = std::max(largest, add_bias<LANES>(this->extra_window(), nullptr, extra));
    const float total = exponentiate<LANES>(scores, extra + this->extra_width, largest);
    *lse = (largest + std::log2(total)) * LN_2;
    return total;
  }
};

}  // namespace fastna
