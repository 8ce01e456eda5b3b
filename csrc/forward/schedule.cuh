// Lists the tiles of packed ranges on the device, where their lengths are: those with the most keys first, so that the
// last ones to be drawn are short. Short ranges that follow each other in memory share tiles. The tiles of a range are in
// ascending order where that is asked for (ForwardParams::ascending).
#pragma once

#include "common/launch.cuh"
#include "common/scan.cuh"
#include "forward/forward.h"
#include "forward/schedule.h"
#include "forward/tiles.cuh"

namespace fa3 {

constexpr int kCostClasses = 1024;

struct ScheduleArguments {
  ForwardParams params;
  int queries;        // of a sequence in a tile
  int keys;           // of a block
  int heads_in_tile;
  int capacity;       // records that the workspace holds
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A chunk of kScanThreads ranges, and which of them share tiles.
struct ScheduleShared {
  Sequence range[kScanThreads];
  int ends[kScanThreads];     // of the tiles of a range and of those before it
  int next[2][kScanThreads];  // the range that a tile which begins with this one leaves to the next
  bool begins[kScanThreads];  // whether a tile begins with this range
  int tiles;                  // of all of them
  int scan[32];
};

// Whether a range begins where the one before it ends, so that both may lie in one tile.
__device__ __forceinline__ bool follows(const Sequence& sequence, const Sequence& before, int queries) {
  return may_share(sequence, queries) && may_share(before, queries) && before.q_base + before.q_len == sequence.q_base &&
         before.k_base + before.k_len == sequence.k_base;
}

// Which ranges begin a tile: the first of a run of short neighbours, and the first that does not fit in with those before.
__device__ __forceinline__ void find_shared_tiles(const ScheduleArguments& arguments, ScheduleShared& shared, int ranges) {
  const int own = threadIdx.x;
  const Sequence& first = shared.range[own];
  int next = min(own + 1, ranges);
  // Visits share no tiles: each has flags of its own.
  const bool shares = arguments.params.flags == nullptr && own < ranges;
  while (shares && next < ranges && follows(shared.range[next], shared.range[next - 1], arguments.queries) &&
         shared.range[next].q_base + shared.range[next].q_len - first.q_base <= arguments.queries) {
    ++next;
  }
  shared.begins[own] = !shares || own == 0 || !follows(first, shared.range[own - 1], arguments.queries);
  shared.next[0][own] = next;
  __syncthreads();
  // From tile to tile along each run, twice as far a time.
  for (int distance = 1, from = 0; distance < ranges; distance *= 2, from ^= 1) {
    const int reached = shared.next[from][own];
    const bool begins = own < ranges && shared.begins[own] && reached < ranges;
    const int further = reached < ranges ? shared.next[from][reached] : ranges;
    __syncthreads();
    if (begins) shared.begins[reached] = true;
    shared.next[from ^ 1][own] = further;
    __syncthreads();
  }
  shared.next[0][own] = next;
  __syncthreads();
}

// A range's tile, or that of the ranges from `first` to before shared.next.
__device__ __forceinline__ TileRecord tile_record(const ScheduleShared& shared, int chunk, int first, int first_query) {
  const Sequence& from = shared.range[first];
  const int last = shared.next[0][first] - 1;
  if (last == first) return {from, first_query, kOneRange};
  const Sequence& to = shared.range[last];
  const int rows = to.q_base + to.q_len - from.q_base, keys = to.k_base + to.k_len - from.k_base;
  const int first_key = visible_keys(from, 0).first;
  const int end_key = to.k_base - from.k_base + visible_keys(to, to.q_len - 1).end;
  // What the first query does not see before, and the last one not after, is seen by none.
  return {{from.q_base, rows, from.k_base, keys, first_key, end_key - rows, 0}, 0, chunk + first};
}

// A number of blocks of keys that a tile does not exceed, nor any later tile of the same range: what tiles that are to be in
// ascending order are listed by.
__device__ __forceinline__ int most_blocks_from(const ScheduleArguments& arguments, const TileRecord& record) {
  const Sequence& sequence = record.sequence;
  const int first = max(0, record.first_query + sequence.first_diagonal) / arguments.keys;
  const int64_t width = int64_t{sequence.last_diagonal} - sequence.first_diagonal + arguments.queries - 1;
  return static_cast<int>(min(int64_t{max(0, ceil_div(sequence.k_len, arguments.keys) - first)},
                              width / arguments.keys + 2));
}

// The tiles of a range, or of those that share them, if they begin with it.
__device__ __forceinline__ int tiles_from(const ScheduleArguments& arguments, const ScheduleShared& shared, int range) {
  const Sequence& last = shared.range[shared.next[0][range] - 1];
  return shared.begins[range] ? ceil_div(last.q_base + last.q_len - shared.range[range].q_base, arguments.queries) : 0;
}

// Fills in what tiles the ranges of a chunk have.
__device__ __forceinline__ void count_tiles(const ScheduleArguments& arguments, ScheduleShared& shared, int chunk,
                                            int ranges) {
  const int own = threadIdx.x;
  Sequence sequence{};
  if (own < ranges) sequence = sequence_at(arguments.params, chunk + own);
  __syncthreads();  // the chunk before has been read
  shared.range[own] = sequence;
  __syncthreads();
  find_shared_tiles(arguments, shared, ranges);
  int total = 0;
  shared.ends[own] = block_scan(own < ranges ? tiles_from(arguments, shared, own) : 0, shared.scan, total);
  if (own == 0) shared.tiles = total;
  __syncthreads();
}

// Calls visit(record, blocks of keys) for the tiles of a chunk, each on one thread; if they are to be in ascending order, for
// those of a range on the same thread, one after the other.
template <class Visit>
__device__ __forceinline__ void for_each_tile(const ScheduleArguments& arguments, const ScheduleShared& shared, int chunk,
                                              int ranges, Visit visit) {
  const bool ascending = arguments.params.ascending;
  const int own = threadIdx.x;
  const int end = !ascending ? shared.tiles : own < ranges ? tiles_from(arguments, shared, own) : 0;
#pragma unroll 1
  for (int tile = ascending ? 0 : own; tile < end; tile += ascending ? 1 : kScanThreads) {
    int range = own, in_range = tile;
    if (!ascending) {
      range = first_above(shared.ends, tile);
      in_range = tile - (range == 0 ? 0 : shared.ends[range - 1]);
    }
    const TileRecord record = tile_record(shared, chunk, range, in_range * arguments.queries);
    const KeyBlocks blocks = visible_blocks(record.sequence, record.first_query, arguments.queries, arguments.keys);
    visit(record, ascending ? most_blocks_from(arguments, record) : blocks.end - blocks.first);
  }
}

__global__ void __launch_bounds__(kScanThreads) schedule_kernel(const ScheduleArguments arguments) {
  __shared__ ScheduleShared shared;
  __shared__ int position[kCostClasses];
  __shared__ int longest_keys[32];  // of a warp's ranges
  __shared__ int most_visited;      // blocks of keys of a tile
  __shared__ int64_t sums[32];
  const ForwardParams& params = arguments.params;
  cudaTriggerProgrammaticLaunchCompletion();
  const int most_blocks = (params.seqlen_k + arguments.keys - 1) / arguments.keys;
  int shift = 0;
  while (most_blocks >> shift >= kCostClasses) ++shift;
  const auto cost_class = [&](int blocks) { return kCostClasses - 1 - (blocks >> shift); };  // the longest come first

  position[threadIdx.x] = 0;
  if (threadIdx.x == 0) most_visited = 0;
  int longest = 0, longest_tile = 0;
  int64_t queries = 0, visited = 0;
  for (int i = threadIdx.x; i < params.ranges; i += kScanThreads) {
    const Sequence sequence = sequence_at(params, i);
    longest = max(longest, sequence.k_len);
    queries += sequence.q_len;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    longest = max(longest, __shfl_xor_sync(0xffffffffu, longest, distance));
  }
  if (threadIdx.x % 32 == 0) longest_keys[threadIdx.x / 32] = longest;
  queries = block_sum(queries, sums);
  auto* records = const_cast<TileRecord*>(schedule_records(params.workspace));
  int total = 0;
  // How many tiles each class has; then where each tile comes.
  // NOTE: one copy of the code, which a launch fetches while nothing else goes on.
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (int chunk = 0; chunk < params.ranges; chunk += kScanThreads) {
      const int ranges = min(kScanThreads, params.ranges - chunk);
      if (pass == 0 || params.ranges > kScanThreads) count_tiles(arguments, shared, chunk, ranges);
      for_each_tile(arguments, shared, chunk, ranges, [&](const TileRecord& record, int blocks) {
        const int at = atomicAdd(&position[cost_class(blocks)], 1);
        longest_tile = max(longest_tile, blocks);
        visited += pass == 0 ? blocks : 0;
        // NOTE: ranges of queries that overlap are an error of the caller's, which must not write past the workspace.
        if (pass == 1 && at < arguments.capacity) records[at] = record;
      });
    }
    __syncthreads();
    if (pass == 0) {
      const int own = position[threadIdx.x];
      position[threadIdx.x] = block_scan(own, shared.scan, total) - own;
      __syncthreads();
    }
  }
  atomicMax(&most_visited, longest_tile);
  visited = block_sum(visited, sums);
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kScanThreads / 32; ++warp) longest = max(longest, longest_keys[warp]);
    *reinterpret_cast<ScheduleHeader*>(params.workspace) = {
        TileCounter{0, 0}, min(total, arguments.capacity),
        units_per_group(params, arguments.heads_in_tile, longest, total), least_last_units(visited, total, most_visited),
        queries != params.seqlen_q};
  }
  cudaGridDependencySynchronize();
}

cudaError_t launch_schedule(const ForwardParams& params, TileShape tile, int heads_in_tile, int64_t records,
                            cudaStream_t stream, bool early) {
  const ScheduleArguments arguments{params, tile.queries / heads_in_tile, tile.keys, heads_in_tile,
                                    static_cast<int>(records)};
  return launch(schedule_kernel, 1, kScanThreads, 0, stream, early, arguments);
}

}  // namespace fa3

#define FA3_INSTANTIATE(traits)  // nothing to choose
