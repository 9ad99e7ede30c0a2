// A matrix product of half the depth of mma_m16n8k16.
#pragma once

#include "fastna/primitives.cuh"

namespace fastna {

// d (16 x 8, float) += a (16 x 8) b (8 x 8), bf16. Lane 4 g + q holds d as of mma_m16n8k16, of a columns 2 q and 2 q + 1 of rows g (a0) and
// g + 8 (a1), of b rows 2 q and 2 q + 1 of column g.
FASTNA_DEVICE void mma_m16n8k8_bf16(float (&d)[4], u32 a0, u32 a1, u32 b) {
#ifdef FASTNA_EMULATE
  const u32 a[4] = {a0, a1, 0, 0};
  mma_m16n8k16<bf16>(d, a, b, 0);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b));
#endif
}

}  // namespace fastna
