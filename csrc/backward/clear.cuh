// What a packed backward finds in memory: zeros in dq_sum where it adds, and in dQ, dK and dV where it writes nothing.
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
