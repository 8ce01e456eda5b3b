// Online softmax over a warpgroup's 64 rows of scores, in the registers that the tensor cores leave them in.
//
// A thread holds parts of two rows, `row` and `row + 8` of its warp's 16, and of these the columns 8 i + 2 (lane % 4) and
// the one after it. As a flat array: element 4 i + 2 r + c is row r, column 8 i + c.
#pragma once

#include "forward/config.cuh"

namespace fa3 {

// 2^x; MUFU.EX2, relative error 2^-22, results below the normal range are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The four threads of a quad share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// State of one thread's two rows over the blocks of keys.
struct OnlineSoftmax {
  float scale_log2;                              // softmax_scale * log2(e): exp(scale s) = 2^(scale_log2 s)
  float row_max[2] = {-INFINITY, -INFINITY};     // of the raw scores
  float row_sum[2] = {0.f, 0.f};                 // of this thread's columns; the quad adds up at the end

  // Turns scores into 2^(scale_log2 (s - max)) in place; returns what earlier results are to be multiplied by.
  template <class Scores>
  __device__ __forceinline__ void step(Scores& scores, float (&rescale)[2]) {
    constexpr int kBlocks = decltype(size(scores))::value / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = row_max[r];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        largest = fmaxf(largest, fmaxf(scores(4 * i + 2 * r), scores(4 * i + 2 * r + 1)));
      }
      largest = quad_max(largest);
      // A row that has seen nothing yet: exp2(-inf - 0) = 0, where -inf - -inf would be NaN.
      const float shift = largest == -INFINITY ? 0.f : largest * scale_log2;
      rescale[r] = exp2_approximate(row_max[r] * scale_log2 - shift);
      row_max[r] = largest;
      row_sum[r] *= rescale[r];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores(4 * i + 2 * r + c);
          score = exp2_approximate(score * scale_log2 - shift);
          row_sum[r] += score;
        }
      }
    }
  }
};

}  // namespace fa3
