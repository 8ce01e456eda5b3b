// Sums over the kScanThreads threads of a block.
#pragma once

#include <cstdint>

namespace fa3 {

constexpr int kScanThreads = 1024;

// Inclusive sum over the block's threads; every thread gets the total, too.
__device__ __forceinline__ int block_scan(int value, int (&warp_sums)[32], int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto warp_scan = [&](int of_lane) {
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, of_lane, distance);
      if (lane >= distance) of_lane += other;
    }
    return of_lane;
  };
  value = warp_scan(value);
  __syncthreads();  // an earlier scan has been read
  if (lane == 31) warp_sums[warp] = value;
  __syncthreads();
  const int sums = warp_scan(warp_sums[lane]);  // every warp for itself
  const int before = __shfl_sync(0xffffffffu, sums, max(warp - 1, 0));
  total = __shfl_sync(0xffffffffu, sums, 31);
  return warp == 0 ? value : value + before;
}

// Sum over the block's threads, for all of them.
__device__ __forceinline__ int64_t block_sum(int64_t value, int64_t (&warp_sums)[32]) {
  const auto warp_sum = [](int64_t of_lane) {
    for (int distance = 16; distance > 0; distance /= 2) of_lane += __shfl_xor_sync(0xffffffffu, of_lane, distance);
    return of_lane;
  };
  value = warp_sum(value);
  __syncthreads();  // an earlier sum has been read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(warp_sums[threadIdx.x % 32]);
}

// The first of kScanThreads inclusive sums that is above `value`, which is less than the last one.
__device__ __forceinline__ int first_above(const int (&sums)[kScanThreads], int value) {
  int low = 0, high = kScanThreads - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (sums[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

}  // namespace fa3
