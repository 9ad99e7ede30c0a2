// Attention backward over dense dilation groups of at most 64 tokens, everything in one pass over an item; see block_layout.cuh.
//
// Each warp first takes 16 queries: p = exp(s - lse), ds = p (dp - delta), dq = scale ds k, with p and ds left in shared memory; then,
// after a barrier, 16 keys: dv = p^T do, dk = scale ds^T q. The gradient of the bias is the sum of ds over items, accumulated in
// registers where each lane meets the same (query, key) pairs in every item; blocks write partial sums, the host adds them in order.
#pragma once

#include "fastna/block_layout.cuh"

namespace fastna {

struct BlockBackwardArguments {
  TensorArguments query, key, value, output, grad_output;
  // Strided as output, which is contiguous, but their tokens `spread` times as far apart. lse and grad_lse are contiguous.
  void *grad_query, *grad_key, *grad_value;
  const float *lse, *grad_lse;
  const void* rpb;
  float* grad_rpb;  // partial sums [slices, heads, BIAS]
  Geometry geometry;
  int items, slices;  // groups x batch; blocks per head
  int spread;         // 1; 3 where the gradients are slices of one tensor
};

template <class T_, class Rpb_, int HEAD_DIM_, int WINDOW0_, int WINDOW1_, int WINDOW2_, int STAGES_, bool HAS_RPB_, bool HAS_GRAD_LSE_,
          bool NEEDS_RPB_GRAD_, bool ALIKE_, bool GRAD_CONTIGUOUS_>
struct BlockBackwardConfig {
  using T = T_;
  using Rpb = Rpb_;
  static constexpr int WINDOW0 = WINDOW0_, WINDOW1 = WINDOW1_, WINDOW2 = WINDOW2_;
  using Shape = BlockShape<WINDOW0, WINDOW1, WINDOW2>;
  static constexpr int HEAD_DIM = HEAD_DIM_, STAGES = STAGES_;
  static constexpr bool HAS_RPB = HAS_RPB_, HAS_GRAD_LSE = HAS_GRAD_LSE_, NEEDS_RPB_GRAD = NEEDS_RPB_GRAD_;
  static constexpr bool ALIKE = ALIKE_;  // query, key and value have the same strides
  static constexpr bool GRAD_CONTIGUOUS = GRAD_CONTIGUOUS_;  // grad_output is strided as output
  static constexpr int TILE_BYTES = Shape::PADDED * HEAD_DIM * 2;
  // query, key, value, grad_output, output; then lse and grad_lse
  static constexpr int LSE_AT = 5 * TILE_BYTES, STAGE_BYTES = LSE_AT + 2 * Shape::PADDED * 4;
  static constexpr int WEIGHTS_BYTES = Shape::PADDED * TokenLayout<64>::BYTES;  // [query][key] in T
  static constexpr int WEIGHTS_AT = 0, SCORES_AT = WEIGHTS_BYTES, STAGES_AT = 2 * WEIGHTS_BYTES;
  static constexpr int BIAS_AT = STAGES_AT + STAGES * STAGE_BYTES;  // [KEY_TILES][thread] float4: registers are short here
  static constexpr int SHARED_BYTES = BIAS_AT + Shape::KEY_TILES * Shape::THREADS * 16;
  static_assert(Shape::TOKENS * Shape::TOKENS * 4 <= SHARED_BYTES, "the bias gradient passes through shared memory");
};

// Sums the blocks' ds, `sums` as the warps hold them, over the pairs of each bias entry.
template <class Config>
FASTNA_DEVICE void reduce_bias_gradient(float* table, const float (&sums)[Config::Shape::KEY_TILES][4], float* grad_rpb) {
  using Shape = typename Config::Shape;
  constexpr int TOKENS = Shape::TOKENS;
  const int lane = lane_index(), g = lane / 4, q = lane % 4;
  sync_threads();
  FASTNA_UNROLL
  for (int n = 0; n < Shape::KEY_TILES; ++n) {
    FASTNA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int query = warp_index() * 16 + g + e / 2 * 8, key = n * 8 + 2 * q + e % 2;
      if (query < TOKENS && key < TOKENS) table[query * TOKENS + key] = sums[n][e];
    }
  }
  sync_threads();
  for (int entry = thread_index(); entry < Shape::BIAS; entry += Shape::THREADS) {
    const int windows[3] = {Config::WINDOW0, Config::WINDOW1, Config::WINDOW2};
    const int offset[3] = {entry / (Shape::BIAS1 * Shape::BIAS2) - windows[0] + 1, entry / Shape::BIAS2 % Shape::BIAS1 - windows[1] + 1,
                           entry % Shape::BIAS2 - windows[2] + 1};
    const int key_ahead = (offset[0] * windows[1] + offset[1]) * windows[2] + offset[2];
    float sum = 0.0f;
    for (int i = maximum(-offset[0], 0); i < minimum(windows[0], windows[0] - offset[0]); ++i) {
      for (int j = maximum(-offset[1], 0); j < minimum(windows[1], windows[1] - offset[1]); ++j) {
        for (int k = maximum(-offset[2], 0); k < minimum(windows[2], windows[2] - offset[2]); ++k) {
          const int query = (i * windows[1] + j) * windows[2] + k;
          sum += table[query * TOKENS + query + key_ahead];
        }
      }
    }
    grad_rpb[entry] = sum;
  }
}

template <class Config>
FASTNA_DEVICE void block_backward(const BlockBackwardArguments& args) {
  using T = typename Config::T;
  using Shape = typename Config::Shape;
  using Weights = TokenLayout<64>;
  constexpr int HEAD_DIM = Config::HEAD_DIM, KEY_TILES = Shape::KEY_TILES, TILE_BYTES = Config::TILE_BYTES;
  constexpr int STAGES = Config::STAGES;
  const Geometry& geometry = args.geometry;
  const int head = static_cast<int>(block_index() % geometry.heads);
  const int slice = static_cast<int>(block_index() / geometry.heads);
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, q = lane % 4, first_row = warp * 16;
  u8* shared = dynamic_shared<u8>();
  const u32 weights_at = shared_address(shared + Config::WEIGHTS_AT), scores_at = shared_address(shared + Config::SCORES_AT);

  using Copy = TokenCopy<Shape, HEAD_DIM>;
  const Copy query_copy(args.query, geometry), output_copy(args.output, geometry);
  const Copy key_copy = Config::ALIKE ? query_copy : Copy(args.key, geometry);
  const Copy value_copy = Config::ALIKE ? query_copy : Copy(args.value, geometry);
  const Copy grad_copy = Config::GRAD_CONTIGUOUS ? output_copy : Copy(args.grad_output, geometry);
  const int copied_token = thread_index() % Shape::PADDED;  // THREADS is twice PADDED: one half copies lse, the other its gradient
  const float* lse = thread_index() < Shape::PADDED ? args.lse : args.grad_lse;
  const bool copies_lse = copied_token < Shape::TOKENS && (Config::HAS_GRAD_LSE || thread_index() < Shape::PADDED);
  const int lse_from = Shape::displacement(args.output, geometry, minimum(copied_token, Shape::TOKENS - 1)) / HEAD_DIM;

  const TensorArguments* const tensors[5] = {&args.query, &args.key, &args.value, &args.grad_output, &args.output};
  ItemChunks<5> chunks;
  u32 output_chunk[STAGES];  // of this block's items from the one in work to the one copied last
  const auto load = [&](int n, int stage) {
    const u32 index = slice + static_cast<u32>(n) * args.slices;
    if (n % WARP == 0) chunks.refresh(tensors, geometry, head, index, args.slices);
    u32 chunk[5];
    chunk[0] = chunks.at(0, n % WARP);
    chunk[1] = Config::ALIKE ? chunk[0] : chunks.at(1, n % WARP);
    chunk[2] = Config::ALIKE ? chunk[0] : chunks.at(2, n % WARP);
    chunk[4] = chunks.at(4, n % WARP);
    chunk[3] = Config::GRAD_CONTIGUOUS ? chunk[4] : chunks.at(3, n % WARP);
    output_chunk[STAGES - 1] = chunk[4];
    if (index < static_cast<u32>(args.items)) {
      const u32 tile = shared_address(shared + Config::STAGES_AT + stage * Config::STAGE_BYTES);
      query_copy.issue(at_chunk<const T>(args.query, chunk[0]), tile);
      key_copy.issue(at_chunk<const T>(args.key, chunk[1]), tile + TILE_BYTES);
      value_copy.issue(at_chunk<const T>(args.value, chunk[2]), tile + 2 * TILE_BYTES);
      grad_copy.issue(at_chunk<const T>(args.grad_output, chunk[3]), tile + 3 * TILE_BYTES);
      output_copy.issue(at_chunk<const T>(args.output, chunk[4]), tile + 4 * TILE_BYTES);
      if (copies_lse) copy_async<4>(tile + Config::LSE_AT + thread_index() * 4, lse + chunk[4] / (HEAD_DIM / 8) + lse_from, true);
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

  for (int stage = 0; stage < STAGES; ++stage) {
    clear_padding<Shape, HEAD_DIM>(shared + Config::STAGES_AT + stage * Config::STAGE_BYTES, 5);
  }
  if constexpr (KEY_TILES % 2 != 0) {  // columns that no product writes, read as keys of the second half
    for (int i = thread_index(); i < 2 * Shape::PADDED; i += Shape::THREADS) {
      u8* weights = shared + (i < Shape::PADDED ? Config::WEIGHTS_AT : Config::SCORES_AT);
      *reinterpret_cast<uint4*>(weights + Weights::offset(i % Shape::PADDED, KEY_TILES)) = {0, 0, 0, 0};
    }
  }
  float4* bias = reinterpret_cast<float4*>(shared + Config::BIAS_AT) + thread_index();
  {
    float values[KEY_TILES][4];
    load_block_bias<Shape, Config::HAS_RPB>(values, static_cast<const typename Config::Rpb*>(args.rpb) + head * Shape::BIAS,
                                            1.0f / geometry.scale);
    FASTNA_UNROLL
    for (int t = 0; t < KEY_TILES; ++t) bias[t * Shape::THREADS] = {values[t][0], values[t][1], values[t][2], values[t][3]};
  }
  float bias_gradient[KEY_TILES][4] = {};
  const float scale_log2e = geometry.scale * LOG2_E;
  int to[2];
  FASTNA_UNROLL
  for (int k = 0; k < 2; ++k) {
    to[k] = Shape::displacement(args.output, geometry, minimum(first_row + g + 8 * k, Shape::TOKENS - 1)) * args.spread + q * 8;
  }

  int stage = 0;
  const int count = ceil_div(args.items - slice, args.slices);
  for (int n = 0; n < count; ++n) {
    if constexpr (STAGES == 1) {
      sync_threads();  // the previous item's tiles are no longer read
      load(n, 0);
      wait_copies<0>();
      sync_threads();
    } else {
      wait_copies<STAGES - 2>();
      sync_threads();  // this item has come, and the previous one's tiles are no longer read
      load(n + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
    }
    u8* tiles = shared + Config::STAGES_AT + stage * Config::STAGE_BYTES;
    u8* key_tile = tiles + TILE_BYTES;
    u8* value_tile = tiles + 2 * TILE_BYTES;
    u8* output_tile = tiles + 4 * TILE_BYTES;
    const u32 query_at = shared_address(tiles), key_at = query_at + TILE_BYTES, value_at = query_at + 2 * TILE_BYTES;
    const u32 grad_at = query_at + 3 * TILE_BYTES, output_at = query_at + 4 * TILE_BYTES;
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    const u64 to_item = (static_cast<u64>(output_chunk[0]) * 8 - head * HEAD_DIM) * args.spread + head * HEAD_DIM;
    advance();

    {  // 16 queries
      u32 query[HEAD_DIM / 16][4], grad[HEAD_DIM / 16][4];
      float delta[2] = {0.0f, 0.0f}, lse[2];
      FASTNA_UNROLL
      for (int i = 0; i < HEAD_DIM / 16; ++i) {
        u32 output[4];
        load_matrix_x4(query[i], left_rows<HEAD_DIM>(query_at, first_row, 2 * i));
        load_matrix_x4(grad[i], left_rows<HEAD_DIM>(grad_at, first_row, 2 * i));
        load_matrix_x4(output, left_rows<HEAD_DIM>(output_at, first_row, 2 * i));
        FASTNA_UNROLL
        for (int k = 0; k < 4; ++k) {
          const float2 a = unpack2<T>(grad[i][k]), b = unpack2<T>(output[k]);
          delta[k % 2] += a.x * b.x + a.y * b.y;
        }
      }
      FASTNA_UNROLL
      for (int k = 0; k < 2; ++k) {
        const int row = first_row + g + 8 * k;
        const float* lse_of_item = reinterpret_cast<const float*>(tiles + Config::LSE_AT);
        delta[k] += shuffle_xor(delta[k], 1);
        delta[k] += shuffle_xor(delta[k], 2);
        lse[k] = infinity();  // no weights in a row that is no query
        if (row < Shape::TOKENS) {
          lse[k] = lse_of_item[row] * LOG2_E;
          if constexpr (Config::HAS_GRAD_LSE) delta[k] -= lse_of_item[Shape::PADDED + row];
        }
      }
      float grad_query[HEAD_DIM / 8][4] = {};
      FASTNA_UNROLL
      for (int t = 0; t < KEY_TILES; t += 2) {
        u32 scores[4] = {0, 0, 0, 0};
        FASTNA_UNROLL
        for (int h = 0; h < 2; ++h) {
          if (t + h >= KEY_TILES) continue;
          const float4 initial = bias[(t + h) * Shape::THREADS];
          float s[4] = {initial.x, initial.y, initial.z, initial.w}, ds[4] = {-delta[0], -delta[0], -delta[1], -delta[1]};
          multiply_transposed<T, HEAD_DIM>(s, query, key_at, (t + h) * 8);
          multiply_transposed<T, HEAD_DIM>(ds, grad, value_at, (t + h) * 8);
          FASTNA_UNROLL
          for (int e = 0; e < 4; ++e) {
            s[e] = exp2_approx(s[e] * scale_log2e - lse[e / 2]);
            ds[e] *= s[e];
            if constexpr (Config::NEEDS_RPB_GRAD) bias_gradient[t + h][e] += ds[e];
          }
          FASTNA_UNROLL
          for (int k = 0; k < 2; ++k) {
            const u32 at = Weights::offset(first_row + g, t + h) + 8 * k * Weights::BYTES + q * 4;
            scores[2 * h + k] = pack2<T>(ds[2 * k], ds[2 * k + 1]);
            *reinterpret_cast<u32*>(shared + Config::WEIGHTS_AT + at) = pack2<T>(s[2 * k], s[2 * k + 1]);
            *reinterpret_cast<u32*>(shared + Config::SCORES_AT + at) = scores[2 * h + k];
          }
        }
        multiply<T, HEAD_DIM>(grad_query, scores, key_at, t * 8);
      }
      // Through the rows that this warp alone has read its outputs from.
      stage_rows<T, HEAD_DIM>(output_tile, grad_query, geometry.scale, geometry.scale);
      sync_warp();
      store_rows<Shape, HEAD_DIM>(static_cast<T*>(args.grad_query) + to_item, to, output_tile);
    }

    sync_threads();  // all weights are there, and keys and values are no longer read
    {  // 16 keys
      float grad_key[HEAD_DIM / 8][4] = {}, grad_value[HEAD_DIM / 8][4] = {};
      FASTNA_UNROLL
      for (int row = 0; row < Shape::PADDED; row += 16) {
        u32 weights[4], scores[4];  // transposed: 16 keys x 16 queries
        const u32 at = Weights::offset(row + lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2);
        load_matrix_x4_transposed(weights, weights_at + at);
        load_matrix_x4_transposed(scores, scores_at + at);
        multiply<T, HEAD_DIM>(grad_value, weights, grad_at, row);
        multiply<T, HEAD_DIM>(grad_key, scores, query_at, row);
      }
      stage_rows<T, HEAD_DIM>(key_tile, grad_key, geometry.scale, geometry.scale);
      stage_rows<T, HEAD_DIM>(value_tile, grad_value, 1.0f, 1.0f);
      sync_warp();
      store_rows<Shape, HEAD_DIM>(static_cast<T*>(args.grad_key) + to_item, to, key_tile);
      store_rows<Shape, HEAD_DIM>(static_cast<T*>(args.grad_value) + to_item, to, value_tile);
    }
  }
  wait_copies<0>();
  if constexpr (Config::NEEDS_RPB_GRAD) {
    reduce_bias_gradient<Config>(reinterpret_cast<float*>(shared), bias_gradient, args.grad_rpb + block_index() * Shape::BIAS);
  }
}

}  // namespace fastna
