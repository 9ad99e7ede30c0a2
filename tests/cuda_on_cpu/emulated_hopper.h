// The CPU body of fastna/hopper.cuh, which includes it inside its namespace.

inline void barrier_init(MemoryBarrier& barrier, int arrivals) {
  emulator::emulator_memory_barrier_init(shared_address(&barrier), arrivals);
}
inline void barrier_init_done() {}
inline void barrier_expect(MemoryBarrier& barrier, u32 bytes) {
  emulator::emulator_memory_barrier_arrive(shared_address(&barrier), static_cast<int>(bytes));
}
inline void barrier_arrive(MemoryBarrier& barrier) { emulator::emulator_memory_barrier_arrive(shared_address(&barrier), 0); }
inline void barrier_wait(MemoryBarrier& barrier, u32 parity) {
  emulator::emulator_memory_barrier_wait(shared_address(&barrier), parity);
}
inline void barrier_sleep(MemoryBarrier& barrier, u32 parity) { barrier_wait(barrier, parity); }

inline void named_barrier_arrive(int id, int threads) {
  const u32 in[2] = {static_cast<u32>(id), static_cast<u32>(threads)};
  emulator::emulator_collective(emulator::BARRIER_ARRIVE, in, 2, nullptr, 0);
}

inline void copy_box(void* shared, const TensorMap& map, MemoryBarrier& barrier, int channel, int x, int y, int z, int batch) {
  const int at[5] = {channel, x, y, z, batch};
  emulator::emulator_copy_box(shared_address(shared), &map, shared_address(&barrier), at);
}
inline void fence_async_reads() { emulator::emulator_collective(emulator::FENCE_ASYNC, nullptr, 0, nullptr, 0); }
inline void reduce_add(float* global, const float* shared, u32 bytes) { emulator::emulator_reduce_add(global, shared_address(shared), bytes); }
inline void commit_reductions() { emulator::emulator_commit_reductions(); }
inline void wait_reductions_read() { emulator::emulator_wait_reductions(); }
inline void prefetch_map(const TensorMap&) {}

template <int REGISTERS>
inline void emulated_register_count() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
  sync_warp();
}
template <int REGISTERS>
inline void shrink_registers() {
  emulated_register_count<REGISTERS>();
}
template <int REGISTERS>
inline void grow_registers() {
  emulated_register_count<REGISTERS>();
}
