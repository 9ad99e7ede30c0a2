// What a block of the strip backward pass keeps in shared memory, and how it brings it there.
//
// A block walks down a column tile of a map (one dilation group of one head), a few rows a step. Two rings hold the rows that the
// step needs, halo included, so that every row is read once per walk:
//   ring 0: [row % ring_rows][column] key | value          ring 1: [row % ring_rows][column] query | gradient of the output
// and beside them, per token, what turns a score into its gradient: lse in base 2, and
//   delta = sum(grad_output * output) - grad_lse.
//
// A token's 16-byte chunks are permuted by (column ^ slot) & 7, slot = row % ring_rows: both eight columns of one row (the right
// operand of a product) and eight rows of one column (the left one) touch every bank once. The second tensor of a token lies at
// the address of the first with one bit flipped.
#pragma once

#include "fastna/strip_layout.cuh"

namespace fastna {

enum StripTensor : int { QUERY, KEY, VALUE, OUTPUT, GRAD_OUTPUT, GRAD_QUERY, GRAD_KEY, GRAD_VALUE, STRIP_TENSORS };

struct StripBackwardArguments {
  TensorArguments tensors[STRIP_TENSORS];
  const float* lse;       // [batch, rows, columns, heads]
  const float* grad_lse;  // likewise, or null
  const void* rpb;        // [heads, 2 k_rows - 1, 2 k_columns - 1]
  float* grad_rpb;        // [blocks of a head, heads, 2 k_rows - 1, 2 k_columns - 1]: a part per block
  Geometry geometry;
  StripGrid grid;             // its strips are chunks: what a block walks
  int step_rows, chunk_rows;  // rows of a step (at most 8), and of a chunk
  int tile_columns;
  int ring_rows, pitch;  // what a ring holds: rows, and columns of each
  float scale_log2;      // scale * log2(e)
  int walk_rows;         // most rows that a walk meets, its halo and one more included; even
};

template <class T_, class Rpb_, int HEAD_DIM_, int WINDOW_ROWS_, int WINDOW_COLUMNS_, int WARPS_, bool HAS_RPB_, bool RPB_GRADIENT_>
struct StripBackwardConfig {
  using T = T_;
  using Rpb = Rpb_;
  static constexpr int HEAD_DIM = HEAD_DIM_, WINDOW_ROWS = WINDOW_ROWS_, WINDOW_COLUMNS = WINDOW_COLUMNS_, WARPS = WARPS_;
  static constexpr bool HAS_RPB = HAS_RPB_, RPB_GRADIENT = RPB_GRADIENT_;
  static_assert(HEAD_DIM == 32 || HEAD_DIM == 64, "the swizzle needs two tensors of 4 or 8 chunks");
  static_assert(!RPB_GRADIENT || 2 * WINDOW_ROWS - 1 <= 16, "the bias gradient sums its row offsets in one matrix product");

  static constexpr int K_STEPS = HEAD_DIM / 16;
  static constexpr int CHUNKS = HEAD_DIM / 8;
  static constexpr int TOKEN = HEAD_DIM * 4;     // bytes of two tensors' token
  static constexpr u32 SECOND = HEAD_DIM * 2;    // the bit that leads from the first tensor's chunk to the second's
  // Lines of the bias that a product may start from, whether in the window or not: 8 rows against what they need and one row more.
  static constexpr int BIAS_LINES_BEFORE = 8;
  static constexpr int BIAS_LINES = 2 * WINDOW_ROWS - 1 + 2 * BIAS_LINES_BEFORE;
  static constexpr int BIAS_LINE = 2 * WINDOW_COLUMNS + 1;  // odd: lines start in different banks
  static constexpr int OFFSETS = (2 * WINDOW_ROWS - 1) * (2 * WINDOW_COLUMNS - 1);
};

// Where a block's map lies in the gradients, which share one layout.
struct StripGradientPlace {
  i64 origin;
  int row, column;
};

// The axis of a strip problem inside a dilation group.
template <int WINDOW>
struct SlidingAxis {
  static constexpr int window = WINDOW, stride = 1, dilation = 1;
  static constexpr bool causal = false;
};

// What products ask of the window arithmetic, answered once for all warps: per step what depends on rows ...
struct alignas(16) StripStep {
  struct Row {
    u32 left, statistics;  // row place, see StripBackwardMemory
    u32 keys, queries;     // right rows in reach; the highest bit is the sweep's first row
  };
  struct Sweep {
    int place, rows, offset, unused;  // first row place, row count, first right row counted from the step's first
  };
  Row rows[8];
  Sweep keys, queries;
};
// ... and per block what depends on columns: a pair of left columns meets 8 right columns at a time, at most twice.
struct alignas(16) StripSweep {
  int stored, upper, lower, more;  // first right column, and the left ones, counted from the first stored; whether another sweep follows
  uint2 masks[4];                  // per lane q, for the upper and the lower column: the right columns 2 q (low half) and 2 q + 1 in reach
};
constexpr int SWEEPS = 2;
static_assert(sizeof(StripStep) == 160 && sizeof(StripSweep) == 48, "the host counts as many bytes");

// Where things begin in dynamic shared memory; kernels/cuda/strip_backward.py adds up the same sizes.
template <class Config>
struct StripBackwardMemory {
  u8* start;
  int ring_bytes, tokens, row_count;

  FASTNA_DEVICE explicit StripBackwardMemory(const StripBackwardArguments& args)
      : start(dynamic_shared<u8>()), ring_bytes(args.ring_rows * args.pitch * Config::TOKEN), tokens(args.ring_rows * args.pitch), row_count(args.walk_rows) {}
  // The block's map in each operand: worked out once, and too many to keep in registers.
  FASTNA_DEVICE MapView<typename Config::T>* views() const { return reinterpret_cast<MapView<typename Config::T>*>(row_places() + row_count); }
  FASTNA_DEVICE MapView<typename Config::T> view(StripTensor tensor) const { return views()[tensor]; }
  // The same for all gradients: offset of position (0, 0) from the tensor's start, and strides.
  FASTNA_DEVICE StripGradientPlace* gradient_place() const { return reinterpret_cast<StripGradientPlace*>(views() + GRAD_QUERY); }
  FASTNA_DEVICE MapView<const float>* lse_view() const { return reinterpret_cast<MapView<const float>*>(gradient_place() + 1); }
  template <class Walk>
  FASTNA_DEVICE Walk* walk() const {
    static_assert(sizeof(Walk) <= 64, "the host counts 64 bytes");
    return reinterpret_cast<Walk*>(lse_view() + 1);
  }
  // One for even and one for odd steps: the next is written while some warps still use the last.
  FASTNA_DEVICE StripStep* step(int parity) const { return reinterpret_cast<StripStep*>(reinterpret_cast<u8*>(lse_view() + 1) + 64) + parity; }
  // Of a pair of columns: as queries (phase 0) or as keys (1).
  FASTNA_DEVICE StripSweep* sweeps(int pair, int phase) const {
    return reinterpret_cast<StripSweep*>(step(2)) + (pair * 2 + phase) * SWEEPS;
  }
  // Ring 0 or 1, in the shared address space.
  FASTNA_DEVICE u32 ring(int index) const { return shared_address(start) + index * ring_bytes; }
  // (lse in base 2, delta) of a token.
  FASTNA_DEVICE u8* statistics_bytes() const { return start + 2 * ring_bytes; }
  FASTNA_DEVICE float2* statistics() const { return reinterpret_cast<float2*>(statistics_bytes()); }
  FASTNA_DEVICE float4* bias() const { return reinterpret_cast<float4*>(start + 2 * ring_bytes + round_up(tokens * 8, 16)); }
  FASTNA_DEVICE float* bias_gradient() const {
    return reinterpret_cast<float*>(bias() + (Config::HAS_RPB ? Config::BIAS_LINES * Config::BIAS_LINE : 0));
  }
  // Per row of the walk, from the one before the first: its offset in a ring with the swizzle in bits 4 to 6, and that of its statistics.
  FASTNA_DEVICE uint2* row_places() const {
    return reinterpret_cast<uint2*>(bias_gradient() + (Config::RPB_GRADIENT ? round_up(Config::WARPS * Config::OFFSETS, 4) : 0));
  }
};

// A block's part of the map: it owns the gradients of `rows` x `columns`, and stores `stored_columns` of the columns around them.
template <class Config>
struct StripBackwardWalk {
  StripPlace place;
  Interval rows, columns, stored_columns;
  int first_row;  // the first that is ever stored

  using RowAxis = SlidingAxis<Config::WINDOW_ROWS>;
  using ColumnAxis = SlidingAxis<Config::WINDOW_COLUMNS>;

  FASTNA_DEVICE explicit StripBackwardWalk(const StripBackwardArguments& args)
      : place(strip_place(block_index(), args.geometry, args.grid)) {
    rows.begin = place.strip * args.chunk_rows;
    rows.end = minimum(rows.begin + args.chunk_rows, place.rows);
    columns.begin = place.tile * args.tile_columns;
    columns.end = minimum(columns.begin + args.tile_columns, place.columns);
    if (is_empty()) return;
    const Interval keys = keys_of_columns(columns), queries = queries_of_columns(columns);
    stored_columns = {minimum(keys.begin, queries.begin), maximum(keys.end, queries.end)};
    first_row = needed_rows({rows.begin, rows.begin + 1}).begin;
  }
  // Shorter dilation groups need fewer blocks than the longest.
  FASTNA_DEVICE bool is_empty() const { return rows.begin >= rows.end || columns.begin >= columns.end; }

  // Hulls of what the queries (or keys) of some rows or columns need.
  FASTNA_DEVICE Interval keys_of_rows(Interval own) const {
    return {window_at(RowAxis{}, own.begin, place.rows).begin, window_at(RowAxis{}, own.end - 1, place.rows).end};
  }
  FASTNA_DEVICE Interval queries_of_rows(Interval own) const {
    return {queries_at(RowAxis{}, own.begin, place.rows).begin, queries_at(RowAxis{}, own.end - 1, place.rows).end};
  }
  FASTNA_DEVICE Interval needed_rows(Interval own) const {
    const Interval keys = keys_of_rows(own), queries = queries_of_rows(own);
    return {minimum(keys.begin, queries.begin), maximum(keys.end, queries.end)};
  }
  FASTNA_DEVICE Interval keys_of_columns(Interval own) const {
    return {window_at(ColumnAxis{}, own.begin, place.columns).begin, window_at(ColumnAxis{}, own.end - 1, place.columns).end};
  }
  FASTNA_DEVICE Interval queries_of_columns(Interval own) const {
    return {queries_at(ColumnAxis{}, own.begin, place.columns).begin, queries_at(ColumnAxis{}, own.end - 1, place.columns).end};
  }
  // The same rows and, where their number is odd, the one before: products take rows in twos. In that row's place in a ring is
  // whatever was there last, and nothing is on its way to it.
  FASTNA_DEVICE static Interval whole_pairs(Interval rows) { return {rows.begin - (rows.size() & 1), rows.end}; }
  FASTNA_DEVICE Interval step(int row, int step_rows) const { return {row, minimum(row + step_rows, rows.end)}; }
};

template <class Config>
struct StripBackwardLoader {
  using T = typename Config::T;
  const StripBackwardArguments& args;
  const StripBackwardWalk<Config>& walk;
  const StripBackwardMemory<Config>& memory;

  FASTNA_DEVICE void fill_views() const {
    const int tensor = thread_index();
    if (tensor < GRAD_QUERY) {
      memory.views()[tensor] = map_view<T>(args.tensors[tensor], args.geometry, walk.place, walk.place.batch, walk.place.head);
    } else if (tensor == GRAD_QUERY) {
      const MapView<T> view = map_view<T>(args.tensors[GRAD_QUERY], args.geometry, walk.place, walk.place.batch, walk.place.head);
      *memory.gradient_place() = {view.origin - static_cast<T*>(args.tensors[GRAD_QUERY].data), view.row, view.column};
    } else if (tensor == GRAD_QUERY + 1) {
      const AxisArguments &row_axis = args.geometry.axis[1], &column_axis = args.geometry.axis[2];
      const int heads = args.geometry.heads, width = column_axis.length;
      const i64 row = static_cast<i64>(walk.place.batch) * row_axis.length + walk.place.row_group;
      const float* origin = args.lse + (row * width + walk.place.column_group) * heads + walk.place.head;
      *memory.lse_view() = {origin, width * heads * row_axis.dilation, heads * column_axis.dilation};
    }
  }

  FASTNA_DEVICE void fill_row_places() const {
    const int count = walk.needed_rows({walk.rows.end - 1, walk.rows.end}).end - walk.first_row + 1;
    for (int i = thread_index(); i < count; i += Config::WARPS * WARP) {
      const u32 slot = (walk.first_row - 1 + i + args.ring_rows) % args.ring_rows;
      memory.row_places()[i] = {slot * args.pitch * Config::TOKEN + (slot & 7) * 16, slot * args.pitch * 8};
    }
  }

  // What the products of the step with rows `own` need to know: the work of a few lanes of the last warp.
  FASTNA_DEVICE void fill_step(StripStep& step, Interval own) const {
    const int g = thread_index() - (Config::WARPS - 1) * WARP;
    if (g < 0 || g >= 8) return;
    using Walk = StripBackwardWalk<Config>;
    const Interval keys = Walk::whole_pairs(walk.keys_of_rows(own)), queries = Walk::whole_pairs(walk.queries_of_rows(own));
    const int row = minimum(own.begin + g, own.end - 1);
    const uint2 place = place_of(row);
    const auto bits = [&](Interval reach, Interval sweep) {
      return own.begin + g < own.end ? ((1u << reach.size()) - 1) << (32 - (reach.end - sweep.begin)) : 0;
    };
    step.rows[g] = {place.x, place.y, bits(walk.keys_of_rows({row, row + 1}), keys), bits(walk.queries_of_rows({row, row + 1}), queries)};
    if (g == 0) {
      step.keys = {keys.begin - walk.first_row + 1, keys.size(), keys.begin - own.begin, 0};
      step.queries = {queries.begin - walk.first_row + 1, queries.size(), queries.begin - own.begin, 0};
    }
  }

  // Keys take their columns and those of their queries backwards: offsets are key - query, so that the bias then comes in the order
  // in which the queries want it.
  FASTNA_DEVICE void fill_sweeps() const {
    const int pairs = ceil_div(walk.columns.size(), QUERY_COLUMNS), origin = walk.stored_columns.begin;
    for (int i = thread_index(); i < pairs * 2 * 4; i += Config::WARPS * WARP) {
      const int pair = i / 8, phase = i / 4 % 2, q = i % 4;
      const int column = walk.columns.begin + pair * QUERY_COLUMNS, second = minimum(column + 1, walk.columns.end - 1);
      const Interval first = phase == 0 ? walk.keys_of_columns({column, column + 1}) : walk.queries_of_columns({column, column + 1});
      const Interval last = phase == 0 ? walk.keys_of_columns({second, second + 1}) : walk.queries_of_columns({second, second + 1});
      for (int n = 0; n < SWEEPS; ++n) {
        const int begin = first.begin + n * KEY_COLUMNS, end = last.end;
        const int stored = minimum(begin - origin, args.pitch - KEY_COLUMNS);
        const int low = stored + origin + (phase == 0 ? 2 * q : 7 - 2 * q), high = phase == 0 ? low + 1 : low - 1;
        const auto bits = [=](Interval reach) {
          const Interval visible = {maximum(reach.begin, begin), reach.end};  // not twice
          return (visible.contains(low) ? 0xffffu : 0u) | (visible.contains(high) ? 0xffff0000u : 0u);
        };
        StripSweep& sweep = memory.sweeps(pair, phase)[n];
        const u32 of_first = bits(first), of_last = second == column && phase == 0 ? 0 : bits(last);
        sweep.masks[q] = phase == 0 ? uint2{of_first, of_last} : uint2{of_last, of_first};
        if (q == 0) {
          sweep.stored = stored;
          sweep.upper = (phase == 0 ? column : second) - origin;
          sweep.lower = (phase == 0 ? second : column) - origin;
          sweep.more = begin + KEY_COLUMNS < end;
        }
      }
    }
  }

  // Entry x = key column - query column, of the left query (or key) of a pair and its neighbour: bias[x, x + 1, x - 1, x] / scale.
  FASTNA_DEVICE void fill_bias() const {
    const auto* rpb = static_cast<const typename Config::Rpb*>(args.rpb) + walk.place.head * Config::OFFSETS;
    const float inverse_scale = 1.0f / args.geometry.scale;
#pragma unroll 1
    for (int i = thread_index(); i < Config::BIAS_LINES * Config::BIAS_LINE; i += Config::WARPS * WARP) {
      const int line = i / Config::BIAS_LINE - Config::BIAS_LINES_BEFORE, x = i % Config::BIAS_LINE - Config::WINDOW_COLUMNS;
      const auto one = [=](int offset) {
        const int index = offset + Config::WINDOW_COLUMNS - 1;
        if (line < 0 || line > 2 * Config::WINDOW_ROWS - 2 || index < 0 || index > 2 * Config::WINDOW_COLUMNS - 2) return 0.0f;
        return to_float(load_readonly(rpb + line * (2 * Config::WINDOW_COLUMNS - 1) + index)) * inverse_scale;
      };
      memory.bias()[i] = {one(x), one(x + 1), one(x - 1), one(x)};
    }
  }

  // What is multiplied but no copy ever fills becomes zero: what a mask will suppress must not be NaN, since 0 x NaN is NaN.
  FASTNA_DEVICE void clear_rings() const {
    const int size = 2 * memory.ring_bytes / 16;
#pragma unroll 1
    for (int i = thread_index(); i < size; i += Config::WARPS * WARP) reinterpret_cast<uint4*>(memory.start)[i] = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = thread_index(); i < memory.tokens; i += Config::WARPS * WARP) memory.statistics()[i] = {0.0f, 0.0f};
  }

  // Issues the copies of some rows, a warp a row: a lane takes the same chunk of every STEP-th token.
  FASTNA_DEVICE void issue(Interval rows) const {
    constexpr int STEP = WARP / Config::CHUNKS;
    static_assert(STEP == 8 || STEP == 4, "the swizzle follows from one token to the next by at most one flipped bit");
    const MapView<T> key = memory.view(KEY), value = memory.view(VALUE), query = memory.view(QUERY), grad = memory.view(GRAD_OUTPUT);
    const int chunk = lane_index() % Config::CHUNKS, first = lane_index() / Config::CHUNKS;
    const int column = walk.stored_columns.begin + first;
    for (int row = rows.begin + warp_index(); row < rows.end; row += Config::WARPS) {
      u32 at = (memory.ring(0) + place_of(row).x + first * Config::TOKEN) ^ ((chunk ^ (first & 7)) << 4);
      const T *from_key = key.at(row, column) + chunk * 8, *from_value = value.at(row, column) + chunk * 8;
      const T *from_query = query.at(row, column) + chunk * 8, *from_grad = grad.at(row, column) + chunk * 8;
#pragma unroll 1
      for (int left = walk.stored_columns.size() - first; left > 0; left -= STEP) {
        copy_async<16>(at, from_key, true);
        copy_async<16>(at ^ Config::SECOND, from_value, true);
        copy_async<16>(at + memory.ring_bytes, from_query, true);
        copy_async<16>((at ^ Config::SECOND) + memory.ring_bytes, from_grad, true);
        at = (at + STEP * Config::TOKEN) ^ (STEP & 4) << 4;
        from_key += STEP * key.column, from_value += STEP * value.column;
        from_query += STEP * query.column, from_grad += STEP * grad.column;
      }
    }
    commit_copies();
  }

  // Waits for the thread's copies and computes the statistics of the same rows: a thread reads the chunks that it copied itself. The
  // first loads of the output are under way while it waits.
  FASTNA_DEVICE void finish(Interval rows) const {
    constexpr int BATCH = 4, STEP = WARP / Config::CHUNKS;
    const MapView<T> output = memory.view(OUTPUT);
    const MapView<const float> lse_view = *memory.lse_view();
    const int chunk = lane_index() % Config::CHUNKS, first = lane_index() / Config::CHUNKS;
    const int columns = walk.stored_columns.size();
    for (int row = rows.begin + warp_index(); row < rows.end; row += Config::WARPS) {
      const uint2 place = place_of(row);
      const T* source = output.at(row, walk.stored_columns.begin + first) + chunk * 8;
      const float* lse_source = lse_view.at(row, walk.stored_columns.begin + first);
      u32 at = (place.x + first * Config::TOKEN) ^ ((chunk ^ (first & 7)) << 4);
      float2* statistics = reinterpret_cast<float2*>(memory.statistics_bytes() + place.y);
#pragma unroll 1
      for (int base = first; any_in_warp(base < columns); base += BATCH * STEP) {
        uint4 values[BATCH];
        float lse[BATCH];
        FASTNA_UNROLL
        for (int n = 0; n < BATCH; ++n) {
          values[n] = {0, 0, 0, 0};
          lse[n] = 0.0f;
          if (base + n * STEP < columns) {
            values[n] = load_readonly(reinterpret_cast<const uint4*>(source));
            lse[n] = load_readonly(lse_source);
          }
          source += STEP * output.column;
          lse_source += STEP * lse_view.column;
        }
        wait_copies<0>();
        FASTNA_UNROLL
        for (int n = 0; n < BATCH; ++n) {
          const int column = base + n * STEP;
          const bool valid = column < columns;
          float delta = 0.0f;
          if (valid) {
            const uint4 grad = *reinterpret_cast<const uint4*>(memory.start + memory.ring_bytes + (at ^ Config::SECOND));
            delta = add_dot(values[n].x, grad.x, add_dot(values[n].y, grad.y, 0.0f));
            delta = add_dot(values[n].z, grad.z, add_dot(values[n].w, grad.w, delta));
          }
          at = (at + STEP * Config::TOKEN) ^ (STEP & 4) << 4;
          FASTNA_UNROLL
          for (int distance = 1; distance < Config::CHUNKS; distance *= 2) delta += shuffle_xor(delta, distance);
          if (valid && chunk == 0) {
            if (args.grad_lse != nullptr) {
              delta -= load_readonly(args.grad_lse + (lse_view.at(row, walk.stored_columns.begin + column) - args.lse));
            }
            statistics[column] = {lse[n] * LOG2_E, delta};
          }
        }
      }
    }
  }

 private:
  FASTNA_DEVICE static float add_dot(u32 a, u32 b, float sum) {
    const float2 x = unpack2<T>(a), y = unpack2<T>(b);
    return x.x * y.x + (x.y * y.y + sum);
  }
  FASTNA_DEVICE uint2 place_of(int row) const { return memory.row_places()[row - walk.first_row + 1]; }
};

}  // namespace fastna
