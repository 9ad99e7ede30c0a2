// The parts that every kernel's argument struct is made of. kernels/cuda/arguments.py packs the same fields in the same order.
#pragma once

#include "fastna/types.cuh"

namespace fastna {

// One spatial axis; see kernels/problem.py, class Axis.
struct AxisArguments {
  int length, window, dilation, stride, causal;
};

// A tensor [batch, axis 0, axis 1, axis 2, head, channel]: strides in elements, channels contiguous. Missing leading axes have length 1.
struct TensorArguments {
  void* data;
  i64 batch, axis[3], head;
};

// A call: rank 1 and 2 are padded with leading axes of length 1 and window 1.
struct Geometry {
  AxisArguments axis[3];
  int batch, heads, key_heads, additional;
  float scale;
};

// Address of channel 0 of one token and head.
template <class T>
FASTNA_DEVICE T* element(const TensorArguments& tensor, int batch, int t0, int t1, int t2, int head) {
  return static_cast<T*>(tensor.data) + (batch * tensor.batch + t0 * tensor.axis[0] + t1 * tensor.axis[1] +
                                         t2 * tensor.axis[2] + head * tensor.head);
}

}  // namespace fastna
