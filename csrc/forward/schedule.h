// Decisions that the host takes once a call.
#pragma once

#include <algorithm>

#include "params.h"

namespace fa3 {

// What a tile shape is chosen for: kShort are sequences of which a tile sees few keys (benchmarks/LOG.md, 19, 24, 46 and 93);
// kNarrow those of which a query sees few keys wherever it stands (62).
enum class Sequences { kLong, kShort, kNarrow };

// Of a sequence. NOTE: how long each of several ranges is, only the device knows; the host knows the mean.
struct MeanExtents {
  int64_t sequences, queries, keys;
  int64_t seen;  // keys that a query sees at most; of a window, beside its own
};

inline MeanExtents mean_extents(const ForwardParams& params) {
  const int ranges = params.q_start == nullptr ? 1 : std::max(params.ranges, 1);
  const int64_t keys = params.seqlen_k / ranges;
  const bool is_window = params.window_left != kNoBound && params.window_right != kNoBound;
  return {int64_t{params.batch} * ranges, params.seqlen_q / ranges, keys,
          is_window ? std::min(keys, int64_t{params.window_left} + params.window_right) : keys};
}

// Whether sequences are kNarrow, for kernels that make a difference: short windows, or documents that are mostly very short.
inline bool are_narrow(const ForwardParams& params) {
  constexpr int64_t kWidestWindow = 2048, kShortestDocument = 128;
  if (params.window_right == kNoBound) return false;
  const MeanExtents mean = mean_extents(params);
  return (params.q_start != nullptr && mean.keys <= kShortestDocument) ||
         (mean.seen <= kWidestWindow && mean.seen < mean.keys);
}

// Query heads of a KV head whose rows share a tile: all of them where the queries alone would leave tiles under-filled,
// else 1.
inline int heads_per_tile(const ForwardParams& params, int tile_queries) {
  const int group = params.heads / params.kv_heads;
  if (group > tile_queries) return 1;
  const int64_t queries = mean_extents(params).queries;
  const auto tiles = [&](int heads, int64_t rows) { return (queries + rows - 1) / rows * (params.heads / heads); };
  return tiles(group, tile_queries / group) < tiles(1, tile_queries) ? group : 1;
}

// Whether two teams, each on 128 queries of its own, are faster than one on 192 (forward_tile of head_dim 64).
inline bool teams_are_faster(const ForwardParams& params) {
  constexpr int64_t kProcessors = 132, kFewKeys = 1024, kManyKeys = 8192, kManyTiles = 6 * kProcessors;
  const MeanExtents mean = mean_extents(params);
  const auto tiles = [&](int queries) {
    const int heads = heads_per_tile(params, queries);
    const int64_t rows = queries / heads;
    return (mean.queries + rows - 1) / rows * mean.sequences * (params.heads / heads);
  };
  if (params.window_right != kNoBound || params.window_left != kNoBound) {
    // Two tiles of a processor take twice as long each: where there are few, the last ones are waited for.
    return mean.seen <= kFewKeys || (mean.seen <= kManyKeys && tiles(128) >= kManyTiles);
  }
  if (params.q_start != nullptr) return mean.keys <= kFewKeys;
  // Tiles are equal: all of them take as long as the rounds in which the processors work them off. At the same number of rows
  // teams are a little slower.
  const auto rows = [&](int queries, int64_t teams) {
    const int64_t at_a_time = kProcessors * teams;
    return (tiles(queries) + at_a_time - 1) / at_a_time * teams * queries;
  };
  return 1.03 * rows(128, 2) <= rows(192, 1);
}

inline Sequences sequences_of(const ForwardParams& params) {
  const MeanExtents mean = mean_extents(params);
  const bool is_short = params.head_dim <= 64    ? teams_are_faster(params)
                        : params.head_dim <= 192 ? mean.keys <= (params.window_right == kNoBound ? 512 : 1024)
                                                 : mean.seen <= 8192;
  return is_short ? Sequences::kShort : Sequences::kLong;
}

// Whether a launch's tiles are listed on the device beforehand: those of several ranges. Those of a single one follow from its
// length, which blocks read for themselves.
inline __host__ __device__ bool lists_tiles(const ForwardParams& params) {
  return params.q_start != nullptr && params.ranges != 1;
}

// Units (heads_per_tile query heads each) that are walked together: as few as still balance the blocks' work, so that the
// next units' K and V come from memory while these are computed; and no more than half of the L2 cache holds.
inline __host__ __device__ int units_per_group(const ForwardParams& params, int heads_in_tile, int64_t seqlen_k,
                                               int64_t tiles_per_unit) {
  constexpr int64_t kCacheBytes = 24 << 20;
  // A tile a processor: tiles of masked sequences differ in length, and the longest of a group come first.
  const int64_t tiles = params.window_left == kNoBound && params.window_right == kNoBound ? 64 : 128;
  const int64_t bytes = seqlen_k * (params.head_dim + params.head_dim_v) * 2;
  const int64_t in_cache = bytes > 0 && bytes < kCacheBytes ? kCacheBytes / bytes : 1;
  const int64_t units_per_kv_head = params.heads / params.kv_heads / heads_in_tile;
  const int64_t per_kv_head = tiles_per_unit * units_per_kv_head;
  const int64_t balanced = per_kv_head == 0 ? 1 : (tiles + per_kv_head - 1) / per_kv_head;
  const int64_t kv_heads = balanced < in_cache ? balanced : in_cache;
  const int64_t units = int64_t{params.heads / heads_in_tile} * params.batch;
  return static_cast<int>(kv_heads * units_per_kv_head < units ? kv_heads * units_per_kv_head : units);
}

// Units that the last group of listed tiles needs at least: as many as occupy all processors for as long as its longest tile,
// with which it begins, occupies one. `visited`: blocks of keys that the tiles of a unit visit, and the longest of them.
inline __host__ __device__ int least_last_units(int64_t visited, int64_t tiles, int64_t longest) {
  constexpr int64_t kProcessors = 132;
  const int64_t unit = visited + tiles;  // a tile's start and end take about as long as a block
  return unit == 0 ? 0 : static_cast<int>((kProcessors * (longest + 1) + unit - 1) / unit);  // at most kProcessors
}

constexpr int kHeaderElements = 8;   // int32 elements of a ScheduleHeader
constexpr int kRecordElements = 12;  // and of a TileRecord

// int32 elements of ForwardParams::workspace, for a list of so many tiles.
constexpr int64_t workspace_elements(int64_t records) { return kHeaderElements + kRecordElements * records; }

// Tiles that ranges of disjoint queries have at most, of any shape.
inline int64_t most_records(int64_t seqlen_q, int64_t heads, int64_t kv_heads, int64_t ranges) {
  constexpr int64_t kSmallestTile = 64;
  const int64_t queries = std::max<int64_t>(1, kSmallestTile / (heads / kv_heads));
  return seqlen_q / queries + ranges;
}
inline int64_t most_records(const ForwardParams& params) {
  return most_records(params.seqlen_q, params.heads, params.kv_heads, params.ranges);
}

}  // namespace fa3
