// Bias and mask of a query-stationary strip product, as initial values of its score accumulators: they cost no arithmetic.
//
// A product multiplies 8 query rows x 2 query columns (matrix row g: query row g of the first column, g + 8: of the second) with 8
// consecutive keys of one key row. Its accumulator wants, per lane 4 g + q, bias / scale of keys 2 q and 2 q + 1 for both
// columns, MASKED where the key lies outside the column's window. That depends on
//   key row - query row: a line of the table, 4 quads (float4, one per q), 64 bytes;
//   how the windows of the two columns lie in the 8 keys: a slot, 2 WINDOW_ROWS - 1 lines. Slot 0 serves every pair of
//   columns away from the borders, the pairs near the left and right border of the map have one each.
// Whether the key row is in the window is settled by the choice of the address: a masked line follows the slots, once per product row.
#pragma once

#include "fastna/strip_layout.cuh"

namespace fastna {

// Finite, so that MASKED * scale is never NaN; exp2 of it is 0 for every scale above 1e-20.
constexpr float MASKED = -1e30f;

template <int WINDOW_ROWS, int WINDOW_COLUMNS, int KEY_ROWS, int SLOTS>
struct StripBias {
  static constexpr int LINE = 64;
  static constexpr int LINES = 2 * WINDOW_ROWS - 1;
  static constexpr int MASKED_LINES = SLOTS * LINES;  // first of KEY_ROWS + 1
  static constexpr int BYTES = (MASKED_LINES + KEY_ROWS + 1) * LINE;
  static constexpr int LEFT = WINDOW_COLUMNS / 2;

  int first_column, columns;  // of the tile; of the map
  int left_pairs, right_begin;

  // `first_column` is even.
  FASTNA_DEVICE StripBias(int first_column, int columns) : first_column(first_column), columns(columns) {
    left_pairs = maximum(LEFT - first_column + 1, 0) / 2;
    const int clamped = columns - KEY_COLUMNS + 1 + LEFT;
    right_begin = maximum(clamped + (clamped & 1), first_column + 2 * left_pairs);
  }

  // Slot of the pair of query columns that begins at `column`.
  FASTNA_DEVICE int slot(int column) const {
    if (column < LEFT) return 1 + (column - first_column) / 2;
    return column < right_begin ? 0 : 1 + left_pairs + (column - right_begin) / 2;
  }

  // Fills `table` (BYTES, aligned to 16) for the tile's `tile_columns` columns. `rpb`: one head's [2 WINDOW_ROWS - 1,
  // 2 WINDOW_COLUMNS - 1]; never read unless HAS_RPB. All THREADS threads call; a barrier must follow.
  template <int THREADS, bool HAS_RPB, class Rpb>
  FASTNA_DEVICE void build(u8* table, const Rpb* rpb, float inverse_scale, int tile_columns) const {
    const int right_pairs = maximum(minimum(columns, first_column + tile_columns) - right_begin + 1, 0) / 2;
    const int quads = (1 + left_pairs + right_pairs) * LINES * 4;
    for (int i = thread_index(); i < quads; i += THREADS) {
      const int slot = i / (LINES * 4), line = i / 4 % LINES, q = i % 4;
      float4 quad;
      if (slot == 0) {
        quad = entry<HAS_RPB>(rpb, inverse_scale, line, 2 * q, 0, 1, LEFT, LEFT + 1);
      } else {
        const int column = slot <= left_pairs ? first_column + 2 * (slot - 1) : right_begin + 2 * (slot - 1 - left_pairs);
        const int second = minimum(column + 1, columns - 1);
        const int key = first_product_key<WINDOW_COLUMNS>(column, columns, KEY_COLUMNS);
        quad = entry<HAS_RPB>(rpb, inverse_scale, line, 2 * q, first_key<WINDOW_COLUMNS>(column, columns) - key,
                     first_key<WINDOW_COLUMNS>(second, columns) - key, column - key, second - key);
      }
      *reinterpret_cast<float4*>(table + slot * LINES * LINE + line * LINE + q * 16) = quad;
    }
    for (int i = thread_index(); i < (KEY_ROWS + 1) * 4; i += THREADS) {
      *reinterpret_cast<float4*>(table + MASKED_LINES * LINE + i * 16) = {MASKED, MASKED, MASKED, MASKED};
    }
  }

  // What a lane keeps for its query row, see `offset`. `query` and `first_row` (of the keys) are rows of the map with `rows` rows.
  struct Row {
    u32 visible;      // bit j: key row first_row + j is in the window
    int line, masked;  // byte offsets of key row first_row in slot 0 and among the masked lines
  };
  FASTNA_DEVICE static Row row(int query, int first_row, int rows, int q) {
    const int line = first_row - query + WINDOW_ROWS - 1;
    Row result;
    result.visible = ((1u << WINDOW_ROWS) - 1) << (first_key<WINDOW_ROWS>(query, rows) - first_row);
    result.line = line * LINE + q * 16;
    // Same half of the 128 bytes of banks as the line itself: neighbouring query rows never collide.
    result.masked = (MASKED_LINES + (line & 1)) * LINE + q * 16;
    return result;
  }

 private:
  // Bias of keys `key` and `key` + 1 for both columns, whose windows begin at `begin`, all counted from the product's first key.
  template <bool HAS_RPB, class Rpb>
  FASTNA_DEVICE static float4 entry(const Rpb* rpb, float inverse_scale, int line, int key, int begin0, int begin1, int query0,
                                    int query1) {
    const auto one = [=](int at, int begin, int query) {
      float value = 0.0f;
      if constexpr (HAS_RPB) {
        const int seen = minimum(maximum(at, begin), begin + WINDOW_COLUMNS - 1);  // a read without a branch
        value = to_float(load_readonly(rpb + line * (2 * WINDOW_COLUMNS - 1) + WINDOW_COLUMNS - 1 + seen - query)) * inverse_scale;
      }
      return static_cast<u32>(at - begin) < WINDOW_COLUMNS ? value : MASKED;
    };
    return {one(key, begin0, query0), one(key + 1, begin0, query0), one(key, begin1, query1), one(key + 1, begin1, query1)};
  }
};

}  // namespace fastna
