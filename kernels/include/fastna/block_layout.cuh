// What the forward and the backward kernel of dense dilation groups share.
//
// Where window x dilation = length on every axis, each dilation group is dense attention over window-many tokens with one bias per head and
// no mask. An item is one group of one head; up to 64 tokens, 16 per warp. A block stays with one head, whose bias it keeps in registers,
// and works through items `slices` apart, so that the blocks running at one time read neighbouring tokens and heads.
#pragma once

#include "fastna/strip_layout.cuh"

namespace fastna {

template <int WINDOW0, int WINDOW1, int WINDOW2>
struct BlockShape {
  static constexpr int TOKENS = WINDOW0 * WINDOW1 * WINDOW2;
  static constexpr int WARPS = (TOKENS + 15) / 16, THREADS = WARPS * WARP;
  static constexpr int PADDED = WARPS * 16;           // rows in shared memory; those behind TOKENS are zero
  static constexpr int KEY_TILES = (TOKENS + 7) / 8;  // of 8 keys, in a product
  static constexpr int BIAS1 = 2 * WINDOW1 - 1, BIAS2 = 2 * WINDOW2 - 1, BIAS = (2 * WINDOW0 - 1) * BIAS1 * BIAS2;
  static_assert(TOKENS <= 64, "a group has at most 64 tokens");

  // Elements from a group's first token to this one.
  FASTNA_DEVICE static int displacement(const TensorArguments& tensor, const Geometry& geometry, int token) {
    const int at[3] = {token / (WINDOW1 * WINDOW2), token / WINDOW2 % WINDOW1, token % WINDOW2};
    i64 sum = 0;
    FASTNA_UNROLL
    for (int a = 0; a < 3; ++a) sum += static_cast<i64>(at[a] * geometry.axis[a].dilation) * tensor.axis[a];
    return static_cast<int>(sum);
  }

  // Entry of one head's bias for a query and a key; linear in both.
  FASTNA_DEVICE static int ravel(int token) {
    return (token / (WINDOW1 * WINDOW2) * BIAS1 + token / WINDOW2 % WINDOW1) * BIAS2 + token % WINDOW2;
  }
  FASTNA_DEVICE static int bias_entry(int query, int key) {
    return ravel(key) - ravel(query) + ((WINDOW0 - 1) * BIAS1 + WINDOW1 - 1) * BIAS2 + WINDOW2 - 1;
  }
};

// Where the items of a block begin in COUNT tensors, in chunks of 8 elements: the divisions are done once per 32 items, lane l for the
// l-th of them, instead of by every thread for every item. A chunk number holds 2^35 elements.
template <int COUNT>
struct ItemChunks {
  u32 of_lane[COUNT];

  // Lane l takes item `first` + l * `step`.
  FASTNA_DEVICE void refresh(const TensorArguments* const (&tensors)[COUNT], const Geometry& geometry, int head, u32 first, u32 step) {
    u32 index = first + lane_index() * step;  // past the last item where it will not be asked for
    int group[3];
    FASTNA_UNROLL
    for (int a = 2; a >= 0; --a) {
      const u32 dilation = static_cast<u32>(geometry.axis[a].dilation);
      group[a] = static_cast<int>(index % dilation);
      index /= dilation;
    }
    FASTNA_UNROLL
    for (int k = 0; k < COUNT; ++k) {
      const TensorArguments& tensor = *tensors[k];
      i64 at = index * tensor.batch + head * tensor.head;
      FASTNA_UNROLL
      for (int a = 0; a < 3; ++a) at += group[a] * tensor.axis[a];
      of_lane[k] = static_cast<u32>(at / 8);
    }
  }
  // Of the n-th item since the last refresh.
  FASTNA_DEVICE u32 at(int tensor, int n) const { return shuffle(of_lane[tensor], n); }
};

template <class T>
FASTNA_DEVICE T* at_chunk(const TensorArguments& tensor, u32 chunk) {
  return static_cast<T*>(tensor.data) + static_cast<u64>(chunk) * 8;
}

// Finite, so that MASKED * scale is never NaN; exp2 of it is 0.
constexpr float BLOCK_MASKED = -1e30f;

// Initial values of the warp's score accumulators: bias / scale, and BLOCK_MASKED behind the last key.
template <class Shape, bool HAS_RPB, class Rpb>
FASTNA_DEVICE void load_block_bias(float (&bias)[Shape::KEY_TILES][4], const Rpb* rpb, float inverse_scale) {
  const int lane = lane_index(), g = lane / 4, q = lane % 4;
  FASTNA_UNROLL
  for (int n = 0; n < Shape::KEY_TILES; ++n) {
    FASTNA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int query = minimum(warp_index() * 16 + g + e / 2 * 8, Shape::TOKENS - 1), key = n * 8 + 2 * q + e % 2;
      float value = 0.0f;
      if constexpr (HAS_RPB) {
        value = to_float(load_readonly(rpb + Shape::bias_entry(query, minimum(key, Shape::TOKENS - 1)))) * inverse_scale;
      }
      bias[n][e] = key < Shape::TOKENS ? value : BLOCK_MASKED;
    }
  }
}

// A thread's share of copying one tensor's tokens of an item to shared memory: 16-byte chunks at the same places for every item.
template <class Shape, int HEAD_DIM>
struct TokenCopy {
  using Layout = TokenLayout<HEAD_DIM>;
  static constexpr int STEP = Shape::THREADS / Layout::CHUNKS;
  static constexpr int PASSES = (Shape::TOKENS + STEP - 1) / STEP;
  int from[PASSES];

  FASTNA_DEVICE TokenCopy(const TensorArguments& tensor, const Geometry& geometry) {
    FASTNA_UNROLL
    for (int pass = 0; pass < PASSES; ++pass) {
      const int token = minimum(first_token() + pass * STEP, Shape::TOKENS - 1);
      from[pass] = Shape::displacement(tensor, geometry, token) + chunk() * 8;
    }
  }

  template <class T>
  FASTNA_DEVICE void issue(const T* origin, u32 shared) const {
    FASTNA_UNROLL
    for (int pass = 0; pass < PASSES; ++pass) {
      const int token = first_token() + pass * STEP;
      if (token < Shape::TOKENS) copy_async<16>(shared + Layout::offset(token, chunk()), origin + from[pass], true);
    }
  }

 private:
  FASTNA_DEVICE static int chunk() { return thread_index() % Layout::CHUNKS; }
  FASTNA_DEVICE static int first_token() { return thread_index() / Layout::CHUNKS; }
};

// Zeros in the rows behind TOKENS of COUNT consecutive tiles of PADDED rows: products read them, copies never write them.
template <class Shape, int HEAD_DIM>
FASTNA_DEVICE void clear_padding(u8* tiles, int count) {
  constexpr int ROWS = Shape::PADDED - Shape::TOKENS, CHUNKS = HEAD_DIM / 8;
  if constexpr (ROWS > 0) {
    for (int i = thread_index(); i < count * ROWS * CHUNKS; i += Shape::THREADS) {
      const int tile = i / (ROWS * CHUNKS), at = i % (ROWS * CHUNKS);
      *reinterpret_cast<uint4*>(tiles + (tile * Shape::PADDED + Shape::TOKENS) * HEAD_DIM * 2 + at * 16) = {0, 0, 0, 0};
    }
  }
}

// The warp's 16 rows of a product, times factor[0] (rows g) and factor[1] (rows g + 8), to its rows of a tile, which it alone has read.
template <class T, int HEAD_DIM>
FASTNA_DEVICE void stage_rows(u8* tile, const float (&rows)[HEAD_DIM / 8][4], float factor0, float factor1) {
  using Layout = TokenLayout<HEAD_DIM>;
  const int lane = lane_index(), g = lane / 4, q = lane % 4;
  sync_warp();  // every lane has read
  FASTNA_UNROLL
  for (int c = 0; c < HEAD_DIM / 8; ++c) {
    u8* at = tile + warp_index() * 16 * Layout::BYTES + Layout::offset(g, c) + q * 4;
    *reinterpret_cast<u32*>(at) = pack2<T>(rows[c][0] * factor0, rows[c][1] * factor0);
    *reinterpret_cast<u32*>(at + 8 * Layout::BYTES) = pack2<T>(rows[c][2] * factor1, rows[c][3] * factor1);
  }
}

// The warp's 16 rows of a tile to global memory; `to` are the displacements of the lane's tokens g and g + 8, at chunk q.
template <class Shape, int HEAD_DIM, class T>
FASTNA_DEVICE void store_rows(T* origin, const int (&to)[2], const u8* tile) {
  using Layout = TokenLayout<HEAD_DIM>;
  const int lane = lane_index(), g = lane / 4, q = lane % 4, first_row = warp_index() * 16;
  FASTNA_UNROLL
  for (int k = 0; k < 2; ++k) {
    if (first_row + g + 8 * k < Shape::TOKENS) {
      FASTNA_UNROLL
      for (int i = 0; i < HEAD_DIM / 32; ++i) {
        const u8* from = tile + (first_row + 8 * k) * Layout::BYTES + Layout::offset(g, q + 4 * i);
        store_global_16(origin + to[k] + 32 * i, *reinterpret_cast<const uint4*>(from));
      }
    }
  }
}

// Addresses for ldmatrix.x4 in a tile of TokenLayout: row0, the first of 16 tokens (or of 8), and chunk, the first of two (or of four).
//   left operand, 16 tokens x 2 chunks; right operand contracted over channels, 8 tokens x 4 chunks;
//   right operand contracted over tokens (transposed), 16 tokens x 2 chunks
// row0 is a multiple of 8, which the swizzle does not see.
template <int HEAD_DIM>
FASTNA_DEVICE u32 left_rows(u32 tile, int row0, int chunk) {
  return tile + row0 * TokenLayout<HEAD_DIM>::BYTES + TokenLayout<HEAD_DIM>::offset(lane_index() % 16, chunk + lane_index() / 16);
}
template <int HEAD_DIM>
FASTNA_DEVICE u32 right_rows(u32 tile, int row0, int chunk) {
  return tile + row0 * TokenLayout<HEAD_DIM>::BYTES + TokenLayout<HEAD_DIM>::offset(lane_index() % 8, chunk + lane_index() / 8);
}

// product (16 x 8) += left (16 x HEAD_DIM) right^T (8 tokens from row0 of a tile).
template <class T, int HEAD_DIM>
FASTNA_DEVICE void multiply_transposed(float (&product)[4], const u32 (&left)[HEAD_DIM / 16][4], u32 tile, int row0) {
  FASTNA_UNROLL
  for (int i = 0; i < HEAD_DIM / 32; ++i) {
    u32 right[4];
    load_matrix_x4(right, right_rows<HEAD_DIM>(tile, row0, 4 * i));
    mma_m16n8k16<T>(product, left[2 * i], right[0], right[1]);
    mma_m16n8k16<T>(product, left[2 * i + 1], right[2], right[3]);
  }
}

// product (16 x HEAD_DIM) += left (16 x 16) right (16 tokens from row0 of a tile).
template <class T, int HEAD_DIM>
FASTNA_DEVICE void multiply(float (&product)[HEAD_DIM / 8][4], const u32 (&left)[4], u32 tile, int row0) {
  FASTNA_UNROLL
  for (int i = 0; i < HEAD_DIM / 16; ++i) {
    u32 right[4];
    load_matrix_x4_transposed(right, left_rows<HEAD_DIM>(tile, row0, 2 * i));
    mma_m16n8k16<T>(product[2 * i], left, right[0], right[1]);
    mma_m16n8k16<T>(product[2 * i + 1], left, right[2], right[3]);
  }
}

}  // namespace fastna
