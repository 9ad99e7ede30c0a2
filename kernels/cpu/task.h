// One task: its keys, its windows, and the scores of the queries at work.
#pragma once
#include <new>

#include "products.h"

namespace fastna {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

constexpr WindowRow ONE_ROW = {0, 0};

// The keys of a task, and scores of the queries at work: of the window, then of the additional keys.
template <int LANES>
struct Task {
  const Arguments& a;
  const int batch, key_head;
  const Group& group;
  const int shared, most_rows, width, extra_width;
  Columns keys, extra_keys;
  float* query[2];
  float* scores[2];
  float* row_memory;

  Task(const Arguments& a, int batch, int key_head, const Group& group)
      : a(a), batch(batch), key_head(key_head), group(group), shared(a.heads / a.key_heads),
        most_rows(a.axis[0].window * a.axis[1].window), width(round_up(a.axis[2].window, LANES)),
        extra_width(round_up(a.additional, LANES)), keys(columns(a.head_dim)), extra_keys(extra_columns(a.head_dim)) {}

  Columns columns(int dim) const { return {dim, group.columns(), width}; }
  Columns extra_columns(int dim) const { return {dim, a.additional, extra_width}; }

  void want(Memory& memory) {
    memory.want(keys, group.rows());
    memory.want(extra_keys, 1);
    for (float*& piece : query) memory.want(&piece, a.head_dim);
    for (float*& piece : scores) memory.want(&piece, scores_in(most_rows));
    memory.want(&row_memory, most_rows * sizeof(WindowRow) / sizeof(float));
  }

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

  int64_t scores_in(int rows) const { return round_up(int64_t(rows) * width + extra_width, WIDE); }
  float* extra_scores(const Window& window, float* scores) const { return scores + int64_t(window.count) * width; }

  // Calls visit(first column, windows) for all queries of a row, by twos where their windows together are no wider than
  // what one takes anyway.
  template <class VisitTwo, class VisitOne>
  void each_pair(int rows, VisitTwo visit_two, VisitOne visit_one) const {
    const int columns = group.queries[2].size();
    for (int column = 0; column < columns;) {
      if (column + 1 < columns) {
        Window two[2] = {window(rows, column), window(rows, column + 1)};
        const int apart = two[1].column - two[0].column;
        if (apart >= 0 && apart + two[1].columns <= width) {
          two[1].column = two[0].column;
          two[1].first = apart;
          visit_two(column, two);
          column += 2;
          continue;
        }
      }
      const Window one[1] = {window(rows, column)};
      visit_one(column, one);
      column++;
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
