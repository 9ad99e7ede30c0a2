// Products of the 64 rows of a warpgroup and a box of columns, both in shared memory as tensor copies leave them, slice by slice of channels.
// They are asked for here; wgmma_wait says when they are there.
#pragma once

#include "fastna/hopper_tiles.cuh"
#include "fastna/wgmma.cuh"

namespace fastna {

template <class Tiles>
struct HopperProducts {
  using T = typename Tiles::Element;
  static constexpr int D = Tiles::HEAD_DIM, N = Tiles::COLUMNS, ROW = Tiles::ROW_BYTES, SLICE = Tiles::SLICE;

  // result = rows columns^T; shared addresses.
  static FASTNA_DEVICE void multiply(float (&result)[N / 2], u32 rows, u32 columns) {
    wgmma_fence();
    FASTNA_UNROLL
    for (int k = 0; k < D / 16; ++k) {
      const int slice = k * 16 / SLICE, offset = k * 16 % SLICE * 2;
      Wgmma<N>::template product<T>(result, matrix_descriptor<ROW>(rows + slice * 64 * ROW + offset),
                                    matrix_descriptor<ROW>(columns + slice * N * ROW + offset), k != 0);
    }
    wgmma_commit();
  }

  // sum += factors columns; factors are laid out as an accumulator of `multiply`, packed to pairs.
  static FASTNA_DEVICE void add(float (&sum)[D / 2], const u32 (&factors)[N / 4], u32 columns) {
    wgmma_fence();
    FASTNA_UNROLL
    for (int k = 0; k < N / 16; ++k)
      Wgmma<D>::template product_transposed<T>(sum, factors + 4 * k, matrix_descriptor<ROW>(columns + k * 16 * ROW, N * ROW));
    wgmma_commit();
  }
};

}  // namespace fastna
