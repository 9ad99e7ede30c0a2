// What the hopper_strip kernels share: small sliding 2-D windows by tensor copies (sm_90a). Not dilated, not causal, stride 1.
//
// A *tile* is 8 rows x 8 columns of queries (or keys): the 64 rows m = 8 column + row of a warpgroup's product. Warp w holds columns 2 w and
// 2 w + 1, its lane 4 g + q row g of both. A *row block* is 8 rows of the other side's tokens in shared memory, [column][row][channel]: a column
// is a core-matrix group of 8 rows, so that any run of columns is one operand. With windows of k = 2 L + 1 rows, row block i holds rows
// 8 i - L .. 8 i - L + 7 of the map, zeros where these lie outside. The queries of rows 8 s .. 8 s + 7 see keys of blocks s and s + 1 only, those of
// columns c .. c + 7 keys of columns c - L .. c + 7 + L, clamped windows included, provided that length mod 8 is 0 or above L: so key - query is
// the same for an accumulator element everywhere. kernels/cuda/hopper_strip.py refuses other lengths. (Inverse windows are another matter: near a
// border a key is seen from further away.)
//
// A *walk* goes down one strip of columns of one head's map: step s multiplies the strip's tiles of rows 8 s .. 8 s + 7. Row blocks come through
// a ring, each once: steps + 1 to a walk.
#pragma once

#include "fastna/hopper.cuh"
#include "fastna/window.cuh"
#include "fastna/wgmma.cuh"

namespace fastna {

constexpr int TILE_SIDE = 8;
// Finite, so that no masked score times a scale is NaN; exp2 of it is 0 for every scale above 1e-20.
constexpr float HIDDEN = -1e30f;

// TILES: of a strip, side by side.
template <class T, int HEAD_DIM_, int WINDOW_ROWS_, int WINDOW_COLUMNS_, int TILES_>
struct StripShape {
  using Element = T;
  static constexpr int HEAD_DIM = HEAD_DIM_, WINDOW_ROWS = WINDOW_ROWS_, WINDOW_COLUMNS = WINDOW_COLUMNS_, TILES = TILES_;
  static constexpr int ABOVE = WINDOW_ROWS / 2, LEFT = WINDOW_COLUMNS / 2;
  static constexpr int ROW_BYTES = HEAD_DIM * 2;  // of one token, and its swizzle
  static constexpr int COLUMN_BYTES = TILE_SIDE * ROW_BYTES;
  static constexpr int TILE_BYTES = TILE_SIDE * COLUMN_BYTES;                      // rows of a product, and from one tile of a strip to the next
  static constexpr int SEEN_COLUMNS = TILE_SIDE + WINDOW_COLUMNS - 1;              // of a row block, by a tile
  static constexpr int N = TILE_SIDE * SEEN_COLUMNS;                               // columns of its product
  static constexpr int ROWS_BYTES = TILES * TILE_BYTES;                            // the tiles of a step
  static constexpr int BLOCK_COLUMNS = TILES * TILE_SIDE + WINDOW_COLUMNS - 1;     // of a row block, for a strip
  static constexpr int BLOCK_BYTES = BLOCK_COLUMNS * COLUMN_BYTES;                 // one tensor's row block
  static constexpr int PAIRS = (WINDOW_COLUMNS + 1) / 2, ALL_PAIRS = SEEN_COLUMNS / 2;  // of columns: that one warp needs, and of a tile
  static_assert(HEAD_DIM == 32 || HEAD_DIM == 64, "a token is one swizzled row");
  static_assert(WINDOW_ROWS % 2 == 1 && WINDOW_COLUMNS % 2 == 1 && WINDOW_ROWS <= 9 && WINDOW_COLUMNS <= 7, "");
};

// Slot and parity of the next use of a ring of STAGES slots. Its users wait for full[slot] with `parity`, its producer for empty[slot] with
// the other one. A warp arrives at `empty` only after it has waited for `full`, needed or not: an earlier arrival would count for the last use.
template <int STAGES>
struct RingPosition {
  int slot = 0;
  u32 parity = 0;

  FASTNA_DEVICE void advance() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
};

// How walks are dealt out. A block keeps to one head; blocks of neighbouring numbers take neighbouring heads of the same batch entry, and
// strips of the same map, at the same time: they share sectors of DRAM, and the halo in L2.
struct StripWalks {
  int entries, at_once;  // batch entries, or as many maps as lie side by side; and how many of them a head's blocks take at the same time
  int strips, steps;
};
struct StripWalk {
  int entry, strip;

  // Of number `member` of a head's blocks. All threads of a warp call: shuffles tell the compiler that it is the same for them.
  FASTNA_DEVICE StripWalk(const StripWalks& walks, int member) : entry(shuffle(member / walks.strips, 0)), strip(shuffle(member % walks.strips, 0)) {}
  FASTNA_DEVICE bool exists(const StripWalks& walks) const { return entry < walks.entries; }
  // Strips take turns, for the last one may be narrower.
  FASTNA_DEVICE void advance(const StripWalks& walks) {
    entry += walks.at_once;
    if (++strip == walks.strips) strip = 0;
  }
};

// The map that a walk's entry stands for: `maps` batch entries side by side, of which this is the first; or, DILATED, a dilation group of one. Its
// rows and columns in the batch entry.
template <bool DILATED>
struct StripMap {
  int batch, row_group = 0, column_group = 0, row_step = 1, column_step = 1;

  FASTNA_DEVICE StripMap(const Geometry& geometry, int entry, int maps) : batch(entry * maps) {
    if constexpr (DILATED) {
      row_step = geometry.axis[1].dilation, column_step = geometry.axis[2].dilation;
      column_group = entry % column_step, row_group = entry / column_step % row_step, batch = entry / (column_step * row_step);
    }
  }
  FASTNA_DEVICE int row(int i) const { return i * row_step + row_group; }
  FASTNA_DEVICE int column(int i) const { return i * column_step + column_group; }
  // How many it has; `geometry` is the batch entry's.
  FASTNA_DEVICE int rows(const Geometry& geometry) const { return DILATED ? ceil_div(geometry.axis[1].length - row_group, row_step) : geometry.axis[1].length; }
  FASTNA_DEVICE int columns(const Geometry& geometry) const { return DILATED ? ceil_div(geometry.axis[2].length - column_group, column_step) : geometry.axis[2].length; }
};

// First key that a query sees, or that its neighbours would see if the map went on.
template <int WINDOW>
FASTNA_DEVICE int window_begin(int position, int length) {
  return minimum(maximum(position - WINDOW / 2, 0), length - WINDOW);
}

// Bias and mask as accumulators of queries hold them: entry i of a line is {B(dr, dc), B(dr + 1, dc)} with dr = i - 7 - ABOVE, where dr, dc =
// key - query. Lane 4 g + q takes entry 2 q - g + 7 for row block s, 8 entries further for block s + 1, in line dc. There is a table for every
// shift of a window along rows (-ABOVE .. ABOVE, by borders): what lies outside the window is HIDDEN, and so is all of a first line.
// WHOLE: the two row blocks are rows 0 to 15 of the map, for both steps; step s takes entries ABOVE - 8 s further.
// ALIGNED: row blocks begin with rows 8 i of the map, and step s sees blocks s - 1, s and s + 1: i - 7 - 8 = dr, 8 entries further for each.
// ALIKE: without a bias all columns of a window are, and one line serves them.
template <int WINDOW_ROWS, int WINDOW_COLUMNS, bool WHOLE, bool ALIGNED, bool ALIKE>
struct StripTable {
  static constexpr int ABOVE = WINDOW_ROWS / 2, FIRST = ALIGNED ? TILE_SIDE : ABOVE;
  static constexpr int BEFORE = WHOLE ? TILE_SIDE - ABOVE : 0;  // entries, that only the second step takes
  static constexpr int ENTRIES = 3 * TILE_SIDE - 2 + (WHOLE || ALIGNED ? TILE_SIDE : 0), LINE = ENTRIES * 8;
  static constexpr int COLUMN_STEP = ALIKE ? 0 : LINE;  // bytes from a column of keys to the next
  static constexpr int LINES = ALIKE ? 1 : 2 * WINDOW_COLUMNS - 1;
  static constexpr int SHIFT = (1 + LINES) * LINE;  // bytes from a shift to the next
  static constexpr int BYTES = WINDOW_ROWS * SHIFT;

  static FASTNA_DEVICE int line_offset(int dc) { return ALIKE ? LINE : (dc + WINDOW_COLUMNS) * LINE; }
  // A lane's entries for its query in step `step` of a map of `rows` rows; beyond the map those of the last row.
  static FASTNA_DEVICE int lane_offset(int lane, int step, int rows) {
    const int row = minimum(step * TILE_SIDE + lane / 4, rows - 1), shift = window_begin<WINDOW_ROWS>(row, rows) - (row - ABOVE);
    const int entry = BEFORE + 2 * (lane % 4) - (row - step * TILE_SIDE) + TILE_SIDE - 1 + (WHOLE ? ABOVE - step * TILE_SIDE : 0);
    return (shift + ABOVE) * SHIFT + entry * 8;
  }

  // Fills the table (aligned to 8) of one head, whose bias is [2 WINDOW_ROWS - 1, 2 WINDOW_COLUMNS - 1], times `factor`; nothing is read without
  // HAS_RPB. `thread` of `threads`; a barrier must follow.
  template <bool HAS_RPB, class Rpb>
  static FASTNA_DEVICE void build(u8* table, const Rpb* rpb, float factor, int thread, int threads) {
    for (int i = thread; i < SHIFT / 8; i += threads) {
      const int line = i / ENTRIES - 1, first = i % ENTRIES - BEFORE - (TILE_SIDE - 1) - FIRST;  // dr
      float value[2] = {0.0f, 0.0f};
      FASTNA_UNROLL
      for (int k = 0; k < 2; ++k) {
        if constexpr (HAS_RPB) {
          const int dr = first + k;
          if (line >= 0 && dr > -WINDOW_ROWS && dr < WINDOW_ROWS) value[k] = to_float(load_readonly(rpb + (dr + WINDOW_ROWS - 1) * (2 * WINDOW_COLUMNS - 1) + line)) * factor;
        }
      }
      FASTNA_UNROLL
      for (int shift = 0; shift < WINDOW_ROWS; ++shift) {
        bool visible[2];
        FASTNA_UNROLL
        for (int k = 0; k < 2; ++k) visible[k] = line >= 0 && static_cast<u32>(first + k - shift + 2 * ABOVE) < WINDOW_ROWS;
        *reinterpret_cast<float2*>(table + shift * SHIFT + i * 8) = {visible[0] ? value[0] : HIDDEN, visible[1] ? value[1] : HIDDEN};
      }
    }
  }
};

}  // namespace fastna
