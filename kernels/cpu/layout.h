// What a call is given, how it is cut into tasks, and the memory in which a task keeps keys and values.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "vector.h"

namespace fastna {

constexpr int WIDE = 16;  // floats that memory is padded to

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Strides in elements; the last dimension is contiguous.
struct TensorArguments {
  float* data;
  int64_t batch, axis[3], head;
};

struct AxisArguments {
  int32_t length, window, dilation, chunk;  // chunk: queries of a task, positions of a dilation group
  const int32_t* start;                     // [length]: a token's first key, a position in its dilation group
  const int32_t* count;                     // [length]: how many it sees
};

struct Arguments {
  AxisArguments axis[3];  // ranks 1 and 2 have leading axes of length 1
  int32_t batch, heads, key_heads, head_dim, value_dim, additional, threads;
  float scale;
  TensorArguments query, key, value, output, lse;
  TensorArguments additional_key, additional_value;  // axis[2] steps from one to the next
  const float* bias;  // [heads, bias_size] times log2(e), and WIDE more floats before and behind; or null
  int64_t bias_size;
  // Of the backward pass. What tasks share has a part for each, [tasks, ...], to be summed.
  TensorArguments grad_output, grad_lse, grad_query, grad_key, grad_value;  // grad_lse.data may be null
  float* grad_bias;              // [tasks, WIDE + heads / key_heads * bias_size + WIDE] or null
  float* grad_additional_key;    // [tasks, additional, head_dim]
  float* grad_additional_value;  // [tasks, additional, value_dim]
};

struct Range {
  int first, last;
  int size() const { return last - first; }
};

// Queries of one dilation group, and the keys that they see; positions in the group.
struct Group {
  int offset[3];
  Range queries[3], keys[3];

  int rows() const { return keys[0].size() * keys[1].size(); }
  int columns() const { return keys[2].size(); }
};

inline int chunks_of(const AxisArguments& axis) {
  const int longest = (axis.length + axis.dilation - 1) / axis.dilation;
  return (longest + axis.chunk - 1) / axis.chunk;
}

inline int groups_of(const Arguments& a) {
  int total = 1;
  for (const AxisArguments& axis : a.axis) total *= axis.dilation * chunks_of(axis);
  return total;
}

// The group of that number, or false where a shorter dilation group has no such chunk.
inline bool find_group(const Arguments& a, int number, Group& group) {
  for (int i = 2; i >= 0; i--) {
    const AxisArguments& axis = a.axis[i];
    group.offset[i] = number % axis.dilation;
    number /= axis.dilation;
    const int chunk = number % chunks_of(axis);
    number /= chunks_of(axis);
    const int length = (axis.length - group.offset[i] + axis.dilation - 1) / axis.dilation;
    group.queries[i] = {chunk * axis.chunk, std::min((chunk + 1) * axis.chunk, length)};
    if (group.queries[i].size() <= 0) return false;
    group.keys[i] = {length, 0};
    for (int position = group.queries[i].first; position < group.queries[i].last; position++) {
      const int token = group.offset[i] + position * axis.dilation;
      group.keys[i].first = std::min(group.keys[i].first, axis.start[token]);
      group.keys[i].last = std::max(group.keys[i].last, axis.start[token] + axis.count[token]);
    }
  }
  return true;
}

// Calls visit(y, x) for every row of a range.
template <class Visit>
inline void each_row(const Range (&range)[3], Visit visit) {
  for (int y = range[0].first; y < range[0].last; y++)
    for (int x = range[1].first; x < range[1].last; x++) visit(y, x);
}

// One row of a group's tokens in a tensor, one head. Its vectors lie far apart, where no hardware prefetches them: to read
// one asks for another, some columns ahead or in the next row.
class TensorRow {
 public:
  // Vectors that lie `step` apart, of no group: the additional ones.
  TensorRow(float* start, int columns, int64_t step) : columns_(columns), ahead_(0), step_(step), start_(start), next_(start) {}

  TensorRow(const Arguments& a, const TensorArguments& tensor, int batch, int head, const Group& group,
            const Range (&range)[3], int y, int x)
      : columns_(range[2].size()), ahead_(std::min(columns_, 12)), step_(tensor.axis[2] * a.axis[2].dilation) {
    auto start = [&](int y, int x) {
      const int position[3] = {y, x, range[2].first};
      float* start = tensor.data + batch * tensor.batch + head * tensor.head;
      for (int i = 0; i < 3; i++) start += (group.offset[i] + int64_t(position[i]) * a.axis[i].dilation) * tensor.axis[i];
      return start;
    };
    start_ = start(y, x);
    if (x + 1 < range[1].last) next_ = start(y, x + 1);
    else next_ = start(std::min(y + 1, range[0].last - 1), range[1].first);
  }

  float* write(int column) const { return start_ + column * step_; }

  const float* read(int column, int dim) const {
    const int64_t later = column + ahead_;
    const float* wanted = later < columns_ ? start_ + later * step_ : next_ + (later - columns_) * step_;
    for (int d = 0; d < dim; d += WIDE) __builtin_prefetch(wanted + d);
    return start_ + column * step_;
  }

 private:
  int columns_, ahead_;
  int64_t step_;
  float *start_, *next_;
};

// Rows of vectors, dimension by dimension: element d of column c of row r at [r][d][c]. A whole vector can be read from any
// window's first column on; behind the last column are zeros.
struct Columns {
  int dim, columns, beyond;  // beyond: columns that a read may reach past the last one
  float* data = nullptr;

  // Steps of many whole cache lines would put all dimensions of a column into the same few sets of the cache.
  int pitch() const {
    const int pitch = round_up(columns + beyond, WIDE);
    return pitch % (4 * WIDE) ? pitch : pitch + WIDE;
  }
  size_t row() const { return size_t(dim) * pitch(); }

  void put(int row, const TensorRow& from) const {
    float* to = data + row * this->row();
    const int step = pitch();
    for (int d = 0; d < dim; d++) std::fill(to + d * step + columns, to + (d + 1) * step, 0.0f);
    for (int column = 0; column < columns; column++) {
      const float* vector = from.read(column, dim);
      float* at = to + column;
      for (int d = 0; d < dim; d++, at += step) *at = vector[d];
    }
  }
};

// to = scale * from
inline void scaled_copy(const float* from, int dim, float scale, float* to) {
  int d = 0;
  for (; d + WIDE <= dim; d += WIDE) store(to + d, scale * load<WIDE>(from + d));
  for (; d < dim; d++) to[d] = scale * from[d];
}

// The same, and zeros up to a multiple of WIDE.
inline void padded_copy(const float* from, int dim, float scale, float* to) {
  scaled_copy(from, dim, scale, to);
  for (int d = dim; d % WIDE; d++) to[d] = 0;
}

// Rows of vectors, each padded with zeros: element d of column c of row r at [r][c][d].
struct Vectors {
  int dim, columns;
  float* data = nullptr;

  int pitch() const { return round_up(dim, WIDE); }
  size_t row() const { return size_t(columns) * pitch(); }

  float* vector(int row, int column) const { return data + row * this->row() + size_t(column) * pitch(); }
  void clear(int rows) const { std::fill(data, data + rows * row(), 0.0f); }
  void put(int row, const TensorRow& from) const {
    float* to = data + row * this->row();
    for (int column = 0; column < columns; column++, to += pitch()) padded_copy(from.read(column, dim), dim, 1, to);
  }
};

// Memory of one thread. A task says what it needs, piece by piece, and then gets it all at once.
class Memory {
 public:
  void want(float** piece, size_t floats) {
    pieces_[count_++] = {piece, total_};
    total_ += round_up(floats, WIDE);
  }
  void want(Columns& columns, int rows) { want(&columns.data, rows * columns.row()); }
  void want(Vectors& vectors, int rows) { want(&vectors.data, rows * vectors.row()); }

  void provide() {
    if (total_ > size_) {
      data_.reset(static_cast<float*>(std::aligned_alloc(64, total_ * sizeof(float))));
      if (!data_) throw std::bad_alloc();
      size_ = total_;
    }
    for (int i = 0; i < count_; i++) *pieces_[i].piece = data_.get() + pieces_[i].offset;
    count_ = 0;
    total_ = 0;
  }

  void release_if_large() {
    if (size_ <= KEPT) return;
    data_.reset();
    size_ = 0;
  }

 private:
  static constexpr size_t KEPT = 4 << 20;  // floats
  struct Piece {
    float** piece;
    size_t offset;
  };
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  Piece pieces_[24];
  int count_ = 0;
  size_t total_ = 0, size_ = 0;
  std::unique_ptr<float, Free> data_;
};

}  // namespace fastna
