// Neighborhood attention on a CPU, forward and backward: float32, up to three axes, any window.
//
// A task is one batch item, key head and dilation group; in the forward pass one chunk of its queries. It copies the
// group's keys and values side by side into memory of its own, keys with their columns innermost: the scores of one row of
// a window are then a few vectors whose lanes are consecutive keys, and (almost) no key outside the window is multiplied.
// Where windows lie is said by tables, one for each axis (kernels/problem.py).
//
// Scores are in base 2: the query is multiplied by scale * log2(e), the bias was by log2(e).
#include "backward.h"
#include "forward.h"

namespace {

template <template <int> class Work>
int run(const fastna::Arguments* a) {
  return !(a->axis[2].window <= 8 ? fastna::run_tasks<Work<8>>(*a) : fastna::run_tasks<Work<16>>(*a));
}

}  // namespace

// 0, or 1 where memory ran out
extern "C" int fastna_forward(const fastna::Arguments* a) { return run<fastna::Forward>(a); }
extern "C" int fastna_backward(const fastna::Arguments* a) { return run<fastna::Backward>(a); }
extern "C" int fastna_arguments_size() { return sizeof(fastna::Arguments); }
extern "C" int fastna_wide() { return fastna::WIDE; }
