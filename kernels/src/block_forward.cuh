// Attention forward over dense dilation groups of at most 64 tokens; see block_layout.cuh. Memory-bound: while a block multiplies one item,
// the copies of the next STAGES - 1 are under way.
#pragma once

#include "fastna/block_layout.cuh"

namespace fastna {

struct BlockForwardArguments {
  TensorArguments query, key, value, output;  // output is contiguous
  float* lse;
  const void* rpb;
  Geometry geometry;
  int items, slices;  // groups x batch; blocks per head
};

template <class T_, class Rpb_, int HEAD_DIM_, int WINDOW0, int WINDOW1, int WINDOW2, int STAGES_, bool HAS_RPB_, bool ALIKE_>
struct BlockForwardConfig {
  using T = T_;
  using Rpb = Rpb_;
  using Shape = BlockShape<WINDOW0, WINDOW1, WINDOW2>;
  static constexpr int HEAD_DIM = HEAD_DIM_, STAGES = STAGES_;
  static constexpr bool HAS_RPB = HAS_RPB_;
  static constexpr bool ALIKE = ALIKE_;  // query, key and value have the same strides
  static constexpr int TILE_BYTES = Shape::PADDED * HEAD_DIM * 2;
  static constexpr int STAGE_BYTES = 3 * TILE_BYTES;  // query, key, value
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
};

template <class Config>
FASTNA_DEVICE void block_forward(const BlockForwardArguments& args) {
  using T = typename Config::T;
  using Shape = typename Config::Shape;
  constexpr int HEAD_DIM = Config::HEAD_DIM, KEY_TILES = Shape::KEY_TILES, TILE_BYTES = Config::TILE_BYTES;
  constexpr int STAGES = Config::STAGES;
  const Geometry& geometry = args.geometry;
  const int head = static_cast<int>(block_index() % geometry.heads);
  const int slice = static_cast<int>(block_index() / geometry.heads);
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, q = lane % 4;
  u8* shared = dynamic_shared<u8>();
  const u32 shared_at = shared_address(shared);

  using Copy = TokenCopy<Shape, HEAD_DIM>;
  const Copy query_copy(args.query, geometry);
  const Copy key_copy = Config::ALIKE ? query_copy : Copy(args.key, geometry);
  const Copy value_copy = Config::ALIKE ? query_copy : Copy(args.value, geometry);
  const TensorArguments* const tensors[4] = {&args.query, &args.key, &args.value, &args.output};
  ItemChunks<4> chunks;
  u32 output_chunk[STAGES];  // of this block's items from the one in work to the one copied last
  const auto load = [&](int n, int stage) {
    const u32 index = slice + static_cast<u32>(n) * args.slices;
    if (n % WARP == 0) chunks.refresh(tensors, geometry, head, index, args.slices);
    const u32 query_chunk = chunks.at(0, n % WARP);
    const u32 key_chunk = Config::ALIKE ? query_chunk : chunks.at(1, n % WARP);
    const u32 value_chunk = Config::ALIKE ? query_chunk : chunks.at(2, n % WARP);
    output_chunk[STAGES - 1] = chunks.at(3, n % WARP);
    if (index < static_cast<u32>(args.items)) {
      const u32 tile = shared_at + stage * Config::STAGE_BYTES;
      query_copy.issue(at_chunk<const T>(args.query, query_chunk), tile);
      key_copy.issue(at_chunk<const T>(args.key, key_chunk), tile + TILE_BYTES);
      value_copy.issue(at_chunk<const T>(args.value, value_chunk), tile + 2 * TILE_BYTES);
    }
    commit_copies();
  };
  const auto advance = [&] {
    FASTNA_UNROLL
    for (int i = 0; i < STAGES - 1; ++i) output_chunk[i] = output_chunk[i + 1];
  };
  FASTNA_UNROLL
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    load(stage, stage);
    advance();
  }

  clear_padding<Shape, HEAD_DIM>(shared, 3 * STAGES);
  float bias[KEY_TILES][4];
  load_block_bias<Shape, Config::HAS_RPB>(bias, static_cast<const typename Config::Rpb*>(args.rpb) + head * Shape::BIAS,
                                          1.0f / geometry.scale);
  const float scale_log2e = geometry.scale * LOG2_E;
  const u32 ones = pack2<T>(1.0f, 1.0f);
  int to[2];
  FASTNA_UNROLL
  for (int k = 0; k < 2; ++k) {
    to[k] = Shape::displacement(args.output, geometry, minimum(warp * 16 + g + 8 * k, Shape::TOKENS - 1)) + q * 8;
  }

  int stage = 0;
  const int count = ceil_div(args.items - slice, args.slices);
  for (int n = 0; n < count; ++n) {
    wait_copies<STAGES - 2>();
    sync_threads();  // this item has come, and the previous one's tiles are no longer read
    load(n + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
    u8* query_tile = shared + stage * Config::STAGE_BYTES;
    const u32 query_at = shared_address(query_tile), key_at = query_at + TILE_BYTES, value_at = key_at + TILE_BYTES;
    stage = stage == STAGES - 1 ? 0 : stage + 1;

    u32 query[HEAD_DIM / 16][4];
    FASTNA_UNROLL
    for (int i = 0; i < HEAD_DIM / 16; ++i) load_matrix_x4(query[i], left_rows<HEAD_DIM>(query_at, warp * 16, 2 * i));
    float scores[KEY_TILES + KEY_TILES % 2][4];
    float maximum[2] = {BLOCK_MASKED, BLOCK_MASKED};
    FASTNA_UNROLL
    for (int t = 0; t < KEY_TILES; ++t) {
      FASTNA_UNROLL
      for (int e = 0; e < 4; ++e) scores[t][e] = bias[t][e];
      multiply_transposed<T, HEAD_DIM>(scores[t], query, key_at, t * 8);
    }
    FASTNA_UNROLL
    for (int t = 0; t < KEY_TILES; ++t) {
      maximum[0] = fmaxf(maximum[0], fmaxf(scores[t][0], scores[t][1]));
      maximum[1] = fmaxf(maximum[1], fmaxf(scores[t][2], scores[t][3]));
    }
    FASTNA_UNROLL
    for (int k = 0; k < 2; ++k) {
      maximum[k] = fmaxf(maximum[k], shuffle_xor(maximum[k], 1));
      maximum[k] = fmaxf(maximum[k], shuffle_xor(maximum[k], 2)) * scale_log2e;
    }

    float output[HEAD_DIM / 8][4] = {};
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // a further column of values, all ones
    FASTNA_UNROLL
    for (int t = 0; t < KEY_TILES; t += 2) {
      u32 weights[4] = {0, 0, 0, 0};
      FASTNA_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (t + k / 2 < KEY_TILES) {
          const float* pair = &scores[t + k / 2][k % 2 * 2];
          weights[k] = pack2<T>(exp2_approx(pair[0] * scale_log2e - maximum[k % 2]), exp2_approx(pair[1] * scale_log2e - maximum[k % 2]));
        }
      }
      multiply<T, HEAD_DIM>(output, weights, value_at, t * 8);
      mma_m16n8k16<T>(sums, weights, ones, ones);
    }

    // Through the rows that this warp alone has read its queries from.
    stage_rows<T, HEAD_DIM>(query_tile, output, reciprocal_approx(sums[0]), reciprocal_approx(sums[2]));
    sync_warp();
    const u64 to_item = static_cast<u64>(output_chunk[0]) * 8;
    advance();
    store_rows<Shape, HEAD_DIM>(static_cast<T*>(args.output.data) + to_item, to, query_tile);
    FASTNA_UNROLL
    for (int k = 0; k < 2; ++k) {
      if (q == k && warp * 16 + g + 8 * k < Shape::TOKENS) {
        args.lse[(to_item + to[k]) / HEAD_DIM] = (maximum[k] + log2_approx(sums[2 * k])) * LN_2;
      }
    }
  }
  wait_copies<0>();
}

}  // namespace fastna
