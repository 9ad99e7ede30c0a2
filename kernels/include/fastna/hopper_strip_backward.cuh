// How the backward pass of hopper_strip cuts a map, and what it keeps in shared memory. See hopper_strip.cuh for tiles, row blocks and walks.
//
// Queries that see a key reach further than keys that a query sees: the first key of the last window is seen from all 2 L + 1 rows below it.
// So where tiles of queries begin with row and column 8 i, tiles of keys do not:
//   rows      8 s - `lift`, where row block i begins with row 8 i - L - lift; lift is 1 where that last window begins with a row 8 i - 1;
//   columns   the last tile of the map begins 8 columns before its end, and has the keys from that window on; the others have what is before.
//             The last tile of queries begins there too, so that a strip of one tile holds what both need.
// kernels/cuda/hopper_strip_backward.py finds the lift, and a test tries all lengths.
#pragma once

#include "fastna/hopper_strip.cuh"

namespace fastna {

struct HopperStripBackwardArguments {
  TensorMap query, key, value, output, grad_output;  // boxes: a row block of one head; dimensions channel, row, column, head, batch
  void *grad_query, *grad_key, *grad_value;          // [batch, rows, columns, heads, head_dim]
  const float *lse, *grad_lse;  // [batch, rows, columns, heads]; the second may be null
  int heads, rows, columns;
  int walks, strips, tiles, steps;  // of a head: batch x strips; of a map: strips, tiles side by side, and tiles one below another
  int lift;
  float scale, scale_log2;  // times log2(e)
};

// Tensors of a slot, a row block of each.
enum StripSlotTensor : int { STRIP_KEY, STRIP_VALUE, STRIP_QUERY, STRIP_GRAD_OUTPUT, STRIP_SLOT_TENSORS };

template <class T, int WINDOW_ROWS, int WINDOW_COLUMNS, int TILES, int SLOTS_>
struct HopperStripBackwardConfig : StripShape<T, 64, WINDOW_ROWS, WINDOW_COLUMNS, TILES> {
  using Shape = StripShape<T, 64, WINDOW_ROWS, WINDOW_COLUMNS, TILES>;
  static constexpr int SLOTS = SLOTS_;
  static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

  static constexpr int TOKENS = Shape::BLOCK_COLUMNS * TILE_SIDE;  // of a row block
  static constexpr int SLOT_BYTES = STRIP_SLOT_TENSORS * Shape::BLOCK_BYTES;
  static constexpr int K_STEPS = Shape::HEAD_DIM / 16;
};

// The mask by distance, 0 or HIDDEN. A line holds what is added for {(dr, dc), (dr + 1, dc)} for dc = -WINDOW_COLUMNS .. WINDOW_COLUMNS, a pair of rows of keys
// (or of queries, backwards). Lines differ by dr, and by which of both rows lies in the window; tables by where the query's window of
// columns begins. What lies outside is HIDDEN: so no product needs another mask.
template <int WINDOW_ROWS, int WINDOW_COLUMNS>
struct StripMaskedTable {
  static constexpr int ENTRIES = 2 * WINDOW_COLUMNS + 1, LINE = ENTRIES * 8;  // odd: lines that follow each other begin in different banks
  static constexpr int FIRST_ONLY = 2 * WINDOW_ROWS - 2, SECOND_ONLY = FIRST_ONLY + WINDOW_ROWS, NEITHER = SECOND_ONLY + WINDOW_ROWS;
  static constexpr int LINES = NEITHER + 1, TABLE = LINES * LINE;
  static constexpr int PADDING = 16;  // on either side: what lies there is multiplied by zero
  static constexpr int BYTES = PADDING + WINDOW_COLUMNS * TABLE + PADDING;

  // Offset of the line for distance `dr` of the first row; which of the rows is in the window.
  static FASTNA_DEVICE int line_offset(int dr, bool first, bool second) {
    const int one = first ? FIRST_ONLY + dr : SECOND_ONLY + WINDOW_ROWS + dr;
    return PADDING + (first && second ? dr + WINDOW_ROWS - 1 : first || second ? one : NEITHER) * LINE;
  }
  // Of entry `dc` in the table for a query at `column` of `columns`; finite for every column.
  static FASTNA_DEVICE int table_offset(int column, int columns) { return (begin<WINDOW_COLUMNS>(column, columns) + WINDOW_COLUMNS - 1) * TABLE; }
  static FASTNA_DEVICE constexpr int entry_offset(int dc) { return (dc + WINDOW_COLUMNS) * 8; }
  // First distance that the query at `position` sees.
  template <int WINDOW>
  static FASTNA_DEVICE int begin(int position, int length) {
    return minimum(maximum(window_begin<WINDOW>(position, length) - position, 1 - WINDOW), 0);
  }
  static FASTNA_DEVICE bool in_window(int dr, int first) { return dr >= first && dr < first + WINDOW_ROWS; }
  // The line for distances `dr` and dr + 1, if these are seen by the queries of rows `first` and `second`.
  static FASTNA_DEVICE int line_of(int dr, int first, int second, int rows) {
    return line_offset(dr, in_window(dr, begin<WINDOW_ROWS>(first, rows)), in_window(dr + 1, begin<WINDOW_ROWS>(second, rows)));
  }

  // `thread` of `threads`; a barrier must follow.
  static FASTNA_DEVICE void build(u8* table, int thread, int threads) {
#pragma unroll 1
    for (int i = thread; i < BYTES / 8; i += threads) {
      const int at = i - PADDING / 8, line = at / ENTRIES % LINES, dc = at % ENTRIES - WINDOW_COLUMNS;
      const int first_column = at / (ENTRIES * LINES) - (WINDOW_COLUMNS - 1);
      const bool inside = at >= 0 && at < WINDOW_COLUMNS * LINES * ENTRIES && dc >= first_column && dc < first_column + WINDOW_COLUMNS;
      const bool first = line < SECOND_ONLY, second = line < FIRST_ONLY || (line >= SECOND_ONLY && line < NEITHER);
      *reinterpret_cast<float2*>(table + i * 8) = {first && inside ? 0.0f : HIDDEN, second && inside ? 0.0f : HIDDEN};
    }
  }
};

template <class Config>
struct HopperStripBackwardShared {
  using Table = StripMaskedTable<Config::WINDOW_ROWS, Config::WINDOW_COLUMNS>;

  u8 ring[Config::SLOTS][STRIP_SLOT_TENSORS][Config::BLOCK_BYTES];
  u8 output[Config::BLOCK_BYTES];                        // of the row block whose statistics come next
  float lse[Config::SLOTS][Config::TOKENS];              // times log2(e)
  float delta[Config::SLOTS][Config::TOKENS];            // sum(grad_output * output) - grad_lse
  alignas(16) u8 table[Table::BYTES];
  MemoryBarrier output_full;
  MemoryBarrier full[Config::SLOTS], ready[Config::SLOTS], empty[Config::SLOTS];  // operands are there; statistics too; nobody needs them
  // Behind, worked out once for all walks: StripOwnColumns [tiles][queries, keys][4 warps]; lines of the table, as two of 16 bits for both row
  // blocks, [steps][queries, keys][lanes]; and Table::table_offset per column of the map and of LEFT more on either side.
};

// A warp's two columns of a tile.
struct alignas(16) StripOwnColumns {
  static constexpr u32 FIRST = 1, SECOND = 2, PAIR = 4;
  int column;     // the first, of the map
  u32 flags;      // whether it sums up the first, and the second; pairs of columns that they see, or are seen from
  int tables[2];  // of queries: Table::table_offset
};

// One strip of one map.
template <class Config>
struct StripBackwardWalk {
  int number, batch, first_tile, tiles;

  FASTNA_DEVICE explicit StripBackwardWalk(int number_) : number(number_) {}
  // False where there is none of this number. Strips of a map are dealt out in turn, a map at a time: they may differ in width.
  FASTNA_DEVICE bool find(const HopperStripBackwardArguments& args) {
    if (number >= args.walks) return false;
    const u32 strips = args.strips, whole = static_cast<u32>(number) / strips, strip = (number + whole) % strips;
    batch = static_cast<int>(whole);
    first_tile = static_cast<int>(strip * args.tiles / strips);
    tiles = static_cast<int>((strip + 1) * args.tiles / strips) - first_tile;
    return true;
  }
  // Of its row blocks.
  FASTNA_DEVICE int first_column(int columns) const { return minimum(first_tile * TILE_SIDE, columns - TILE_SIDE) - Config::LEFT; }
};

// A tile: its first column, and those whose gradients it is to sum up.
struct StripOwnTile {
  int first;
  Interval own;
};
template <int WINDOW_COLUMNS>
FASTNA_DEVICE StripOwnTile strip_tile(bool keys, int tile, int tiles, int columns) {
  int last_begin = (tiles - 1) * TILE_SIDE;
  if (keys) last_begin = minimum(last_begin, columns - WINDOW_COLUMNS);
  if (tile == tiles - 1) return {columns - TILE_SIDE, {last_begin, columns}};
  return {tile * TILE_SIDE, {tile * TILE_SIDE, minimum((tile + 1) * TILE_SIDE, last_begin)}};
}

}  // namespace fastna
