// delta = rowsum(dout * out) - dlse, in fp32: reads two tensors once, writes one number a row. Memory-bound.
//
// A block owns a tile of 128 rows, (some tokens) x (some neighbouring heads). Heads are neighbours in the inputs
// and tokens are neighbours in the result, so the sums are transposed through shared memory: reads cover whole
// runs of memory, and writes whole 32-byte sectors (at least 16 tokens a head).
// A row is read by a group of lanes in one go, and a thread keeps the loads of several rows of both tensors in flight.
// Blocks are small and independent: while one waits for its loads or its barrier, others on the SM keep loading.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backward/delta.h"
#include "common/dtype.cuh"
#include "common/vector.cuh"

namespace fa3 {

constexpr int kDeltaThreads = 256;
constexpr int kDeltaBlocksPerSM = 3;      // 768 threads an SM, 96 KB of loads in flight: three times what latency asks
constexpr int kDeltaBytesInFlight = 128;  // a thread; 96 where one of dout and out is fp32 and the other is not
constexpr int kDeltaTileRows = 128;
constexpr int kDeltaMaxHeadsLog2 = 3;            // at most 8 heads a tile
constexpr int64_t kDeltaMaxTiles = 0x7fffffff;   // grid.x
constexpr int64_t kDeltaMaxExtent = 0x7fffff00;  // tokens, heads, head_dim: indices inside a tile stay 32-bit
constexpr unsigned kDeltaAllLanes = 0xffffffffu;

// Rows a thread works on at once: as many as the bytes in flight allow, a power of two of at most four.
template <class Dout, class Out, int kVec>
constexpr int kDeltaRowsInFlight = kVec * (sizeof(Dout) + sizeof(Out)) * 4 <= kDeltaBytesInFlight ? 4 : 2;

constexpr int log2_of(int x) { return x <= 1 ? 0 : 1 + log2_of(x / 2); }

// How the rows are cut into tiles; the same for every kernel below.
struct DeltaTiling {
  int heads_log2;  // a tile spans 2**heads_log2 heads, a divisor of the head count
  uint32_t head_tiles;
  uint32_t token_tiles;
  int64_t tiles;
};

inline DeltaTiling delta_tiling(const DeltaParams& params) {
  DeltaTiling tiling;
  tiling.heads_log2 = 0;
  while (tiling.heads_log2 < kDeltaMaxHeadsLog2 && params.heads % (2ll << tiling.heads_log2) == 0) {
    ++tiling.heads_log2;
  }
  const int64_t tile_tokens = kDeltaTileRows >> tiling.heads_log2;
  tiling.head_tiles = static_cast<uint32_t>(params.heads >> tiling.heads_log2);
  tiling.token_tiles = static_cast<uint32_t>((params.seqlen + tile_tokens - 1) / tile_tokens);
  tiling.tiles = params.batch * tiling.token_tiles * tiling.head_tiles;
  return tiling;
}

// kVec elements a load, kLanes lanes a row.
template <class Dout, class Out, int kVec, int kLanes>
__device__ __forceinline__ void delta_tile(const DeltaParams& params, const DeltaTiling& tiling) {
  constexpr int kTileRows = kDeltaTileRows;
  constexpr int kRows = kDeltaRowsInFlight<Dout, Out, kVec>;
  constexpr int kGroups = kDeltaThreads / kLanes;
  constexpr int kGroupsLog2 = log2_of(kGroups);
  constexpr int kRowsPerThread = kTileRows / kGroups;
  static_assert(kRowsPerThread % kRows == 0, "passes cover the tile exactly");
  static_assert(kGroupsLog2 >= kDeltaMaxHeadsLog2, "a thread's rows share one head");
  static_assert(kTileRows <= kDeltaThreads, "one thread writes one result");

  __shared__ float sDelta[kTileRows];  // [head of the tile][token of the tile]

  const int tokens_log2 = log2_of(kTileRows) - tiling.heads_log2;
  const int head_mask = (1 << tiling.heads_log2) - 1;
  const int token_mask = (1 << tokens_log2) - 1;

  // Head tiles are neighbours in memory and in the grid.
  const int seqlen = static_cast<int>(params.seqlen);
  const uint32_t batch_token_tile = blockIdx.x / tiling.head_tiles;
  const int head_start = static_cast<int>(blockIdx.x % tiling.head_tiles) << tiling.heads_log2;
  const int token_start = static_cast<int>(batch_token_tile % tiling.token_tiles) << tokens_log2;
  const int64_t batch = batch_token_tile / tiling.token_tiles;

  // What this thread will write, and its dlse, fetched now so that its latency hides behind the main loop.
  const int64_t write_head = head_start + (threadIdx.x >> tokens_log2);
  const int64_t write_token = token_start + (threadIdx.x & token_mask);
  const bool writes = threadIdx.x < kTileRows && write_token < seqlen;
  float rDlse = 0.f;
  if (writes && params.dlse != nullptr) {
    const Strides& stride = params.dlse_stride;
    rDlse = params.dlse[batch * stride.batch + write_head * stride.heads + write_token * stride.seqlen];
  }

  // Row (j * kGroups + group) of the tile is this thread's j-th. Heads run fastest, and kGroups is a multiple of the
  // tile's heads: all rows of a thread share one head, and their tokens stand `step` apart.
  const int lane = threadIdx.x % kLanes;
  const int group = threadIdx.x / kLanes;
  const int step_log2 = kGroupsLog2 - tiling.heads_log2;
  const int head = head_start + (group & head_mask);
  // Rows past the end read an earlier token again: no branch in the loads, and their sums are never written.
  const int first_token = min(token_start + (group >> tiling.heads_log2), seqlen - 1);
  const int last_j = (seqlen - 1 - first_token) >> step_log2;

  const Strides& dout_stride = params.dout_stride;
  const Strides& out_stride = params.out_stride;
  const Dout* gDoutFirst = static_cast<const Dout*>(params.dout) + batch * dout_stride.batch +
                           head * dout_stride.heads + first_token * dout_stride.seqlen;
  const Out* gOutFirst = static_cast<const Out*>(params.out) + batch * out_stride.batch + head * out_stride.heads +
                         first_token * out_stride.seqlen;
  const int64_t dout_step = dout_stride.seqlen << step_log2;
  const int64_t out_step = out_stride.seqlen << step_log2;
  float* sDeltaFirst = sDelta + ((group & head_mask) << tokens_log2) + (group >> tiling.heads_log2);
  const int head_dim = static_cast<int>(params.head_dim);

#pragma unroll 1
  for (int first_j = 0; first_j < kRowsPerThread; first_j += kRows) {
    const Dout* gDout[kRows];
    const Out* gOut[kRows];
    float rSum[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int j = min(first_j + i, last_j);
      gDout[i] = gDoutFirst + j * dout_step;
      gOut[i] = gOutFirst + j * out_step;
      rSum[i] = 0.f;
    }

#pragma unroll 1
    for (int d = lane * kVec; d < head_dim; d += kLanes * kVec) {
      // NOTE: vectors need head_dim stride 1; written out so that their addresses carry no multiplication.
      const int64_t dout_offset = kVec > 1 ? d : d * dout_stride.head_dim;
      const int64_t out_offset = kVec > 1 ? d : d * out_stride.head_dim;
      Vec<Dout, kVec> rDout[kRows];
      Vec<Out, kVec> rOut[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        rDout[i] = load_global<kVec>(gDout[i] + dout_offset);
        rOut[i] = load_global<kVec>(gOut[i] + out_offset);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          rSum[i] = fmaf(to_float(rDout[i].value[e]), to_float(rOut[i].value[e]), rSum[i]);
        }
      }
    }

#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        rSum[i] += __shfl_xor_sync(kDeltaAllLanes, rSum[i], distance);
      }
    }
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        sDeltaFirst[(first_j + i) << step_log2] = rSum[i];
      }
    }
  }

  __syncthreads();
  if (writes) {
    params.delta[(batch * params.heads + write_head) * params.seqlen + write_token] = sDelta[threadIdx.x] - rDlse;
  }
}

template <class Dout, class Out, int kVec, int kLanes>
__global__ void __launch_bounds__(kDeltaThreads, kDeltaBlocksPerSM)
    delta_vector_kernel(const __grid_constant__ DeltaParams params, const __grid_constant__ DeltaTiling tiling) {
  delta_tile<Dout, Out, kVec, kLanes>(params, tiling);
}

// Any strides and alignment, one element a load.
template <class Dout, class Out>
__global__ void __launch_bounds__(kDeltaThreads, kDeltaBlocksPerSM)
    delta_strided_kernel(const __grid_constant__ DeltaParams params, const __grid_constant__ DeltaTiling tiling) {
  delta_tile<Dout, Out, 1, 32>(params, tiling);
}

// Whether every row of the tensor can be read `count` elements at a time.
inline bool delta_reads_vectors(const void* pointer, const Strides& stride, int64_t head_dim, int count) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return stride.head_dim == 1 && head_dim % count == 0 && address % 16 == 0 && stride.batch % count == 0 &&
         stride.seqlen % count == 0 && stride.heads % count == 0;
}

template <class Dout, class Out>
cudaError_t launch_delta(const DeltaParams& params, cudaStream_t stream) {
  // The narrower type fills 16 bytes a load; the wider one then takes two loads.
  constexpr int kVec = 16 / static_cast<int>(sizeof(Dout) < sizeof(Out) ? sizeof(Dout) : sizeof(Out));
  if (std::max({params.seqlen, params.heads, params.head_dim}) > kDeltaMaxExtent) return cudaErrorInvalidConfiguration;
  const DeltaTiling tiling = delta_tiling(params);
  if (tiling.tiles > kDeltaMaxTiles) return cudaErrorInvalidConfiguration;

  const bool vectors = delta_reads_vectors(params.dout, params.dout_stride, params.head_dim, kVec) &&
                       delta_reads_vectors(params.out, params.out_stride, params.head_dim, kVec);
  const int64_t loads = params.head_dim / kVec;  // a row
  const dim3 grid(static_cast<unsigned>(tiling.tiles));
  if (!vectors) {
    delta_strided_kernel<Dout, Out><<<grid, kDeltaThreads, 0, stream>>>(params, tiling);
  } else if (loads <= 8) {
    delta_vector_kernel<Dout, Out, kVec, 8><<<grid, kDeltaThreads, 0, stream>>>(params, tiling);
  } else if (loads <= 16) {
    delta_vector_kernel<Dout, Out, kVec, 16><<<grid, kDeltaThreads, 0, stream>>>(params, tiling);
  } else {
    delta_vector_kernel<Dout, Out, kVec, 32><<<grid, kDeltaThreads, 0, stream>>>(params, tiling);
  }
  return cudaGetLastError();
}

template <DType kDout>
cudaError_t launch_delta(const DeltaParams& params, cudaStream_t stream) {
  switch (params.out_dtype) {
    case DType::bf16:
      return launch_delta<Element<kDout>, Element<DType::bf16>>(params, stream);
    case DType::fp16:
      return launch_delta<Element<kDout>, Element<DType::fp16>>(params, stream);
    case DType::fp32:
      return launch_delta<Element<kDout>, Element<DType::fp32>>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fa3

#define FA3_INSTANTIATE(dout) \
  template cudaError_t fa3::launch_delta<fa3::DType::dout>(const fa3::DeltaParams&, cudaStream_t);
