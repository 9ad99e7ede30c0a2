// Attention forward over small windows by scalar multiply-adds: exact float32, and windows of a few keys in any type.
//
// LANES lanes share QUERIES neighbouring queries of a dilation group along the last axis, each with a part of the channels. A key is loaded once
// for the four of them, through the first cache: a block is a tile of queries, whose windows overlap. Of what they see together,
// window + 3 columns, little is multiplied in vain, where a matrix product of 64 queries multiplies four times the keys of a 7 x 7 window.
// Sums over lanes are taken so that each lane ends with the scores of one query, its own, for which it knows bias, mask and exponentials.
#pragma once

#include "fastna/primitives.cuh"
#include "fastna/window.cuh"

namespace fastna {

struct ScalarForwardArguments {
  TensorArguments query, key, value;
  void* output;  // contiguous, as is lse
  float* lse;
  const void* rpb;  // [heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
  Geometry geometry;
  int rows, column_groups;       // of the longest dilation group: along axis 1; of QUERIES columns along axis 2
  int tile_groups, column_tiles;  // groups of columns of a block's tile, and such tiles
  float scale_log2e;
};

template <class T_, class Rpb_, bool HAS_RPB_, int HEAD_DIM_, int COLUMNS_, int THREADS_>
struct ScalarForwardConfig {
  using T = T_;
  using Rpb = Rpb_;
  static constexpr bool HAS_RPB = HAS_RPB_;
  static constexpr int HEAD_DIM = HEAD_DIM_, THREADS = THREADS_;
  static constexpr int COLUMNS = COLUMNS_;  // most that the queries of a group see together
  static constexpr int QUERIES = 4, LANES = HEAD_DIM > 32 ? 8 : 4;
  static constexpr int CHUNK = 16 / sizeof(T);  // channels of a load
  static constexpr int CHUNKS = HEAD_DIM / CHUNK, HELD = ceil_div(CHUNKS, LANES);
  static constexpr int MARGIN = QUERIES - 1;  // of a line of the bias table, at both ends: what hidden columns read
  static constexpr int GROUPS = THREADS / LANES;
  static_assert(HEAD_DIM % CHUNK == 0, "tokens are read by 16-byte loads");
};

template <class Config>
struct ScalarForward {
  using T = typename Config::T;
  static constexpr int QUERIES = Config::QUERIES, LANES = Config::LANES, COLUMNS = Config::COLUMNS, CHUNK = Config::CHUNK, HELD = Config::HELD;
  static constexpr float LAZY = 8.0f;  // log2 of what weights may exceed 1 by before sums are scaled down

  const ScalarForwardArguments& args;
  const int part = thread_index() % LANES;  // of the channels
  const int own = part % QUERIES;           // query whose scores this lane holds

  // The lane's chunks of a token are `part`, `part + LANES`, ...
  FASTNA_DEVICE bool holds(int i) const { return Config::CHUNKS % LANES == 0 || i * LANES + part < Config::CHUNKS; }
  // Of the token whose chunk `part` is at `first`; zero where there is none.
  FASTNA_DEVICE void load(float (&to)[HELD * CHUNK], const T* first) const {
    FASTNA_UNROLL
    for (int i = 0; i < HELD; ++i) {
      uint4 bits = {0, 0, 0, 0};
      if (holds(i)) bits = load_readonly(reinterpret_cast<const uint4*>(first + i * LANES * CHUNK));
      unpack(&to[i * CHUNK], bits);
    }
  }
  FASTNA_DEVICE static void unpack(float* to, uint4 bits) {
    const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
    FASTNA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        to[i] = bits_float(words[i]);
      } else {
        const float2 pair = unpack2<T>(words[i]);
        to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
      }
    }
  }
  FASTNA_DEVICE void store(T* first, const float (&from)[HELD * CHUNK], float factor) const {
    FASTNA_UNROLL
    for (int i = 0; i < HELD; ++i) {
      u32 words[4];
      FASTNA_UNROLL
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          words[j] = float_bits(from[i * CHUNK + j] * factor);
        } else {
          words[j] = pack2<T>(from[i * CHUNK + 2 * j] * factor, from[i * CHUNK + 2 * j + 1] * factor);
        }
      }
      if (holds(i)) store_global_16(first + i * LANES * CHUNK, {words[0], words[1], words[2], words[3]});
    }
  }

  // The sum over the lanes of the scores of the lane's own query.
  FASTNA_DEVICE float sum_own(const float (&scores)[QUERIES]) const {
    const bool second = own & 2, odd = own & 1;
    const float a = (second ? scores[2] : scores[0]) + shuffle_xor(second ? scores[0] : scores[2], 2);
    const float b = (second ? scores[3] : scores[1]) + shuffle_xor(second ? scores[1] : scores[3], 2);
    const float sum = (odd ? b : a) + shuffle_xor(odd ? a : b, 1);
    return LANES == 8 ? sum + shuffle_xor(sum, 4) : sum;
  }
  // What the lane has whose own query is `query`.
  FASTNA_DEVICE float of_query(float value, int query) const { return shuffle(value, (lane_index() & ~(LANES - 1)) + query); }

  // Fills the bias table, in units of log2: lines of the last axis with a margin at either end. A barrier must follow.
  FASTNA_DEVICE void build_bias(float* table, int head, int lines, int offsets) const {
    const auto* rpb = static_cast<const typename Config::Rpb*>(args.rpb) + head * lines * offsets;
    const int line = offsets + 2 * Config::MARGIN;
    for (int i = thread_index(); i < lines * line; i += Config::THREADS) {
      const int offset = i % line - Config::MARGIN;
      const bool exists = offset >= 0 && offset < offsets;
      table[i] = exists ? to_float(load_readonly(rpb + i / line * offsets + offset)) * LOG2_E : 0.0f;
    }
  }

  // The queries of a thread: of one head, in one dilation group, from `position2` on. Where none are left it works beside the others on those of
  // the first token, and `exists` is false.
  struct Place {
    int head, map, token0, token1, group1, position1, group2, position2, columns;
    bool exists;
  };
  // Rows are those of all maps, and of all dilation groups along axis 1; groups of columns those of all dilation groups along axis 2.
  FASTNA_DEVICE Place place() const {
    const AxisArguments(&axis)[3] = args.geometry.axis;
    u32 block = block_index(), member = thread_index() / LANES;
    keep(block);  // worked out again where it is wanted again
    Place at;
    at.head = block % args.geometry.heads;
    block /= args.geometry.heads;
    const u32 row = block / args.column_tiles * (Config::GROUPS / args.tile_groups) + member / args.tile_groups;
    const u32 column_group = block % args.column_tiles * args.tile_groups + member % args.tile_groups;
    at.group2 = column_group / args.column_groups, at.position2 = column_group % args.column_groups * QUERIES;
    at.position1 = row % args.rows, at.group1 = row / args.rows % axis[1].dilation;
    const u32 plane = row / args.rows / axis[1].dilation;
    at.token0 = plane % axis[0].length, at.map = plane / axis[0].length;
    at.exists = at.map < args.geometry.batch && at.position1 < group_length(axis[1], at.group1) && at.group2 < axis[2].dilation &&
                at.position2 < group_length(axis[2], at.group2);
    if (!at.exists) at.group2 = at.position2 = at.position1 = at.group1 = at.token0 = at.map = 0;
    at.token1 = token_at(axis[1], at.group1, at.position1), at.columns = group_length(axis[2], at.group2);
    return at;
  }

  FASTNA_DEVICE void run() const {
    const Geometry& geometry = args.geometry;
    const AxisArguments(&axis)[3] = geometry.axis;
    const Place at = place();
    float* table = dynamic_shared<float>();
    const int offsets[3] = {2 * axis[0].window - 1, 2 * axis[1].window - 1, 2 * axis[2].window - 1};
    const int line = offsets[2] + 2 * Config::MARGIN;
    if constexpr (Config::HAS_RPB) {
      build_bias(table, at.head, offsets[0] * offsets[1], offsets[2]);
      sync_threads();
    }
    if (!any_in_warp(at.exists)) return;

    const int group0 = group_of(axis[0], at.token0), position0 = position_of(axis[0], at.token0);
    const int begin0 = window_at(axis[0], position0, group_length(axis[0], group0)).begin;
    const int begin1 = window_at(axis[1], at.position1, group_length(axis[1], at.group1)).begin;
    const Interval window2 = window_at(axis[2], minimum(at.position2 + own, at.columns - 1), at.columns);
    const int begin2 = window_at(axis[2], at.position2, at.columns).begin;
    const int last = window_at(axis[2], minimum(at.position2 + QUERIES - 1, at.columns - 1), at.columns).end - 1 - begin2;
    const u32 seen = ((1u << window2.size()) - 1) << (window2.begin - begin2);  // columns, by the lane's own query

    float query[QUERIES][HELD * CHUNK], sums[QUERIES][HELD * CHUNK] = {};
    FASTNA_UNROLL
    for (int q = 0; q < QUERIES; ++q) {
      const int token2 = token_at(axis[2], at.group2, minimum(at.position2 + q, at.columns - 1));
      load(query[q], element<const T>(args.query, at.map, at.token0, at.token1, token2, at.head) + part * CHUNK);
      FASTNA_UNROLL
      for (int i = 0; i < HELD * CHUNK; ++i) query[q][i] *= args.scale_log2e;
    }

    // Of the first key that the first query sees: the lane's part. From there on by steps that are the same for all.
    const int key0 = token_at(axis[0], group0, begin0), key1 = token_at(axis[1], at.group1, begin1), key2 = token_at(axis[2], at.group2, begin2);
    const int key_head = at.head / (geometry.heads / geometry.key_heads);
    const T* key_row = element<const T>(args.key, at.map, key0, key1, key2, key_head) + part * CHUNK;
    const T* value_row = element<const T>(args.value, at.map, key0, key1, key2, key_head) + part * CHUNK;
    const int key_step = static_cast<int>(args.key.axis[2]) * axis[2].dilation;
    const int value_step = static_cast<int>(args.value.axis[2]) * axis[2].dilation;
    const int offset0 = begin0 - position0 + axis[0].window - 1, offset1 = begin1 - at.position1 + axis[1].window - 1;
    const int offset2 = begin2 - (at.position2 + own) + axis[2].window - 1 + Config::MARGIN;
    const float* bias = table + (offset0 * offsets[1] + offset1) * line + offset2;
    float top = -infinity(), weight = 0.0f;
#pragma unroll 1
    for (int i = 0; i < axis[0].window; ++i) {
#pragma unroll 1
      for (int j = 0; j < axis[1].window; ++j) {
        keep(key_row), keep(value_row);  // one address each, from which columns are a product away
        float scores[COLUMNS], row_top = -infinity();
        int to_last = last, column = 0;
        keep(to_last);  // else the compiler works out every column's step before the loop, for registers that there are not
        FASTNA_UNROLL
        for (int c = 0; c < COLUMNS; ++c) {
          float key[HELD * CHUNK], products[QUERIES];
          if (c == COLUMNS / 2) sync_warp();  // loads of half a row at once are enough, and a whole row's want more registers than there are
          load(key, key_row + column);
          column += c < to_last ? key_step : 0;
          FASTNA_UNROLL
          for (int q = 0; q < QUERIES; ++q) {
            products[q] = query[q][0] * key[0];
            FASTNA_UNROLL
            for (int i = 1; i < HELD * CHUNK; ++i) products[q] += query[q][i] * key[i];
          }
          scores[c] = sum_own(products);
          if constexpr (Config::HAS_RPB) scores[c] += bias[c];
          if (!(seen & 1u << c)) scores[c] = -infinity();
          row_top = maximum(row_top, scores[c]);
        }
        if (any_in_warp(row_top > top + LAZY)) {
          const float higher = maximum(top, row_top);
          const float factor = top == -infinity() ? 0.0f : exp2_approx(top - higher);
          top = higher;
          weight *= factor;
          FASTNA_UNROLL
          for (int q = 0; q < QUERIES; ++q) {
            const float scaled = of_query(factor, q);
            FASTNA_UNROLL
            for (int i = 0; i < HELD * CHUNK; ++i) sums[q][i] *= scaled;
          }
        }
        const float reference = finite(top);
        column = 0;
        FASTNA_UNROLL
        for (int c = 0; c < COLUMNS; ++c) {
          float value[HELD * CHUNK];
          load(value, value_row + column);
          column += c < to_last ? value_step : 0;
          const float p = exp2_approx(scores[c] - reference);
          weight += p;
          FASTNA_UNROLL
          for (int q = 0; q < QUERIES; ++q) {
            const float of_q = of_query(p, q);
            FASTNA_UNROLL
            for (int i = 0; i < HELD * CHUNK; ++i) sums[q][i] += of_q * value[i];
          }
        }
        key_row += axis[1].dilation * args.key.axis[1], value_row += axis[1].dilation * args.value.axis[1];
        bias += line;
      }
      key_row += axis[0].dilation * args.key.axis[0] - axis[1].window * axis[1].dilation * args.key.axis[1];
      value_row += axis[0].dilation * args.value.axis[0] - axis[1].window * axis[1].dilation * args.value.axis[1];
      bias += (offsets[1] - axis[1].window) * line;
    }

    const float inverse = 1.0f / weight;
    const Place to = place();
    const i64 row = (static_cast<i64>(to.map) * axis[0].length + to.token0) * axis[1].length + to.token1;
    FASTNA_UNROLL
    for (int q = 0; q < QUERIES; ++q) {
      const float factor = of_query(inverse, q);
      if (!to.exists || to.position2 + q >= to.columns) continue;
      const i64 entry = (row * axis[2].length + token_at(axis[2], to.group2, to.position2 + q)) * geometry.heads + to.head;
      store(static_cast<T*>(args.output) + entry * Config::HEAD_DIM + part * CHUNK, sums[q], factor);
      if (part == q) args.lse[entry] = (finite(top) + log2_approx(weight)) * LN_2;
    }
  }
  // For differences from the largest score, also where every one is minus infinity.
  FASTNA_DEVICE static float finite(float top) { return top == -infinity() ? 0.0f : top; }
};

template <class Config>
FASTNA_DEVICE void scalar_forward(const ScalarForwardArguments& args) {
  ScalarForward<Config>{args}.run();
}

}  // namespace fastna
