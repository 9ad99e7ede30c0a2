// The gradient of the bias in the backward kernels of small 2-D windows.
#pragma once

#include "fastna/strip_layout.cuh"

namespace fastna {

// Sums ds over the pairs of a warp by offset (key - query). A product with a one-hot left operand gathers equal row offsets:
// line m of the sum takes query row r of key row j where j - r is the offset m. Columns hold one offset each while the distance of
// the 8 key columns to the pair of query columns stays the same; `flush` adds them to the warp's table.
// One product has 16 lines. Where there are more offsets, these are from the least one away from borders on; a second product, asked for where
// `has_outer`, has the next 16, modulo 32: all that windows at either border have beyond.
// FOLD, unless 0: the last 4 of 8 key columns are the first 4 of a row FOLD further on, and j stays below FOLD. Then 16 lines are all: modulo 16,
// and for the last 4 columns FOLD further on.
template <class Config, int FOLD = 0>
struct StripBiasGradient {
  using T = typename Config::T;
  static constexpr u32 ONE = is_same<T, bf16> ? 0x3f80 : 0x3c00;
  static constexpr int LINES = 2 * Config::WINDOW_ROWS - 1, PRODUCTS = FOLD != 0 ? 1 : ceil_div(LINES, 16);
  static constexpr int FIRST = PRODUCTS == 1 ? 0 : Config::WINDOW_ROWS / 2;  // line of the first product's first
  static_assert(PRODUCTS <= 2 && (FOLD == 0 || (LINES <= 16 + FOLD && FOLD < 16)), "");

  float sum[PRODUCTS][2][4] = {};
  float* table;
  int distance = 0;
  // What the one-hot operand holds in the one sweep step where it holds anything: pairs of query rows are even, and so are steps.
  int low_step, high_step;
  u32 low_one, high_one;

  FASTNA_DEVICE explicit StripBiasGradient(float* table_) : table(table_) {}

  // Before a sweep: `line` is the index of the offset of its first key row to query row 0, `key_distance` that of the first key column.
  FASTNA_DEVICE void begin(int line, int key_distance) {
    if (key_distance != distance) flush();
    distance = key_distance;
    // Line g takes query row r = 2 q of key row j where line + j - r = g, and r + 1 one row later.
    const int step = (lane_index() & 3) * 2 + (lane_index() >> 2) - line + FIRST;
    const bool odd = (step & 1) != 0;
    low_step = step + (odd ? 1 : 0);
    high_step = step - (odd ? 1 : 0);
    if constexpr (FOLD != 0) low_step &= 15, high_step &= 15;
    low_one = odd ? ONE << 16 : ONE;
    high_one = odd ? ONE : ONE << 16;
  }
  // Whether a query's keys lie in lines that the first product lacks; `first` is the first one's row offset.
  FASTNA_DEVICE static bool is_outer(int first) {
    const int line = first + Config::WINDOW_ROWS - 1 - FIRST;
    return line < 0 || line + Config::WINDOW_ROWS > 16;
  }
  // `ds` of key rows j and j + 1, j even.
  FASTNA_DEVICE void add(const u32 (&ds)[4], int j, bool has_outer = false) {
    const int low_8 = FOLD != 0 ? low_step ^ 8 : low_step + 8, high_8 = FOLD != 0 ? high_step ^ 8 : high_step + 8;
    const u32 select[4] = {j == low_step ? low_one : 0, j == low_8 ? low_one : 0, j == high_step ? high_one : 0, j == high_8 ? high_one : 0};
    const u32 upper[2] = {move_matrix(ds[0]), move_matrix(ds[2])}, lower[2] = {move_matrix(ds[1]), move_matrix(ds[3])};
    mma_m16n8k16<T>(sum[0][0], select, upper[0], upper[1]);
    mma_m16n8k16<T>(sum[0][1], select, lower[0], lower[1]);
    if constexpr (PRODUCTS == 2) {
      if (has_outer) {
        const int low = (j - low_step) & 31, high = (j - high_step) & 31;
        const u32 outer[4] = {low == 16 ? low_one : 0, low == 24 ? low_one : 0, high == 16 ? high_one : 0, high == 24 ? high_one : 0};
        mma_m16n8k16<T>(sum[1][0], outer, upper[0], upper[1]);
        mma_m16n8k16<T>(sum[1][1], outer, lower[0], lower[1]);
      }
    }
  }
  FASTNA_DEVICE void flush() {
    constexpr int WIDTH = 2 * Config::WINDOW_COLUMNS - 1, ROWS = FOLD != 0 ? 2 : 1;
    const int g = lane_index() >> 2, q = lane_index() & 3;
    FASTNA_UNROLL
    for (int h = 0; h < 2; ++h) {
      // One after the other where they may add to the same entry: query columns, and the rows that a folded sweep joins.
      FASTNA_UNROLL
      for (int row = 0; row < ROWS; ++row) {
        FASTNA_UNROLL
        for (int p = 0; p < PRODUCTS; ++p) {
          FASTNA_UNROLL
          for (int i = 0; i < 4; ++i) {
            int line = (FIRST + p * 16 + g + (i >> 1) * 8) & 31, offset = distance + q * 2 + (i & 1) - h + Config::WINDOW_COLUMNS - 1;
            if (row == 1) offset -= 4, line += line + FOLD < LINES ? FOLD : FOLD - 16;
            const bool is_own = ROWS == 1 || q >> 1 == row;
            if (is_own && line < LINES && offset >= 0 && offset < WIDTH) table[line * WIDTH + offset] += sum[p][h][i];
            if (row + 1 == ROWS) sum[p][h][i] = 0.0f;
          }
        }
        sync_warp();
      }
    }
  }
};

}  // namespace fastna
