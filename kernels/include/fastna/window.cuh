// The window arithmetic of kernels/problem.py, on the device. Positions are counted inside one dilation group.
//
// `Axis` is AxisArguments, or any type with its members: a configuration may give them as `static constexpr` instead.
#pragma once

#include "fastna/arguments.cuh"

namespace fastna {

struct Interval {
  int begin, end;
  FASTNA_DEVICE int size() const { return end - begin; }
  FASTNA_DEVICE bool contains(int i) const { return i >= begin && i < end; }
};

// Token i is position i / dilation of dilation group i % dilation.
template <class Axis>
FASTNA_DEVICE int group_of(const Axis& axis, int token) {
  return token % axis.dilation;
}
template <class Axis>
FASTNA_DEVICE int position_of(const Axis& axis, int token) {
  return token / axis.dilation;
}
template <class Axis>
FASTNA_DEVICE int token_at(const Axis& axis, int group, int position) {
  return position * axis.dilation + group;
}
template <class Axis>
FASTNA_DEVICE int group_length(const Axis& axis, int group) {
  return (axis.length - group + axis.dilation - 1) / axis.dilation;
}

// Keys that the query at `position` of a group of `length` tokens sees.
template <class Axis>
FASTNA_DEVICE Interval window_at(const Axis& axis, int position, int length) {
  const int first = axis.stride == 1 ? position : position / axis.stride * axis.stride;
  if (axis.causal) {
    const int leader = minimum(first + axis.stride - 1, length - 1);
    return {maximum(leader - axis.window + 1, 0), position + 1};
  }
  const int leader = minimum(first + axis.stride / 2, length - 1);
  const int begin = minimum(maximum(leader - axis.window / 2, 0), length - axis.window);
  return {begin, begin + axis.window};
}

// Queries that see the key at `position`: the inverse of window_at, an interval too.
template <class Axis>
FASTNA_DEVICE Interval queries_at(const Axis& axis, int position, int length) {
  int first, reach;
  bool everyone;
  if (axis.causal) {
    first = position;
    reach = position + axis.window - axis.stride;
    everyone = position + axis.window >= length;
  } else {
    const int right = axis.window / 2 + axis.window % 2 - 1;
    const int behind = position - right - axis.stride / 2;
    first = position < axis.window || behind <= 0 ? 0 : (behind + axis.stride - 1) / axis.stride * axis.stride;
    reach = position + axis.window / 2 - axis.stride / 2;
    everyone = position >= length - axis.window;
  }
  return {first, everyone ? length : minimum((reach / axis.stride + 1) * axis.stride, length)};
}

}  // namespace fastna
