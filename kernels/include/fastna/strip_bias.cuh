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
    const int border = column < LEFT ? (column - first_column) >> 1 : left_pairs + ((column - right_begin) >> 1);
    return column < LEFT || column >= right_begin ? 1 + border : 0;
  }

  // Fills `table` (BYTES, aligned to 16) for the tile's `tile_columns` columns, a warp a slot. `rpb`: one head's [2 WINDOW_ROWS - 1,
  // 2 WINDOW_COLUMNS - 1]; never read unless HAS_RPB. All THREADS threads call; a barrier must follow.
  template <int THREADS, bool HAS_RPB, class Rpb>
  FASTNA_DEVICE void build(u8* table, const Rpb* rpb, float inverse_scale, int tile_columns) const {
    const int right_pairs = maximum(minimum(columns, first_column + tile_columns) - right_begin + 1, 0) / 2;
#pragma unroll 1
    for (int slot = warp_index(); slot < 1 + left_pairs + right_pairs; slot += THREADS / WARP) {
      int begin[2] = {0, 1}, query[2] = {LEFT, LEFT + 1};  // both columns' first key and themselves, counted from the product's first key
      if (slot != 0) {
        const int column = slot <= left_pairs ? first_column + 2 * (slot - 1) : right_begin + 2 * (slot - 1 - left_pairs);
        const int second = minimum(column + 1, columns - 1);
        const int key = first_product_key<WINDOW_COLUMNS>(column, columns, KEY_COLUMNS);
        begin[0] = first_key<WINDOW_COLUMNS>(column, columns) - key, begin[1] = first_key<WINDOW_COLUMNS>(second, columns) - key;
        query[0] = column - key, query[1] = second - key;
      }
      fill<HAS_RPB>(table + slot * LINES * LINE, rpb, inverse_scale, begin, query);
    }
    FASTNA_UNROLL
    for (int base = 0; base < (KEY_ROWS + 1) * 4; base += THREADS) {
      const int i = base + thread_index();
      if (i < (KEY_ROWS + 1) * 4) *reinterpret_cast<float4*>(table + MASKED_LINES * LINE + i * 16) = {MASKED, MASKED, MASKED, MASKED};
    }
  }

  // What a lane keeps for its query row, see `offset`. `query` and `first_row` (of the keys) are rows of the map with `rows` rows.
  struct Row {
    u32 visible;  // bit j: key row first_row + j is in the window
    int line;     // byte offset of key row first_row in slot 0

    // Likewise among the masked lines: in the same half of the 128 bytes of banks, so that neighbouring query rows never collide.
    FASTNA_DEVICE int masked() const { return MASKED_LINES * LINE + (line & (2 * LINE - 1)); }
  };
  FASTNA_DEVICE static Row row(int query, int first_row, int rows, int q) {
    const int line = first_row - query + WINDOW_ROWS - 1;
    Row result;
    result.visible = ((1u << WINDOW_ROWS) - 1) << (first_key<WINDOW_ROWS>(query, rows) - first_row);
    result.line = line * LINE + q * 16;
    return result;
  }

 private:
  // A slot's lines, a lane one of the quads of every eighth.
  template <bool HAS_RPB, class Rpb>
  FASTNA_DEVICE static void fill(u8* lines, const Rpb* rpb, float inverse_scale, const int (&begin)[2], const int (&query)[2]) {
    constexpr int WIDTH = 2 * WINDOW_COLUMNS - 1, STEP = WARP / 4;
    const int first = lane_index() / 4, q = lane_index() % 4;
    bool visible[4];
    const Rpb* source[4];
    FASTNA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int key = 2 * q + i % 2, from = begin[i / 2];
      const int seen = minimum(maximum(key, from), from + WINDOW_COLUMNS - 1);  // a read without a branch
      visible[i] = static_cast<u32>(key - from) < WINDOW_COLUMNS;
      source[i] = rpb + first * WIDTH + WINDOW_COLUMNS - 1 + seen - query[i / 2];
    }
    FASTNA_UNROLL
    for (int line = 0; line < LINES; line += STEP) {
      if (line + STEP <= LINES || line + first < LINES) {
        float quad[4];
        FASTNA_UNROLL
        for (int i = 0; i < 4; ++i) {
          float value = 0.0f;
          if constexpr (HAS_RPB) value = to_float(load_readonly(source[i] + line * WIDTH)) * inverse_scale;
          quad[i] = visible[i] ? value : MASKED;
        }
        *reinterpret_cast<float4*>(lines + (line + first) * LINE + q * 16) = {quad[0], quad[1], quad[2], quad[3]};
      }
    }
  }
};

}  // namespace fastna
