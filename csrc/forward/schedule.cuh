// Lists the tiles of packed ranges on the device, where their lengths are: those with the most keys first, so that the
// last ones to be drawn are short.
#pragma once

#include "forward/forward.h"
#include "forward/schedule.h"
#include "forward/tiles.cuh"

namespace fa3 {

constexpr int kScheduleThreads = 1024;
constexpr int kCostClasses = 1024;

struct ScheduleArguments {
  ForwardParams params;
  int queries;        // of a sequence in a tile
  int keys;           // of a block
  int heads_in_tile;
  int capacity;       // records that the workspace holds
};

// Inclusive sum over the block's threads; every thread gets the total, too.
__device__ __forceinline__ int block_scan(int value, int (&warp_sums)[32], int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += other;
  }
  __syncthreads();
  if (lane == 31) warp_sums[warp] = value;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int i = 0; i < 32; ++i) {
    if (i < warp) before += warp_sums[i];
    total += warp_sums[i];
  }
  return value + before;
}

// Calls visit(record, blocks of keys) for every tile, each on one thread.
template <class Visit>
__device__ __forceinline__ void for_each_tile(const ScheduleArguments& arguments, int (&ends)[kScheduleThreads],
                                              int (&warp_sums)[32], Visit visit) {
  const ForwardParams& params = arguments.params;
  for (int chunk = 0; chunk < params.ranges; chunk += kScheduleThreads) {
    const int own = chunk + threadIdx.x;
    int tiles = 0, total = 0;
    if (own < params.ranges) tiles = (sequence_at(params, own).q_len + arguments.queries - 1) / arguments.queries;
    ends[threadIdx.x] = block_scan(tiles, warp_sums, total);
    __syncthreads();
    for (int tile = threadIdx.x; tile < total; tile += kScheduleThreads) {
      int low = 0, high = kScheduleThreads - 1;  // the first range whose tiles end after this one
      while (low < high) {
        const int middle = (low + high) / 2;
        if (ends[middle] > tile) high = middle;
        else low = middle + 1;
      }
      const Sequence sequence = sequence_at(params, chunk + low);
      const int first_query = (tile - (low == 0 ? 0 : ends[low - 1])) * arguments.queries;
      const KeyBlocks blocks = visible_blocks(sequence, first_query, arguments.queries, arguments.keys);
      visit(TileRecord{sequence, first_query}, blocks.end - blocks.first);
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kScheduleThreads) schedule_kernel(const ScheduleArguments arguments) {
  __shared__ int ends[kScheduleThreads], warp_sums[32], position[kCostClasses];
  __shared__ int longest_keys;
  __shared__ unsigned long long covered;
  const ForwardParams& params = arguments.params;
  const int most_blocks = (params.seqlen_k + arguments.keys - 1) / arguments.keys;
  int shift = 0;
  while (most_blocks >> shift >= kCostClasses) ++shift;
  const auto cost_class = [&](int blocks) { return kCostClasses - 1 - (blocks >> shift); };  // the longest come first

  position[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    longest_keys = 0;
    covered = 0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < params.ranges; i += kScheduleThreads) {
    const Sequence sequence = sequence_at(params, i);
    atomicMax(&longest_keys, sequence.k_len);
    atomicAdd(&covered, static_cast<unsigned long long>(sequence.q_len));
  }
  for_each_tile(arguments, ends, warp_sums, [&](const TileRecord&, int blocks) {
    atomicAdd(&position[cost_class(blocks)], 1);
  });
  __syncthreads();
  const int own = position[threadIdx.x];
  int total = 0;
  const int end = block_scan(own, warp_sums, total);
  position[threadIdx.x] = end - own;
  __syncthreads();

  auto* records = const_cast<TileRecord*>(schedule_records(params.workspace));
  for_each_tile(arguments, ends, warp_sums, [&](const TileRecord& record, int blocks) {
    const int at = atomicAdd(&position[cost_class(blocks)], 1);
    // NOTE: ranges of queries that overlap are an error of the caller's, which must not write past the workspace.
    if (at < arguments.capacity) records[at] = record;
  });
  if (threadIdx.x == 0) {
    *reinterpret_cast<ScheduleHeader*>(params.workspace) = {
        TileCounter{0, 0}, min(total, arguments.capacity), units_in_cache(params, arguments.heads_in_tile, longest_keys),
        covered != static_cast<unsigned long long>(params.seqlen_q)};
  }
}

cudaError_t launch_schedule(const ForwardParams& params, TileShape tile, cudaStream_t stream) {
  const int heads = heads_per_tile(params, tile.queries);
  const int64_t elements = workspace_elements(params.seqlen_q, params.heads, params.kv_heads, params.ranges);
  const ScheduleArguments arguments{params, tile.queries / heads, tile.keys, heads,
                                    static_cast<int>(elements / 8 - 1)};
  schedule_kernel<<<1, kScheduleThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace fa3

#define FA3_INSTANTIATE(traits)  // nothing to choose
