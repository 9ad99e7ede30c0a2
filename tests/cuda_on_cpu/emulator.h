// CUDA's keywords and vector types on a CPU, and the door to the engine (engine.cpp) that runs a grid.
//
// Included by fastna/types.cuh when FASTNA_EMULATE is defined. It includes next to nothing, so that a kernel compiles fast.
#pragma once

#include <math.h>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

// What every lane of a warp must do together. The order is that of NAMES in engine.cpp.
enum Operation : int {
  SYNC_WARP,
  WARP_INDEX,
  SHUFFLE,
  ANY,
  ALL,
  LOAD_MATRIX_X4,
  LOAD_MATRIX_X4_TRANSPOSED,
  LOAD_MATRIX_X2,
  LOAD_MATRIX_X2_TRANSPOSED,
  MOVE_MATRIX,
  MMA_BF16,
  MMA_HALF,
  MMA_TF32,
  BARRIER_ARRIVE,
  WGMMA,
  WGMMA_FENCE,
  WGMMA_COMMIT,
  WGMMA_WAIT,
  FENCE_ASYNC,
};

// Of a wgmma, besides its operands.
enum ProductFlag : unsigned { IS_HALF = 1, ACCUMULATE = 2, TRANSPOSED = 4, FROM_REGISTERS = 8, TRANSPOSED_A = 16 };

// Of the thread that runs now.
struct Current {
  int thread;
  unsigned block, blocks;
  unsigned char* shared;
};

extern "C" {
extern Current emulator_current;

// Meets the other lanes of the warp; the last to come runs the operation over all `in`, then each lane finds its result in `out`.
void emulator_collective(Operation operation, const unsigned* in, int in_words, unsigned* out, int out_words);
void emulator_barrier(int id, int threads);
void emulator_copy_async(unsigned shared, const void* global, int bytes, bool valid);
void emulator_commit_copies();
void emulator_wait_copies(int pending);
unsigned emulator_shared_address(const void* pointer);
void emulator_memory_barrier_init(unsigned shared, int arrivals);
void emulator_memory_barrier_arrive(unsigned shared, int expected_bytes);
void emulator_memory_barrier_wait(unsigned shared, unsigned parity);
void emulator_copy_box(unsigned shared, const void* map, unsigned barrier, const int (&at)[5]);
void emulator_reduce_add(float* global, unsigned shared, unsigned bytes);
void emulator_commit_reductions();
void emulator_wait_reductions();
// d: of this thread, n / 2 numbers. a: a descriptor, or four registers where given; b: a descriptor.
void emulator_wgmma(int n, unsigned flags, float* d, const unsigned* a_registers, unsigned long long a, unsigned long long b);
void emulator_wgmma_wait(int pending);
float emulator_half_to_float(unsigned short bits);
unsigned short emulator_float_to_half(float value);
[[noreturn]] void emulator_fail(const char* format, ...);
}

}  // namespace emulator
