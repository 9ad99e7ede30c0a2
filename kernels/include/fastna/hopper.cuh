// Hopper's asynchronous machinery (sm_90a): memory barriers, tensor copies (TMA), register reallocation.
#pragma once

#include "fastna/primitives.cuh"

namespace fastna {

// What cuTensorMapEncodeTiled fills in: a tensor's shape, strides, box and swizzle. Passed by value inside a __grid_constant__ struct.
struct alignas(128) TensorMap {
  u64 opaque[16];
};

// A barrier in shared memory: completes a phase when all its arrivals and all expected bytes have come.
struct MemoryBarrier {
  u64 state;
};

#ifdef FASTNA_EMULATE
#include "emulated_hopper.h"
#else

FASTNA_DEVICE void barrier_init(MemoryBarrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// After barrier_init by one thread, before the block's first use (a sync_threads follows): shows it to the copy engine too.
FASTNA_DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FASTNA_DEVICE void barrier_expect(MemoryBarrier& barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
}
FASTNA_DEVICE void barrier_arrive(MemoryBarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Until the phase of the given parity is complete. A fresh barrier is in phase 0; waiting for parity 1 then returns at once.
FASTNA_DEVICE void barrier_wait(MemoryBarrier& barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra ready;\nbra again;\nready:\n}" ::"r"(
          shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// The same for threads that have nothing else to do for a while: they sleep up to ten milliseconds at a time, and take no issue slots.
FASTNA_DEVICE void barrier_sleep(MemoryBarrier& barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n@done bra ready;\nbra again;\nready:\n}" ::"r"(
          shared_address(&barrier)),
      "r"(parity), "r"(10'000'000)
      : "memory");
}

// Counts the calling threads at barrier `id` without waiting; named_barrier waits for them too.
FASTNA_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Copies the map's box at (channel, x, y, z, batch) to shared memory, zeros where it lies outside the tensor; its bytes arrive at `barrier`.
FASTNA_DEVICE void copy_box(void* shared, const TensorMap& map, MemoryBarrier& barrier, int channel, int x, int y, int z, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(reinterpret_cast<u64>(&map)), "r"(shared_address(&barrier)), "r"(channel), "r"(x), "r"(y), "r"(z), "r"(batch)
      : "memory");
}

// Shows this thread's ordinary stores to shared memory to the copy engine and the matrix units, for what they are asked after a barrier.
FASTNA_DEVICE void fence_async_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Adds `bytes` (a multiple of 16) of floats in shared memory to as many in global memory, each addition whole, in no order.
FASTNA_DEVICE void reduce_add(float* global, const float* shared, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(global)),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
FASTNA_DEVICE void commit_reductions() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all that this thread has committed was read from shared memory.
FASTNA_DEVICE void wait_reductions_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

FASTNA_DEVICE void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(&map)) : "memory");
}

// Registers per thread of the calling warpgroup; all its warps must call it, in a kernel with a launch bound of one block.
template <int REGISTERS>
FASTNA_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
FASTNA_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif

}  // namespace fastna
