// Decisions that the host takes once a call.
#pragma once

#include <algorithm>

#include "params.h"

namespace fa3 {

// What a tile shape is chosen for: kShort are masked sequences of which a tile sees few keys.
enum class Sequences { kLong, kShort };

inline Sequences sequences_of(const ForwardParams& params) {
  const bool masked = params.window_right != kNoBound;
  // NOTE: ranges' lengths are on the device; the mean is all that the host knows.
  const int keys = params.q_start == nullptr ? params.seqlen_k : params.seqlen_k / std::max(params.ranges, 1);
  return masked && keys <= 2048 ? Sequences::kShort : Sequences::kLong;
}

// Query heads of a KV head whose rows share a tile: all of them where the queries alone would leave tiles under-filled,
// else 1.
inline int heads_per_tile(const ForwardParams& params, int tile_queries) {
  const int group = params.heads / params.kv_heads;
  if (group > tile_queries) return 1;
  const int64_t queries = params.q_start == nullptr ? params.seqlen_q : params.seqlen_q / std::max(params.ranges, 1);
  const auto tiles = [&](int heads, int64_t rows) { return (queries + rows - 1) / rows * (params.heads / heads); };
  return tiles(group, tile_queries / group) < tiles(1, tile_queries) ? group : 1;
}

// Units (heads_per_tile query heads each) whose K and V half of the L2 cache holds: they are walked together.
inline __host__ __device__ int units_in_cache(const ForwardParams& params, int heads_in_tile, int64_t seqlen_k) {
  constexpr int64_t kCacheBytes = 24 << 20;
  const int64_t bytes = seqlen_k * (params.head_dim + params.head_dim_v) * 2;
  const int64_t kv_heads = bytes > 0 && bytes < kCacheBytes ? kCacheBytes / bytes : 1;
  const int64_t units_per_kv_head = params.heads / params.kv_heads / heads_in_tile;
  const int64_t units = int64_t{params.heads / heads_in_tile} * params.batch;
  return static_cast<int>(kv_heads * units_per_kv_head < units ? kv_heads * units_per_kv_head : units);
}

// int32 elements of ForwardParams::workspace: enough for every tile shape.
inline int64_t workspace_elements(int64_t seqlen_q, int64_t heads, int64_t kv_heads, int64_t ranges) {
  constexpr int64_t kSmallestTile = 64, kHeaderElements = 8, kRecordElements = 8;
  const int64_t queries = std::max<int64_t>(1, kSmallestTile / (heads / kv_heads));
  return kHeaderElements + kRecordElements * (seqlen_q / queries + ranges);
}

}  // namespace fa3
