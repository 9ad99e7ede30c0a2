// One task: its keys, its windows, and the scores of the queries at work.
#pragma once
#include <new>
#include <type_traits>

#include "products.h"

namespace fastna {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

constexpr WindowRow ONE_ROW = {0, 0};

// Queries of one row that are at work together: each pass over them reads the same few keys, which stay in the nearest
// cache. Two whose windows together are no wider than what one takes anyway are joined: they share products.
struct Block {
  static constexpr int MOST = Addends::MOST;
  int column, count;
  Window windows[MOST];
  bool joined[MOST];  // with the next one
};

// Calls visit(number of the first, how many) for all queries of a block, joined ones together.
template <class Visit>
inline void each_joined(const Block& block, Visit visit) {
  for (int i = 0; i < block.count;) {
    if (block.joined[i]) {
      visit(i, std::integral_constant<int, 2>());
      i += 2;
    } else {
      visit(i, std::integral_constant<int, 1>());
      i++;
    }
  }
}

// The keys of a task, and scores of the queries at work: of the window, then of the additional keys.
template <int LANES>
struct Task {
  const Arguments& a;
  const int batch, key_head;
  const Group& group;
  const int shared, most_rows, width, extra_width;
  Columns keys, extra_keys;
  Vectors queries;
  float* score_memory;
  float* row_memory;

  Task(const Arguments& a, int batch, int key_head, const Group& group)
      : a(a), batch(batch), key_head(key_head), group(group), shared(a.heads / a.key_heads),
        most_rows(a.axis[0].window * a.axis[1].window), width(round_up(a.axis[2].window, LANES)),
        extra_width(round_up(a.additional, LANES)), keys(columns(a.head_dim)), extra_keys(extra_columns(a.head_dim)),
        queries{a.head_dim, Block::MOST} {}

  Columns columns(int dim) const { return {dim, group.columns(), width}; }
  Columns extra_columns(int dim) const { return {dim, a.additional, extra_width}; }

  // Scores of one query; and how many queries' scores the nearest cache holds beside their keys.
  int64_t scores_each() const { return round_up(int64_t(most_rows) * width + extra_width, WIDE); }
  int block_size() const { return scores_each() <= 128 ? Block::MOST : scores_each() <= 512 ? 4 : 2; }

  void want(Memory& memory) {
    memory.want(keys, group.rows());
    memory.want(extra_keys, 1);
    memory.want(queries, 1);
    memory.want(&score_memory, block_size() * scores_each());
    memory.want(&row_memory, most_rows * sizeof(WindowRow) / sizeof(float));
  }

  float* query(int i) const { return queries.vector(0, i); }
  float* scores(int i) const { return score_memory + i * scores_each(); }
  float* extra(const Window& window, float* scores) const { return scores + int64_t(window.count) * width; }

  TensorRow row(const TensorArguments& tensor, int head, const Range (&range)[3], int y, int x) const {
    return TensorRow(a, tensor, batch, head, group, range, y, x);
  }

  // Copies a tensor's vectors of the group into `to`, and its additional ones.
  template <class To>
  void read(const TensorArguments& tensor, const To& to, const TensorArguments& additional, const To& to_extra) const {
    int number = 0;
    each_row(group.keys, [&](int y, int x) { to.put(number++, row(tensor, key_head, group.keys, y, x)); });
    if (a.additional) to_extra.put(0, extra_row(additional));
  }
  TensorRow extra_row(const TensorArguments& additional) const {
    float* start = additional.data + batch * additional.batch + key_head * additional.head;
    return TensorRow(start, a.additional, additional.axis[2]);
  }

  // Finds the rows of the windows of all queries in row (y, x); returns how many.
  int find_rows(int y, int x) const {
    const int position[2] = {y, x};
    int start[2], count[2], relative[2];
    for (int i = 0; i < 2; i++) {
      const int token = group.offset[i] + position[i] * a.axis[i].dilation;
      start[i] = a.axis[i].start[token];
      count[i] = a.axis[i].count[token];
      relative[i] = start[i] - position[i] + a.axis[i].window - 1;
    }
    WindowRow* next = window_rows();
    for (int i = 0; i < count[0]; i++) {
      for (int j = 0; j < count[1]; j++) {
        const int row = (start[0] + i - group.keys[0].first) * group.keys[1].size() + start[1] + j - group.keys[1].first;
        const int64_t bias_row = int64_t(relative[0] + i) * (2 * a.axis[1].window - 1) + relative[1] + j;
        *next++ = {row, bias_row * (2 * a.axis[2].window - 1)};
      }
    }
    return count[0] * count[1];
  }
  WindowRow* window_rows() const { return reinterpret_cast<WindowRow*>(row_memory); }

  // The window of the query in `column`, its scores starting at its first key.
  Window window(int rows, int column) const {
    const int token = group.offset[2] + (group.queries[2].first + column) * a.axis[2].dilation;
    return {window_rows(), rows, a.axis[2].start[token] - group.keys[2].first, 0, a.axis[2].count[token], width};
  }
  Window extra_window() const { return {&ONE_ROW, a.additional ? 1 : 0, 0, 0, a.additional, extra_width}; }

  // Where on the last axis of the bias that of the window's first key is.
  int relative(const Window& window, int column) const {
    const int first = group.keys[2].first + window.column + window.first;
    return first - (group.queries[2].first + column) + a.axis[2].window - 1;
  }

  // Calls visit(block) for all queries of a row, whose windows have the rows found last.
  template <class Visit>
  void each_block(int rows, Visit visit) const {
    Block block;
    const int columns = group.queries[2].size(), size = block_size();
    for (block.column = 0; block.column < columns; block.column += size) {
      block.count = std::min(size, columns - block.column);
      for (int i = 0; i < block.count; i++) {
        block.windows[i] = window(rows, block.column + i);
        block.joined[i] = false;
      }
      for (int i = 0; i + 1 < block.count; i++) {
        const Window& one = block.windows[i];
        Window& two = block.windows[i + 1];
        const int apart = two.column - one.column;
        if (apart < 0 || apart + two.columns > width) continue;
        two.column = one.column;
        two.first = apart;
        block.joined[i++] = true;
      }
      visit(block);
    }
  }

  // to(i) = keys . vectors(i) over all windows of the block, and over the additional keys.
  template <class VectorOf, class ScoresOf>
  void multiply(const Block& block, const Columns& keys, const Columns& extra_keys, VectorOf vector_of, ScoresOf to) const {
    auto multiply_rows = [&](const Columns& keys, int first, auto window_of, auto to) {
      each_joined(block, [&](int i, auto queries) {
        constexpr int QUERIES = decltype(queries)::value;
        const float* vectors[QUERIES];
        float* scores[QUERIES];
        for (int q = 0; q < QUERIES; q++) vectors[q] = vector_of(i + q), scores[q] = to(i + q);
        scores_of<LANES, QUERIES>(keys, vectors, window_of(i), first, scores);
      });
    };
    for (int first = 0; first < block.windows[0].count; first += ROWS_AT_ONCE)
      multiply_rows(keys, first, [&](int i) -> const Window& { return block.windows[i]; }, to);
    if (!a.additional) return;
    const Window window = extra_window();
    multiply_rows(extra_keys, 0, [&](int) -> const Window& { return window; },
                  [&](int i) { return extra(block.windows[i], to(i)); });
  }

  // Calls finish(i, sum over its keys of weights(i) * vector) for all queries of the block; `sum` is memory for one.
  template <class WeightsOf, class Finish>
  void combine(const Block& block, const Vectors& vectors, const Vectors& extra_vectors, float* sum, WeightsOf weights_of,
               Finish finish) const {
    for (int i = 0; i < block.count; i++) {
      const Window& window = block.windows[i];
      weighted<false>(vectors, window, weights_of(i), sum);
      if (a.additional) weighted<true>(extra_vectors, extra_window(), extra(window, weights_of(i)), sum);
      finish(i, sum);
    }
  }
};

// Runs Work(a, batch, key head, group, memory, number of the task) for every task, side by side. False if memory ran out.
template <class Work>
bool run_tasks(const Arguments& a) {
  const int groups = groups_of(a);
  const int64_t tasks = int64_t(a.batch) * a.key_heads * groups;
  bool enough = true;
#pragma omp parallel num_threads(a.threads)
  {
    static thread_local Memory memory;  // kept: fresh pages would cost as much as the work
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      Group group;
      const int item = int(task / groups);
      if (!find_group(a, int(task % groups), group)) continue;
      try {
        Work(a, item / a.key_heads, item % a.key_heads, group, memory, task).run();
      } catch (const std::bad_alloc&) {
#pragma omp atomic write
        enough = false;
      }
    }
    memory.release_if_large();
  }
  return enough;
}

}  // namespace fastna
