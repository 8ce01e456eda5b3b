// Host entries of the backward; defined in backward.cuh, one instance a row of instances.def.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>

#include "forward/schedule.h"
#include "params.h"

namespace fa3 {

// Whether dq has a kernel of its own (query_gradient.cuh), by the row's head_dim: where two products more cost less than
// additions to memory. Gradients are then bitwise equal from run to run; else they are if tiles take turns (turns.cuh).
constexpr bool separates_dq(int64_t head_dim) { return head_dim > 128; }

// Of a range, whose length, where there are several, only the device knows: most of the work is in those longer than the mean.
inline int64_t usual_queries(const ForwardParams& forward) {
  const bool are_several = forward.q_start != nullptr && forward.ranges > 1;
  return are_several ? 2 * int64_t{forward.seqlen_q} / forward.ranges : forward.seqlen_q;
}

// Whether tiles of keys meet blocks of 80 queries instead of 64 (QueryBlocks::kLong): where they meet so many that it
// makes up for what a tile begins and ends with, which takes longer, and for the ends of sequences, which fill no block.
// Measured: benchmarks/LOG.md, backward, 58. Not for fp16, of whose small weights dS would lose what they lose when they are
// rounded (BackwardConfig::kRoundsWeights).
constexpr bool has_long_blocks(DType dtype, int64_t head_dim) { return dtype == DType::bf16 && head_dim == 128; }
inline bool takes_long_blocks(const ForwardParams& forward) {
  constexpr int64_t kLeastOfHead = 1024, kLeast = 2048;
  const bool packed = forward.q_start != nullptr;
  const bool left = forward.window_left != kNoBound, right = forward.window_right != kNoBound;
  int64_t queries = usual_queries(forward);
  if (left && right) {
    queries = std::min<int64_t>(queries, int64_t{forward.window_left} + forward.window_right);
  } else if ((left || right) && !packed) {
    queries /= 2;
  }
  return queries >= kLeastOfHead && queries * (forward.heads / forward.kv_heads) >= kLeast;
}

constexpr int keys_of_tile(int64_t head_dim) { return separates_dq(head_dim) ? 64 : 128; }
inline int64_t key_tiles_of_head(const ForwardParams& forward, int64_t head_dim) {
  const int keys = keys_of_tile(head_dim);
  return (int64_t{forward.seqlen_k} + keys - 1) / keys;
}

// How many queries, of a head, see a key: at most, and on the mean.
struct QueriesOfKey {
  double most;
  double mean;
};

// As far as extents and windows tell.
inline QueriesOfKey queries_of_key(const ForwardParams& forward, int64_t head_dim) {
  const bool left = forward.window_left != kNoBound, right = forward.window_right != kNoBound;
  const int64_t in_window = int64_t{forward.window_left} + forward.window_right + keys_of_tile(head_dim);
  const auto queries = static_cast<double>(left && right ? std::min(usual_queries(forward), in_window) : usual_queries(forward));
  const bool are_alike = (forward.q_start == nullptr || forward.ranges == 1) && left == right;
  return {queries, are_alike ? queries : queries / 2};
}

// In how many parts the query heads of a KV head are taken, each by tiles of its own, whose dk and dv are summed up
// afterwards: where few tiles, each over all queries of its heads, would occupy few processors, or long ones be waited for
// at the end (unless dQ's own kernel begins there). Times are in rows of queries that a tile meets; what they are made of is
// measured: benchmarks/LOG.md, backward, 74 and 75.
inline int key_parts_of(const ForwardParams& forward, int64_t head_dim, const QueriesOfKey& queries, bool accumulate) {
  constexpr double kProcessors = 132, kWorthwhile = 1.08;
  const double first_sum = accumulate ? 40 : 150, sum_of_tile = accumulate ? 1.9 : 3.7;
  const double end_of_head = separates_dq(head_dim) ? 0 : 0.04;  // of the longest tile
  const int group = forward.heads / forward.kv_heads;
  const double tiles = static_cast<double>(key_tiles_of_head(forward, head_dim)) * forward.kv_heads * forward.batch;
  const auto time = [&](int parts) {
    const double longest = queries.most * group / parts, sums = parts > 1 ? first_sum + sum_of_tile * tiles * parts : 0;
    if (queries.most == queries.mean) return longest * std::ceil(tiles * parts / kProcessors) + sums;
    const double end = end_of_head * group / parts * longest;
    return std::max(longest, queries.mean * group * tiles / kProcessors + end) + sums;
  };
  double least = time(1);
  for (int parts = 2; parts <= group; ++parts) {
    if (group % parts == 0) least = std::min(least, time(parts));
  }
  for (int parts = 1; parts < group; ++parts) {
    if (group % parts == 0 && time(parts) <= kWorthwhile * least) return parts;
  }
  return group;
}

// Elements of BackwardParams::dkv_parts.
inline int64_t elements_of_parts(const ForwardParams& forward, int64_t parts) {
  return parts * forward.batch * forward.seqlen_k * forward.kv_heads * (int64_t{forward.head_dim} + forward.head_dim_v);
}

// How many ranges are computed at a time, by the row's head_dim. Those that accumulate may share queries, each of them all:
// where they are to be added up in their order, it is one of them, and where tiles of queries are listed, what a list holds.
constexpr int kQueryTile = 128;
inline int ranges_at_a_time(const ForwardParams& forward, bool accumulate, bool deterministic, int64_t head_dim) {
  constexpr int64_t kMostRecords = 1 << 20, kMostTiles = INT32_MAX / 2;
  if (!accumulate || forward.q_start == nullptr) return forward.ranges;
  if (deterministic) return 1;
  if (!separates_dq(head_dim)) return forward.ranges;
  const int64_t of_range = std::max<int64_t>(1, (int64_t{forward.seqlen_q} + kQueryTile - 1) / kQueryTile);
  const int64_t together = std::min(kMostRecords, kMostTiles / forward.heads) / of_range;
  return static_cast<int>(std::min<int64_t>(forward.ranges, std::max<int64_t>(1, together)));
}

// Tiles of queries that so many ranges have at most.
inline int64_t query_records(const ForwardParams& forward, bool accumulate, int64_t ranges) {
  if (accumulate) return ranges * ((int64_t{forward.seqlen_q} + kQueryTile - 1) / kQueryTile);
  return most_records(forward.seqlen_q, forward.heads, forward.kv_heads, ranges);
}

// Elements of BackwardParams::dq_sum.
inline int64_t elements_of_sum(const ForwardParams& forward, int64_t head_dim) {
  return int64_t{forward.batch} * forward.heads * forward.seqlen_q * head_dim;
}

// Gradients of `params`, of which no extent is 0: every row of dq, dk and dv, or, where params.accumulate is set, what the
// ranges add to dq, and to dk and dv or write there. cudaErrorInvalidValue: a tensor that the copy engine cannot address
// (see ForwardParams).
template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream);

// dq, in dq_dtype, of the sum that backwards with accumulate have added to: params.dq_sum, whose rows are dq's if
// separates_dq. Reads the queries' extents and softmax_scale beside these.
template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_rounding(const BackwardParams& params, cudaStream_t stream);

}  // namespace fa3
