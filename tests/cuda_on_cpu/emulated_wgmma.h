// The CPU body of fastna/wgmma.cuh, which includes it inside its namespace.

inline void wgmma_fence() { emulator::emulator_collective(emulator::WGMMA_FENCE, nullptr, 0, nullptr, 0); }
inline void wgmma_commit() { emulator::emulator_collective(emulator::WGMMA_COMMIT, nullptr, 0, nullptr, 0); }
template <int PENDING>
inline void wgmma_wait() {
  emulator::emulator_wgmma_wait(PENDING);
}

template <int N>
struct Wgmma {
  static_assert(N % 16 == 0 && N >= 16 && N <= 256, "N is a multiple of 16 up to 256");

  template <class T>
  static constexpr unsigned type() {
    return is_same<T, half> ? emulator::IS_HALF : 0u;
  }

  template <class T>
  static void product(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
    emulator::emulator_wgmma(N, type<T>() | (accumulate ? emulator::ACCUMULATE : 0u), d, nullptr, a, b);
  }
  template <class T>
  static void product_both_transposed(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
    emulator::emulator_wgmma(N, type<T>() | (accumulate ? emulator::ACCUMULATE : 0u) | emulator::TRANSPOSED | emulator::TRANSPOSED_A, d, nullptr, a, b);
  }
  template <class T>
  static void product_transposed(float (&d)[N / 2], const u32* a, u64 b) {
    emulator::emulator_wgmma(N, type<T>() | emulator::ACCUMULATE | emulator::TRANSPOSED | emulator::FROM_REGISTERS, d, a, 0, b);
  }

  template <class T>
  static void product_of_registers(float (&d)[N / 2], const u32* a, u64 b, bool accumulate) {
    emulator::emulator_wgmma(N, type<T>() | (accumulate ? emulator::ACCUMULATE : 0u) | emulator::FROM_REGISTERS, d, a, 0, b);
  }
};
