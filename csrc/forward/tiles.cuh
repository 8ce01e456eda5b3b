// Which tiles there are, which keys each of them visits, and in which order they are drawn.
#pragma once

#include <cutlass/fast_math.h>

#include "common/branch.cuh"
#include "forward/schedule.h"
#include "params.h"

namespace fa3 {

// A batch element, or a range of a packed tensor. Query j sees the keys [j + first_diagonal, j + last_diagonal].
struct Sequence {
  int q_base;  // token of query 0
  int q_len;
  int k_base;
  int k_len;
  int first_diagonal;
  int last_diagonal;
  int flags;
};

__host__ __device__ __forceinline__ Sequence sequence_at(const ForwardParams& params, int index) {
  Sequence sequence{0, params.seqlen_q, 0, params.seqlen_k, 0, 0, 0};
  if (params.q_start != nullptr) {
    // NOTE: nobody has looked at these numbers; whatever they say must not lead outside of the tensors.
    sequence.q_base = min(max(params.q_start[index], 0), params.seqlen_q);
    sequence.k_base = min(max(params.k_start[index], 0), params.seqlen_k);
    sequence.q_len = min(max(params.q_len[index], 0), params.seqlen_q - sequence.q_base);
    sequence.k_len = min(max(params.k_len[index], 0), params.seqlen_k - sequence.k_base);
  }
  if (params.flags != nullptr) sequence.flags = params.flags[index];
  int64_t shift = params.offset;
  if (params.default_offset) shift = sequence.k_len - sequence.q_len;
  if (params.offsets != nullptr) shift = params.offsets[index];
  if (params.transposed && !params.default_offset) shift = -shift;
  // Past these limits a diagonal hides all keys or none.
  const auto diagonal = [&](int64_t at) {
    return static_cast<int>(min(max(at, -int64_t{sequence.q_len}), int64_t{sequence.k_len}));
  };
  sequence.first_diagonal = params.window_left == kNoBound ? -sequence.q_len : diagonal(shift - params.window_left);
  sequence.last_diagonal = params.window_right == kNoBound ? sequence.k_len : diagonal(shift + params.window_right);
  return sequence;
}

// Blocks of keys [first, end) that the queries [first_query, first_query + queries) visit. They walk from the last to the
// first. In [first_plain, end_open) no score is hidden; in [first_plain, end_plain) every query has seen a key before, too.
struct KeyBlocks {
  int first;
  int end;
  int first_plain;
  int end_plain;
  int end_open;
};

__device__ __forceinline__ KeyBlocks visible_blocks(const Sequence& sequence, int first_query, int queries, int keys) {
  const int last_query = min(first_query + queries, sequence.q_len) - 1;
  const int first_key = max(0, first_query + sequence.first_diagonal);
  const int end_key = min(sequence.k_len, last_query + sequence.last_diagonal + 1);
  if (first_key >= end_key) return {0, 0, 0, 0, 0};
  // What the first query does not see yet, and what the last one sees no more.
  const int last_common = min(first_query + sequence.last_diagonal, sequence.k_len - 1);
  const int first_common = max(0, last_query + sequence.first_diagonal);
  // A block before the one of last_common lies wholly before it, and the first query sees last_common earlier.
  return {first_key / keys, (end_key + keys - 1) / keys, (first_common + keys - 1) / keys, max(0, last_common) / keys,
          max(0, last_common + 1) / keys};
}

// The same, each block with hidden scores in it.
__device__ __forceinline__ KeyBlocks all_masked(const KeyBlocks& blocks) {
  return {blocks.first, blocks.end, INT32_MAX, 0, 0};
}

// A tile of listed ranges. What the schedule kernel writes, and the forward's producer reads.
struct alignas(16) TileRecord {
  Sequence sequence;  // of a shared tile: its own rows, and the keys from its first range's first to its last one's last
  int first_query;
  int first_range;    // of a tile that ranges share, or kOneRange
};
static_assert(sizeof(TileRecord) == kRecordElements * sizeof(int32_t));
constexpr int kOneRange = -1;

// Whether a range may share a tile with its neighbours in memory: a short document, most of whose tile would stay empty.
__device__ __forceinline__ bool may_share(const Sequence& sequence, int queries) {
  return sequence.q_len <= queries && sequence.q_len == sequence.k_len;
}

// Keys that a query of a sequence sees: [first, end), empty if end <= first. Both grow with the query.
struct KeyBounds {
  int first;
  int end;
};
__device__ __forceinline__ KeyBounds visible_keys(const Sequence& sequence, int query) {
  return {min(max(query + sequence.first_diagonal, 0), sequence.k_len),
          min(max(query + sequence.last_diagonal + 1, 0), sequence.k_len)};
}

// KeyBounds of a shared tile, which has no more keys than queries.
struct KeyBounds8 {
  uint8_t first;
  uint8_t end;
};

// Writes which keys the queries of a shared tile see, counted from sequence.k_base. Called by all lanes of a warp: each knows
// a range, and all go through its queries.
__device__ __forceinline__ void fill_bounds(KeyBounds8* bounds, const ForwardParams& params, const TileRecord& record) {
  const int lane = threadIdx.x % 32;
  const int begin = record.sequence.q_base, end = begin + record.sequence.q_len;
  int done = begin;
#pragma unroll 1
  for (int first = record.first_range; done < end && first < params.ranges; first += 32) {
    const Sequence own = sequence_at(params, min(first + lane, params.ranges - 1));
#pragma unroll 1
    for (int i = 0; i < min(32, params.ranges - first) && done < end; ++i) {
      const auto of_range = [&](int value) { return __shfl_sync(0xffffffffu, value, i); };
      Sequence range{};
      range.q_base = of_range(own.q_base);
      range.k_len = of_range(own.k_len);
      range.first_diagonal = of_range(own.first_diagonal);
      range.last_diagonal = of_range(own.last_diagonal);
      const int shift = of_range(own.k_base) - record.sequence.k_base;
      const int range_end = range.q_base + of_range(own.q_len);
      for (int token = max(begin, range.q_base) + lane; token < min(end, range_end); token += 32) {
        const KeyBounds keys = visible_keys(range, token - range.q_base);
        bounds[token - begin] = {static_cast<uint8_t>(keys.first + shift), static_cast<uint8_t>(keys.end + shift)};
      }
      done = max(done, range_end);
    }
  }
  __syncwarp();
}

// Whether each query of a sequence sees a key, and whether each key is seen by a query.
// NOTE: what queries see moves on with them: if the first and the last one see a key, all do; and so for keys.
__device__ __forceinline__ bool every_query_sees_a_key(const Sequence& sequence) {
  const auto sees = [&](int query) {
    const KeyBounds keys = visible_keys(sequence, query);
    return keys.first < keys.end;
  };
  return sequence.q_len == 0 || (sees(0) && sees(sequence.q_len - 1));
}
__device__ __forceinline__ bool every_key_is_seen(const Sequence& sequence) {
  const auto is_seen = [&](int key) {
    return max(key - sequence.last_diagonal, 0) <= min(key - sequence.first_diagonal, sequence.q_len - 1);
  };
  return sequence.k_len == 0 || (is_seen(0) && is_seen(sequence.k_len - 1));
}

// The order in which a launch's tiles are drawn: group of units after group of units; inside a group rank after rank, the
// units side by side. The last group has what is left over, too, and no fewer units than it is said to need: in a small one,
// long tiles would be begun last of all.
struct TileSequence {
  struct Place {
    int unit;
    int rank;  // among the tiles of a unit, the longest of which come first
  };

  int units;
  int tiles_per_unit;
  int units_per_group;
  int full_groups;  // before the last one

  // The last group takes the units that are left when it has to have so many: fewer than twice as many as others have.
  static __host__ __device__ __forceinline__ int groups_before_last(int units, int units_per_group, int least_last_units = 0) {
    const int last = units_per_group > least_last_units ? units_per_group : least_last_units;
    return units > last ? (units - last) / units_per_group : 0;
  }

  __device__ __forceinline__ TileSequence(int units, int tiles_per_unit, int units_per_group, int least_last_units = 0)
      : units(units), tiles_per_unit(tiles_per_unit), units_per_group(units_per_group),
        full_groups(groups_before_last(units, units_per_group, least_last_units)) {}

  __device__ __forceinline__ int size() const { return units * tiles_per_unit; }

  __device__ __forceinline__ Place operator[](int index) const {
    const int group = min(index / (units_per_group * tiles_per_unit), full_groups);
    const int first_unit = group * units_per_group;
    const int units_here = group < full_groups ? units_per_group : units - first_unit;
    const int in_group = index - first_unit * tiles_per_unit;
    const int rank = in_group / units_here;
    return {first_unit + in_group - rank * units_here, rank};
  }
};

// The same order for a dense launch, in which every division is by a number that the host knows.
struct DenseTiles {
  struct Place {
    int batch;
    int unit;  // of the batch element
    int rank;
  };

  cutlass::FastDivmod tiles_of_group;
  cutlass::FastDivmod units_of_group;
  cutlass::FastDivmod units_of_last_group;
  cutlass::FastDivmod units_of_batch;
  int tiles_per_unit;
  int tiles;
  int full_groups;

  DenseTiles() = default;
  __host__ DenseTiles(int units_of_batch, int batch, int tiles_per_unit, int units_per_group)
      : tiles_of_group(units_per_group * tiles_per_unit), units_of_group(units_per_group), units_of_batch(units_of_batch),
        tiles_per_unit(tiles_per_unit) {
    const int units = units_of_batch * batch;
    tiles = units * tiles_per_unit;
    full_groups = (units > units_per_group ? units - units_per_group : 0) / units_per_group;
    units_of_last_group = cutlass::FastDivmod(units - full_groups * units_per_group);
  }

  __device__ __forceinline__ Place operator[](int index) const {
    const int group = min(tiles_of_group.div(index), full_groups);
    const int first_unit = group * units_of_group.divisor;
    const bool is_last = group == full_groups;
    const int in_group = index - first_unit * tiles_per_unit;
    const int rank = is_last ? units_of_last_group.div(in_group) : units_of_group.div(in_group);
    const int unit = first_unit + in_group - rank * (is_last ? units_of_last_group.divisor : units_of_group.divisor);
    const int batch = units_of_batch.div(unit);
    return {batch, unit - batch * units_of_batch.divisor, rank};
  }
};

// Tiles drawn from a launch, and blocks that found none left. Both are 0 between launches.
struct TileCounter {
  int drawn;
  unsigned finished;
};

// Start of the workspace; the records follow.
struct alignas(16) ScheduleHeader {
  TileCounter counter;
  int records;
  int units_per_group;   // as in TileSequence,
  int least_last_units;  // and of its last group
  int uncovered;         // whether some queries may lie in no range
};
static_assert(sizeof(ScheduleHeader) == kHeaderElements * sizeof(int32_t));

__host__ __device__ inline const TileRecord* schedule_records(const int32_t* workspace) {
  return reinterpret_cast<const TileRecord*>(workspace + sizeof(ScheduleHeader) / sizeof(int32_t));
}

}  // namespace fa3
