// What g++ -fsanitize=thread calls, for engine.cpp: see race_check.h.

#define WATCH(BYTES)                                                                                              \
  void __tsan_read##BYTES(void* at) { emulator::watch(at, BYTES, emulator::Access::READ); }                       \
  void __tsan_write##BYTES(void* at) { emulator::watch(at, BYTES, emulator::Access::WRITE); }                     \
  void __tsan_unaligned_read##BYTES(void* at) { emulator::watch(at, BYTES, emulator::Access::READ); }             \
  void __tsan_unaligned_write##BYTES(void* at) { emulator::watch(at, BYTES, emulator::Access::WRITE); }

extern "C" {
WATCH(1)
WATCH(2)
WATCH(4)
WATCH(8)
WATCH(16)
void __tsan_read_range(void* at, unsigned long bytes) { emulator::watch(at, static_cast<uint32_t>(bytes), emulator::Access::READ); }
void __tsan_write_range(void* at, unsigned long bytes) { emulator::watch(at, static_cast<uint32_t>(bytes), emulator::Access::WRITE); }
void __tsan_volatile_read4(void* at) { emulator::watch(at, 4, emulator::Access::READ); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
