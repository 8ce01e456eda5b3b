// What a backward finds in memory: zeros in dq_sum where it adds, and, a packed one, in dQ, dK and dV where it writes nothing.
#pragma once

#include "backward/shared.cuh"
#include "common/scan.cuh"

namespace fa3 {

// Called by all threads of a grid.
__device__ __forceinline__ void clear_memory(void* to, int64_t elements, DType dtype) {
  const int64_t pieces = elements * bytes_of(dtype) / 16;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < pieces; i += int64_t{gridDim.x} * blockDim.x) {
    static_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
  }
}

// Of a dense launch's dq_sum, which takes as long to clear as to convert, only the start is cleared before the tiles. Who draws
// a tile, once it has handed it on, or dropped it since it sees nothing, clears a chunk of what tiles far behind it will add to,
// and counts it for its KV head. Before a tile's first addition all of its KV head's chunks have been counted.
//
// Why nobody waits for ever. Tiles are numbered as they are drawn, by a counter or, the first ones, by blockIdx; their heads are
// walked in groups (TileSequence). What a tile waits for is clear from the start, or is cleared by tiles of groups before its own,
// `ahead` being more than a group has tiles. These have smaller numbers, drawn by the counter, so by blocks that run. And such a
// block, to get to its clearing, waits for nobody but its own consumers, and for chunks of tiles with still smaller numbers.

// What is said of a launch whose tiles are drawn by so many blocks, and whose KV heads are walked so many together. `rows`: of
// dq_sum, of a KV head.
inline ClearedAhead clear_ahead(int heads, int64_t rows, int chunks_of_head, int heads_together, int least_last, int64_t blocks) {
  constexpr int64_t kDrawnMeanwhile = 8;  // until a chunk is clear; of more, zeros leave the cache
  const int last = heads - TileSequence::groups_before_last(heads, heads_together, least_last) * heads_together;
  const int64_t ahead = int64_t{heads_together} * chunks_of_head + kDrawnMeanwhile, first = ahead + blocks;
  // Of a last group that is larger than the others, as many chunks as these have.
  const int64_t end = (int64_t{heads} - std::max(0, last - heads_together)) * chunks_of_head;
  if (first >= end) return {};
  return {static_cast<int>(first), static_cast<int>(end), static_cast<int>(ahead), chunks_of_head,
          static_cast<int>((rows + chunks_of_head - 1) / chunks_of_head)};
}

// Clears the chunks that are clear from the start, and counts them.
__global__ void __launch_bounds__(kScanThreads) inline clear_start_kernel(const BackwardParams params, const ClearedAhead cleared,
                                                                          int64_t rows, int head_dim) {
  cudaTriggerProgrammaticLaunchCompletion();
  const int chunks = cleared.chunks_of_head, heads = params.forward.kv_heads * params.forward.batch;
  const auto first_row = [&](int chunk) {
    return chunk / chunks * rows + min(rows, int64_t{chunk % chunks} * cleared.rows);
  };
  const int64_t end = first_row(cleared.end);
  clear_memory(params.dq_sum, first_row(cleared.first) * head_dim, DType::fp32);
  clear_memory(params.dq_sum + end * head_dim, (heads * rows - end) * head_dim, DType::fp32);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < heads; i += gridDim.x * blockDim.x) {
    params.cleared[i] = min(max(cleared.first - i * chunks, 0), chunks) + min(max((i + 1) * chunks - cleared.end, 0), chunks);
  }
}

// The rows of dk and dv, in fp32, of all keys of a dense batch or in ranges.
__global__ void __launch_bounds__(kScanThreads) inline clear_keys_kernel(const BackwardParams params, const ForwardParams transposed) {
  const ForwardParams& forward = params.forward;
  const auto clear = [&](int64_t first, int64_t count) {
    const int64_t row = int64_t{forward.kv_heads} * forward.head_dim, row_v = int64_t{forward.kv_heads} * forward.head_dim_v;
    clear_memory(static_cast<float*>(params.dk) + first * row, count * row, DType::fp32);
    clear_memory(static_cast<float*>(params.dv) + first * row_v, count * row_v, DType::fp32);
  };
  if (forward.q_start == nullptr) return clear(0, int64_t{forward.batch} * forward.seqlen_k);
  for (int i = 0; i < transposed.ranges; ++i) {
    const Sequence range = sequence_at(transposed, i);
    clear(range.q_base, range.q_len);
  }
}

// Runs beside the schedule, if there is one, and has ended no earlier than that. `transposed`: with the keys for queries.
template <class Config>
__global__ void __launch_bounds__(kScanThreads) clear_kernel(const BackwardParams params, const ForwardParams transposed) {
  __shared__ int ends[kScanThreads], starts[kScanThreads], scan[32];
  __shared__ int64_t sums[32];
  const ForwardParams& forward = params.forward;
  cudaTriggerProgrammaticLaunchCompletion();
  int64_t keys = 0, queries = 0;
  // Tiles of rows that see nothing are not even computed.
  bool unseen_keys = false, unseen_queries = false;
  for (int i = threadIdx.x; i < transposed.ranges; i += kScanThreads) {
    const Sequence range = sequence_at(transposed, i);
    keys += range.q_len;
    queries += range.k_len;
    unseen_keys = unseen_keys || !every_query_sees_a_key(range);
    unseen_queries = unseen_queries || !every_key_is_seen(range);
  }
  keys = block_sum(keys, sums);
  queries = block_sum(queries, sums);
  if (__syncthreads_or(unseen_keys) || keys != forward.seqlen_k) {
    const int64_t rows = int64_t{forward.seqlen_k} * forward.kv_heads;
    clear_memory(params.dk, rows * forward.head_dim, params.dk_dtype);
    clear_memory(params.dv, rows * forward.head_dim_v, params.dv_dtype);
  }
  if constexpr (Config::kSharesKeys) {
    if (__syncthreads_or(unseen_queries) || queries != forward.seqlen_q) {
      clear_memory(params.dq, int64_t{forward.seqlen_q} * forward.heads * forward.head_dim, params.dq_dtype);
    }
    cudaGridDependencySynchronize();
    return;
  }
  if (queries != forward.seqlen_q) {
    clear_memory(params.dq_sum, int64_t{forward.seqlen_q} * forward.heads * Config::kHeadDim, DType::fp32);
    cudaGridDependencySynchronize();
    return;
  }
  constexpr int kWarps = kScanThreads / 32;
  for (int chunk = 0; chunk < transposed.ranges; chunk += kScanThreads) {
    const int index = chunk + threadIdx.x;
    const Sequence range = index < transposed.ranges ? sequence_at(transposed, index) : Sequence{};
    // A tile that has all of a range's keys stores what it has for its queries (add_query_blocks), in all blocks of them.
    const bool is_stored = range.q_len > 0 && range.q_len <= Config::kKeys && every_key_is_seen(range);
    int total = 0;
    const int end = block_scan(is_stored ? 0 : range.k_len, scan, total);
    starts[threadIdx.x] = range.k_base + range.k_len - end;  // of row 0 of the chunk, if the range had all rows
    ends[threadIdx.x] = end;
    __syncthreads();
    for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < total; row += gridDim.x * kWarps) {
      const int64_t token = row + starts[first_above(ends, row)];
      constexpr int kPieces = Config::kHeadDim / 4;  // of 16 bytes
#pragma unroll 4
      for (int i = threadIdx.x % 32; i < forward.heads * kPieces; i += 32) {
        const int64_t sum_row = int64_t{i / kPieces} * forward.seqlen_q + token;
        reinterpret_cast<uint4*>(params.dq_sum)[sum_row * kPieces + i % kPieces] = make_uint4(0, 0, 0, 0);
      }
    }
    __syncthreads();
  }
  cudaGridDependencySynchronize();
}

}  // namespace fa3
