// Tiles of the `gemm` method: 64 queries or keys that form a box inside one dilation group, against the box of the keys or queries that
// any of them meets, taken in runs. Boxes start anywhere and need not be multiples of anything; runs cut them in linear order.
#pragma once

#include "fastna/weights.cuh"

namespace fastna {

constexpr int GEMM_TILE = 64;        // queries or keys of a tile
constexpr int GEMM_THREADS = 128;    // four warps, 16 rows of the tile each
constexpr int GEMM_RUN = 32;         // tokens over which the two sums go, at a time
constexpr int GEMM_DEPTH = 32;       // channels over which the scores' sum goes, at a time

// Tiles along each axis: their box, and how many cover the longest dilation group.
struct GemmTiles {
  int shape[3], count[3];
};

struct GemmTile {
  int batch, head, part;    // part: of the channels
  Point group, first, size;
  int length[3];            // of the dilation groups
  bool empty;               // beyond a group shorter than the longest
};

// Parts fastest, then heads (neighbours in memory), tiles, groups, batch.
template <int RANK>
FASTNA_DEVICE GemmTile tile_of_block(const Geometry& geometry, const GemmTiles& tiles, int heads, int parts) {
  GemmTile tile;
  u32 rest = block_index();
  const auto take = [&](int count) {
    const u32 quotient = rest / static_cast<u32>(count), digit = rest - quotient * count;
    rest = quotient;
    return static_cast<int>(digit);
  };
  tile.part = take(parts);
  tile.head = take(heads);
  tile.group = tile.first = {{0, 0, 0}};
  tile.size = {{1, 1, 1}};
  tile.length[0] = tile.length[1] = tile.length[2] = 1;
  tile.empty = false;
  FASTNA_UNROLL
  for (int i = 2; i >= 3 - RANK; --i) tile.first.at[i] = take(tiles.count[i]) * tiles.shape[i];
  FASTNA_UNROLL
  for (int i = 2; i >= 3 - RANK; --i) {
    tile.group.at[i] = take(geometry.axis[i].dilation);
    tile.length[i] = group_length(geometry.axis[i], tile.group.at[i]);
    tile.size.at[i] = minimum(tiles.shape[i], tile.length[i] - tile.first.at[i]);
    tile.empty |= tile.size.at[i] <= 0;
  }
  tile.batch = static_cast<int>(rest);
  return tile;
}

template <int RANK>
FASTNA_DEVICE int volume(const Point& size) {
  int product = size.at[2];
  if constexpr (RANK > 1) product *= size.at[1];
  if constexpr (RANK > 2) product *= size.at[0];
  return product;
}

// The `index`-th position of a box, in linear order.
template <int RANK>
FASTNA_DEVICE Point position_in(const Point& begin, const Point& size, int index) {
  Point position = unravel<RANK>(index, size.at[1], size.at[2]);
  FASTNA_UNROLL
  for (int i = 3 - RANK; i < 3; ++i) position.at[i] += begin.at[i];
  return position;
}

// Keys that the tile's queries see. Windows begin and end in the order of their queries, so the first and the last bound them all.
template <int RANK>
FASTNA_DEVICE Box keys_of_tile(const Geometry& geometry, const GemmTile& tile) {
  Box box = {{{0, 0, 0}}, {{1, 1, 1}}};
  FASTNA_UNROLL
  for (int i = 3 - RANK; i < 3; ++i) {
    const int first = tile.first.at[i], last = first + tile.size.at[i] - 1;
    box.begin.at[i] = window_at(geometry.axis[i], first, tile.length[i]).begin;
    box.size.at[i] = window_at(geometry.axis[i], last, tile.length[i]).end - box.begin.at[i];
  }
  return box;
}

// Queries that see the tile's keys: in order too.
template <int RANK>
FASTNA_DEVICE Box queries_of_tile(const Geometry& geometry, const GemmTile& tile) {
  Box box = {{{0, 0, 0}}, {{1, 1, 1}}};
  FASTNA_UNROLL
  for (int i = 3 - RANK; i < 3; ++i) {
    const int first = tile.first.at[i], last = first + tile.size.at[i] - 1;
    box.begin.at[i] = queries_at(geometry.axis[i], first, tile.length[i]).begin;
    box.size.at[i] = queries_at(geometry.axis[i], last, tile.length[i]).end - box.begin.at[i];
  }
  return box;
}

// A query of a product. Where the query is beyond its tile its window is empty.
struct GemmQuery {
  const void* data;      // its channels
  i64 weights;           // offset of its row of weights
  Point begin, size;     // its window
  int column, entry;     // column of a key's weight: key.column - column; its bias: key.entry - entry
  float statistic;       // see score_value
  int unused;
};

// A key of a product. A missing one is at position -1, in no window; an additional one has the column itself and no position.
struct GemmKey {
  const void* data;
  Point position;
  int column, entry;
  int unused;
};

static_assert(sizeof(GemmQuery) == 56 && sizeof(GemmKey) == 32, "kernels/cuda/gemm.py counts their shared memory");

template <int RANK>
FASTNA_DEVICE GemmQuery query_at(const Geometry& geometry, const GemmTile& tile, const Point& position, i64 pitch,
                                 int head) {
  GemmQuery query;
  const Box window = window_box<RANK>(geometry, tile.group, position);
  const Point token = token_point<RANK>(geometry, tile.group, position);
  query.begin = window.begin;
  query.size = window.size;
  query.weights = row_index(geometry, tile.batch, token_index<RANK>(geometry, token), geometry.heads, head) * pitch;
  query.column = window_column<RANK>(geometry, window.begin);
  Point offset = {{0, 0, 0}};
  FASTNA_UNROLL
  for (int i = 3 - RANK; i < 3; ++i) offset.at[i] = position.at[i] - (geometry.axis[i].window - 1);
  query.entry = bias_entry<RANK>(geometry, offset);
  query.statistic = 0.f;
  query.data = nullptr;
  return query;
}

FASTNA_DEVICE GemmQuery no_query() {
  GemmQuery query;
  query.data = nullptr;
  query.weights = 0;
  query.begin = query.size = {{0, 0, 0}};
  query.column = query.entry = 0;
  query.statistic = 0.f;
  return query;
}

template <int RANK>
FASTNA_DEVICE GemmKey key_at(const Geometry& geometry, const Point& position) {
  GemmKey key;
  key.data = nullptr;
  key.position = position;
  key.column = window_column<RANK>(geometry, position);
  key.entry = bias_entry<RANK>(geometry, position);
  return key;
}

FASTNA_DEVICE GemmKey no_key() {
  GemmKey key;
  key.data = nullptr;
  key.position = {{-1, -1, -1}};
  key.column = key.entry = 0;
  return key;
}

// The key numbered `index` of what a query tile meets: its window runs, then runs of additional keys.
template <class T, int RANK>
FASTNA_DEVICE GemmKey key_of_run(const Geometry& geometry, const GemmTile& tile, const Box& keys, int index, bool additional,
                                 const TensorArguments& tensor, const TensorArguments& additional_tensor, int key_head) {
  if (additional) {
    if (index >= geometry.additional) return no_key();
    GemmKey key = no_key();
    key.position = {{0, 0, 0}};
    key.column = window_size(geometry) + index;
    key.data = additional_at<T>(additional_tensor, tile.batch, index, key_head);
    return key;
  }
  if (index >= volume<RANK>(keys.size)) return no_key();
  const Point position = position_in<RANK>(keys.begin, keys.size, index);
  GemmKey key = key_at<RANK>(geometry, position);
  key.data = channels_at<T>(tensor, tile.batch, token_point<RANK>(geometry, tile.group, position), key_head);
  return key;
}

// Column of the pair's weight in the query's row, or -1 where the query does not see the key.
template <int RANK>
FASTNA_DEVICE int column_of_pair(const GemmQuery& query, const GemmKey& key, bool additional) {
  if (additional) return query.size.at[2] > 0 && key.position.at[2] >= 0 ? key.column : -1;
  return in_box<RANK>(query.begin, query.size, key.position) ? key.column - query.column : -1;
}

// Copies WIDTH channels from `first` on of ROWS rows into a tile, zeros where a row is missing or has no more channels.
// `row_data(row)` gives a row's channels, or null.
template <class T, int ROWS, int WIDTH, int PITCH, class RowData>
FASTNA_DEVICE void copy_rows(T* tile, int first, int channels, const RowData& row_data) {
  constexpr int VECTORS = WIDTH / VECTOR<T>;
  for (int i = thread_index(); i < ROWS * VECTORS; i += GEMM_THREADS) {
    const int row = i / VECTORS, channel = i % VECTORS * VECTOR<T>;
    const T* data = static_cast<const T*>(row_data(row));
    const bool valid = data && first + channel < channels;
    copy_async<16>(shared_address(tile + row * PITCH + channel), valid ? data + first + channel : tile, valid);
  }
}

template <bool FIRST, class A, class B>
struct Select {
  using Type = A;
};
template <class A, class B>
struct Select<false, A, B> {
  using Type = B;
};

// Two neighbouring channels of a row, from the accumulator layout.
template <class T>
FASTNA_DEVICE void store_pair(T* target, float low, float high) {
  if constexpr (sizeof(T) == 4)
    *reinterpret_cast<float2*>(target) = {low, high};
  else
    *reinterpret_cast<u32*>(target) = pack2<T>(low, high);
}

}  // namespace fastna
