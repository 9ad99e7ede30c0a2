// Warpgroup matrix products of Hopper (sm_90a): wgmma.mma_async m64nNk16, N a multiple of 16 up to 256.
//
// A warpgroup is four warps whose first has an index divisible by four. Accumulators lie as those of mma.m16n8, 16 rows per warp:
// lane 4 g + q of warp w holds d[4 n + 0, 1] = row 16 w + g, columns 8 n + 2 q, + 1, and d[4 n + 2, 3] = the same of row + 8.
//
// The PTX instruction names every accumulator register, so each N needs its own text; the macros below spell it.
#pragma once

#include "fastna/primitives.cuh"

namespace fastna {

// Descriptor of an operand in shared memory, rows of `SWIZZLE` bytes (128, 64 or 32) with that swizzle, start aligned to 8 rows.
//   K-major (rows are the M or N index, 16-byte chunks run along K): 8 rows to the next group of rows.
//   Transposed (rows are the K index): `leading` bytes from one slice of SWIZZLE bytes of columns to the next.
template <int SWIZZLE>
FASTNA_DEVICE u64 matrix_descriptor(u32 address, u32 leading = 16) {
  static_assert(SWIZZLE == 128 || SWIZZLE == 64 || SWIZZLE == 32, "rows of wgmma operands have 128, 64 or 32 bytes here");
  constexpr u64 mode = SWIZZLE == 128 ? 1 : SWIZZLE == 64 ? 2 : 3;
  return (mode << 62) | (static_cast<u64>(8 * SWIZZLE >> 4) << 32) | (static_cast<u64>(leading >> 4) << 16) |
         ((address & 0x3ffffu) >> 4);
}

#ifdef FASTNA_EMULATE
#include "emulated_wgmma.h"
#else

// Before the first wgmma of a sequence: orders the registers' earlier writes.
FASTNA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTNA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most PENDING committed groups are under way.
template <int PENDING>
FASTNA_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

template <int N>
struct Wgmma;

#define FASTNA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTNA_NAMES_32 FASTNA_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTNA_NAMES_48 FASTNA_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FASTNA_NAMES_64 FASTNA_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTNA_NAMES_80 FASTNA_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FASTNA_NAMES_96 FASTNA_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTNA_NAMES_112 FASTNA_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FASTNA_NAMES_128 FASTNA_NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTNA_NAMES_144 FASTNA_NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FASTNA_NAMES_160 FASTNA_NAMES_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FASTNA_NAMES_176 FASTNA_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FASTNA_NAMES_192 FASTNA_NAMES_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTNA_NAMES_208 FASTNA_NAMES_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define FASTNA_NAMES_224 FASTNA_NAMES_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define FASTNA_NAMES_240 FASTNA_NAMES_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define FASTNA_NAMES_256 FASTNA_NAMES_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTNA_OUTPUTS_16 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FASTNA_OUTPUTS_32 FASTNA_OUTPUTS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FASTNA_OUTPUTS_48 FASTNA_OUTPUTS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FASTNA_OUTPUTS_64 FASTNA_OUTPUTS_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FASTNA_OUTPUTS_80 FASTNA_OUTPUTS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FASTNA_OUTPUTS_96 FASTNA_OUTPUTS_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FASTNA_OUTPUTS_112 FASTNA_OUTPUTS_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FASTNA_OUTPUTS_128 FASTNA_OUTPUTS_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FASTNA_OUTPUTS_144 FASTNA_OUTPUTS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FASTNA_OUTPUTS_160 FASTNA_OUTPUTS_144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FASTNA_OUTPUTS_176 FASTNA_OUTPUTS_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FASTNA_OUTPUTS_192 FASTNA_OUTPUTS_176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FASTNA_OUTPUTS_208 FASTNA_OUTPUTS_192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define FASTNA_OUTPUTS_224 FASTNA_OUTPUTS_208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define FASTNA_OUTPUTS_240 FASTNA_OUTPUTS_224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define FASTNA_OUTPUTS_256 FASTNA_OUTPUTS_240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// product: d = (accumulate ? d : 0) + a b with both operands K-major in shared memory.
// product_both_transposed: the same with both stored with K along their rows.
// product_transposed: d += a b with a in registers (as mma.m16n8k16 takes it) and b stored with K along its rows.
// product_of_registers: as product, but with a in registers; `accumulate` is known when the kernel is compiled.
#define FASTNA_WGMMA_TYPE(N, TYPE, NAME, A, B, P, B_OF_REGISTERS, SHARED_OPERANDS)                                              \
  template <>                                                                                                                  \
  FASTNA_DEVICE void Wgmma<N>::product<NAME>(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {                               \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE       \
                 " {" FASTNA_NAMES_##N "}, %" #A ", %" #B ", p, 1, 1, 0, 0;}"                                                   \
                 : FASTNA_OUTPUTS_##N                                                                                          \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                         \
  }                                                                                                                            \
  template <>                                                                                                                  \
  FASTNA_DEVICE void Wgmma<N>::product_both_transposed<NAME>(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {               \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE       \
                 " {" FASTNA_NAMES_##N "}, %" #A ", %" #B ", p, 1, 1, 1, 1;}"                                                   \
                 : FASTNA_OUTPUTS_##N                                                                                          \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                         \
  }                                                                                                                            \
  template <>                                                                                                                  \
  FASTNA_DEVICE void Wgmma<N>::product_transposed<NAME>(float (&d)[N / 2], const u32* a, u64 b) {                              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FASTNA_NAMES_##N "}, {" SHARED_OPERANDS    \
                 "}, %" #B_OF_REGISTERS ", 1, 1, 1, 1;"                                                                         \
                 : FASTNA_OUTPUTS_##N                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                        \
  }                                                                                                                            \
  template <>                                                                                                                  \
  FASTNA_DEVICE void Wgmma<N>::product_of_registers<NAME>(float (&d)[N / 2], const u32* a, u64 b, bool accumulate) {           \
    if (accumulate)                                                                                                            \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FASTNA_NAMES_##N "}, {" SHARED_OPERANDS  \
                   "}, %" #B_OF_REGISTERS ", 1, 1, 1, 0;"                                                                       \
                   : FASTNA_OUTPUTS_##N                                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                      \
    else                                                                                                                       \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FASTNA_NAMES_##N "}, {" SHARED_OPERANDS  \
                   "}, %" #B_OF_REGISTERS ", 0, 1, 1, 0;"                                                                       \
                   : FASTNA_OUTPUTS_##N                                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                      \
  }
#define FASTNA_WGMMA(N, R0, R1, R2, R3, R4)                                                              \
  template <>                                                                                            \
  struct Wgmma<N> {                                                                                      \
    template <class T>                                                                                   \
    static FASTNA_DEVICE void product(float (&d)[N / 2], u64 a, u64 b, bool accumulate);                 \
    template <class T>                                                                                   \
    static FASTNA_DEVICE void product_both_transposed(float (&d)[N / 2], u64 a, u64 b, bool accumulate); \
    template <class T>                                                                                   \
    static FASTNA_DEVICE void product_transposed(float (&d)[N / 2], const u32* a, u64 b);                \
    template <class T>                                                                                   \
    static FASTNA_DEVICE void product_of_registers(float (&d)[N / 2], const u32* a, u64 b, bool accumulate); \
  };                                                                                                     \
  FASTNA_WGMMA_TYPE(N, "bf16", bf16, R0, R1, R2, R4, "%" #R0 ", %" #R1 ", %" #R2 ", %" #R3)              \
  FASTNA_WGMMA_TYPE(N, "f16", half, R0, R1, R2, R4, "%" #R0 ", %" #R1 ", %" #R2 ", %" #R3)

FASTNA_WGMMA(16, 8, 9, 10, 11, 12)
FASTNA_WGMMA(32, 16, 17, 18, 19, 20)
FASTNA_WGMMA(48, 24, 25, 26, 27, 28)
FASTNA_WGMMA(64, 32, 33, 34, 35, 36)
FASTNA_WGMMA(80, 40, 41, 42, 43, 44)
FASTNA_WGMMA(96, 48, 49, 50, 51, 52)
FASTNA_WGMMA(112, 56, 57, 58, 59, 60)
FASTNA_WGMMA(128, 64, 65, 66, 67, 68)
FASTNA_WGMMA(144, 72, 73, 74, 75, 76)
FASTNA_WGMMA(160, 80, 81, 82, 83, 84)
FASTNA_WGMMA(176, 88, 89, 90, 91, 92)
FASTNA_WGMMA(192, 96, 97, 98, 99, 100)
FASTNA_WGMMA(208, 104, 105, 106, 107, 108)
FASTNA_WGMMA(224, 112, 113, 114, 115, 116)
FASTNA_WGMMA(240, 120, 121, 122, 123, 124)
FASTNA_WGMMA(256, 128, 129, 130, 131, 132)

#endif

}  // namespace fastna
