// Warp-level products over tiles in shared memory, in three arithmetics that share one accumulator layout.
//
// A warp owns 16 rows; lane 4 g + q holds rows g and g + 8 of every 8-column tile (see primitives.cuh). Two products are enough for
// attention and its gradients:
//   multiply_transposed:  d[16 x 8 NT] += rows[16 x CHANNELS] * columns[8 NT x CHANNELS]^T      scores, and their gradient
//   multiply:             d[16 x 8 DT] += p[16 x 8 NT]        * columns[8 NT x 8 DT]            with p in accumulator layout
// Tiles lie in shared memory with one token per row of `pitch` elements: an odd number of 16-byte units, so that eight consecutive
// rows start in different banks for ldmatrix and for every plain load below.
#pragma once

#include "fastna/primitives.cuh"

#ifdef FASTNA_EMULATE
#define FASTNA_UNROLL_BY_2
#else
#define FASTNA_UNROLL_BY_2 _Pragma("unroll 2")
#endif

namespace fastna {

// Channels of a tile in shared memory, zeros included, and the distance between its rows.
FASTNA_DEVICE constexpr int padded_channels(int channels) { return round_up(channels, 16); }
template <class T>
FASTNA_DEVICE constexpr int tile_pitch(int channels) {
  return padded_channels(channels) + 16 / static_cast<int>(sizeof(T));
}

// half or bf16 on the tensor cores, accumulated in float.
template <class T>
struct TensorCore16 {
  using Element = T;

  // 16 rows as the left operand, read once into registers (RESIDENT) or from shared memory at every use.
  template <int CHANNELS, bool RESIDENT>
  struct Rows {
    static constexpr int STEPS = padded_channels(CHANNELS) / 16;
    u32 address;
    u32 resident[RESIDENT ? STEPS : 1][4];

    FASTNA_DEVICE void read(const T* rows) {
      const int lane = lane_index();
      address = shared_address(rows + (lane & 15) * tile_pitch<T>(CHANNELS) + (lane >> 4) * 8);
      if constexpr (RESIDENT) {
        FASTNA_UNROLL
        for (int step = 0; step < STEPS; ++step) load_matrix_x4(resident[step], address + step * 32);
      }
    }
  };

  template <int CHANNELS, bool RESIDENT, int NT>
  static FASTNA_DEVICE void multiply_transposed(float (&d)[NT][4], const Rows<CHANNELS, RESIDENT>& rows, const T* columns) {
    static_assert(NT % 2 == 0, "ldmatrix takes two column tiles at a time");
    constexpr int PITCH = tile_pitch<T>(CHANNELS);
    const int lane = lane_index();
    const u32 address = shared_address(columns + ((lane & 7) + (lane >> 4) * 8) * PITCH + ((lane >> 3) & 1) * 8);
    FASTNA_UNROLL
    for (int step = 0; step < padded_channels(CHANNELS) / 16; ++step) {
      u32 a[4];
      if constexpr (RESIDENT) {
        FASTNA_UNROLL
        for (int i = 0; i < 4; ++i) a[i] = rows.resident[step][i];
      } else {
        load_matrix_x4(a, rows.address + step * 32);
      }
      FASTNA_UNROLL
      for (int j = 0; j < NT; j += 2) {
        u32 b[4];
        load_matrix_x4(b, address + j * 8 * PITCH * static_cast<int>(sizeof(T)) + step * 32);
        mma_m16n8k16<T>(d[j], a, b[0], b[1]);
        mma_m16n8k16<T>(d[j + 1], a, b[2], b[3]);
      }
    }
  }

  template <int CHANNELS, int NT, int DT>
  static FASTNA_DEVICE void multiply(float (&d)[DT][4], const float (&p)[NT][4], const T* columns) {
    static_assert(NT % 2 == 0 && DT * 8 == padded_channels(CHANNELS), "whole 16 x 16 blocks");
    constexpr int PITCH = tile_pitch<T>(CHANNELS);
    const int lane = lane_index();
    const u32 address = shared_address(columns + (lane & 15) * PITCH + (lane >> 4) * 8);
    FASTNA_UNROLL
    for (int j = 0; j < NT; j += 2) {
      const u32 a[4] = {pack2<T>(p[j][0], p[j][1]), pack2<T>(p[j][2], p[j][3]), pack2<T>(p[j + 1][0], p[j + 1][1]),
                        pack2<T>(p[j + 1][2], p[j + 1][3])};
      FASTNA_UNROLL
      for (int c = 0; c < DT; c += 2) {
        u32 b[4];
        load_matrix_x4_transposed(b, address + j * 8 * PITCH * static_cast<int>(sizeof(T)) + c * 16);
        mma_m16n8k16<T>(d[c], a, b[0], b[1]);
        mma_m16n8k16<T>(d[c + 1], a, b[2], b[3]);
      }
    }
  }

  // First of the two neighbouring channels that a lane of quad position q holds in tile c of a `multiply` result.
  static FASTNA_DEVICE int channel(int c, int q) { return c * 8 + q * 2; }
};

// float on the tensor cores, operands rounded to TF32.
struct TensorCoreTf32 {
  using Element = float;

  template <int CHANNELS, bool RESIDENT>
  struct Rows {
    const float* row;
    FASTNA_DEVICE void read(const float* rows) {
      const int lane = lane_index();
      row = rows + (lane >> 2) * tile_pitch<float>(CHANNELS) + (lane & 3);
    }
  };

  template <int CHANNELS, bool RESIDENT, int NT>
  static FASTNA_DEVICE void multiply_transposed(float (&d)[NT][4], const Rows<CHANNELS, RESIDENT>& rows, const float* columns) {
    constexpr int PITCH = tile_pitch<float>(CHANNELS);
    const int lane = lane_index();
    const float* column = columns + (lane >> 2) * PITCH + (lane & 3);
    FASTNA_UNROLL_BY_2
    for (int k = 0; k < round_up(CHANNELS, 8); k += 8) {
      const u32 a[4] = {to_tf32(rows.row[k]), to_tf32(rows.row[8 * PITCH + k]), to_tf32(rows.row[k + 4]),
                        to_tf32(rows.row[8 * PITCH + k + 4])};
      FASTNA_UNROLL
      for (int j = 0; j < NT; ++j) {
        mma_m16n8k8_tf32(d[j], a, to_tf32(column[j * 8 * PITCH + k]), to_tf32(column[j * 8 * PITCH + k + 4]));
      }
    }
  }

  // The order of summation is free: with column q of the left operand standing for key 2 q, and q + 4 for key 2 q + 1, an accumulator
  // is a left operand as it is.
  template <int CHANNELS, int NT, int DT>
  static FASTNA_DEVICE void multiply(float (&d)[DT][4], const float (&p)[NT][4], const float* columns) {
    constexpr int PITCH = tile_pitch<float>(CHANNELS);
    const int lane = lane_index();
    const float* column = columns + (lane & 3) * 2 * PITCH + (lane >> 2);
    FASTNA_UNROLL
    for (int j = 0; j < NT; ++j) {
      const u32 a[4] = {to_tf32(p[j][0]), to_tf32(p[j][2]), to_tf32(p[j][1]), to_tf32(p[j][3])};
      FASTNA_UNROLL
      for (int c = 0; c < DT; ++c) {
        mma_m16n8k8_tf32(d[c], a, to_tf32(column[j * 8 * PITCH + c * 8]), to_tf32(column[(j * 8 + 1) * PITCH + c * 8]));
      }
    }
  }

  static FASTNA_DEVICE int channel(int c, int q) { return c * 8 + q * 2; }
};

// float by fused multiply-adds: every lane computes its own accumulator elements, four channels per load.
struct ExactFloat {
  using Element = float;

  template <int CHANNELS, bool RESIDENT>
  struct Rows {
    const float* row;
    FASTNA_DEVICE void read(const float* rows) { row = rows + (lane_index() >> 2) * tile_pitch<float>(CHANNELS); }
  };

  static FASTNA_DEVICE void dot(float& d, const float4& a, const float4& b) {
    d += a.x * b.x;
    d += a.y * b.y;
    d += a.z * b.z;
    d += a.w * b.w;
  }

  template <int CHANNELS, bool RESIDENT, int NT>
  static FASTNA_DEVICE void multiply_transposed(float (&d)[NT][4], const Rows<CHANNELS, RESIDENT>& rows, const float* columns) {
    constexpr int PITCH = tile_pitch<float>(CHANNELS);
    const float* column = columns + (lane_index() & 3) * 2 * PITCH;
    FASTNA_UNROLL_BY_2
    for (int k = 0; k < CHANNELS; k += 4) {
      const float4 a0 = *reinterpret_cast<const float4*>(rows.row + k);
      const float4 a1 = *reinterpret_cast<const float4*>(rows.row + 8 * PITCH + k);
      FASTNA_UNROLL
      for (int j = 0; j < NT; ++j) {
        const float4 b0 = *reinterpret_cast<const float4*>(column + j * 8 * PITCH + k);
        const float4 b1 = *reinterpret_cast<const float4*>(column + (j * 8 + 1) * PITCH + k);
        dot(d[j][0], a0, b0);
        dot(d[j][1], a0, b1);
        dot(d[j][2], a1, b0);
        dot(d[j][3], a1, b1);
      }
    }
  }

  // Result tiles 2 c and 2 c + 1 hold channels 16 c + 4 q to 16 c + 4 q + 3: one 16-byte load feeds both.
  template <int CHANNELS, int NT, int DT>
  static FASTNA_DEVICE void multiply(float (&d)[DT][4], const float (&p)[NT][4], const float* columns) {
    constexpr int PITCH = tile_pitch<float>(CHANNELS);
    const int lane = lane_index();
    constexpr int UNROLLED = DT < 32 ? 2 : 1;
    const float* column = columns + (lane & 3) * 4;
    FASTNA_UNROLL
    for (int j = 0; j < NT; ++j) {
      // The four lanes that hold a row's scores, in turn: all four unrolled take the compiler seconds.
#pragma unroll UNROLLED
      for (int owner = 0; owner < 4; ++owner) {
        FASTNA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int from = (lane & ~3) | owner;
          const float p0 = shuffle(p[j][i], from), p1 = shuffle(p[j][2 + i], from);
          FASTNA_UNROLL
          for (int c = 0; c < DT; c += 2) {
            const float4 b = *reinterpret_cast<const float4*>(column + (j * 8 + owner * 2 + i) * PITCH + c * 8);
            d[c][0] += p0 * b.x;
            d[c][1] += p0 * b.y;
            d[c + 1][0] += p0 * b.z;
            d[c + 1][1] += p0 * b.w;
            d[c][2] += p1 * b.x;
            d[c][3] += p1 * b.y;
            d[c + 1][2] += p1 * b.z;
            d[c + 1][3] += p1 * b.w;
          }
        }
      }
    }
  }

  static FASTNA_DEVICE int channel(int c, int q) { return c / 2 * 16 + q * 4 + c % 2 * 2; }
};

}  // namespace fastna
