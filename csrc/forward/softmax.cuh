// Online softmax over a warpgroup's 64 rows of scores, in the registers that the tensor cores leave them in.
//
// A thread holds parts of two rows, `row` and `row + 8` of its warp's 16, and of these the columns 8 i + 2 (lane % 4) and
// the one after it. As a flat array: element 4 i + 2 r + c is row r, column 8 i + c.
//
// Weights are 2^(scale_log2 s - reference). Any reference near the row's maximum gives the same result, since it cancels
// against the row's sum. Finding the maximum is what stands between the two matrix products, so most blocks do not look
// for it: `step_unseen` keeps the reference of the blocks before and looks at the sum of the weights afterwards.
#pragma once

#include "forward/config.cuh"

namespace fa3 {

// 2^x; MUFU.EX2, relative error 2^-22, results below the normal range are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) and 1 / x of normal numbers or 0.
__device__ __forceinline__ float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh(x), absolute error 1e-6.
__device__ __forceinline__ float tanh_accurate(float x) {
  // NOTE: tanh.approx errs by 2^-11 of the score, which softcap multiplies.
  return 1.f - __fdividef(2.f, exp2_approximate(x * (2.f * 1.4426950408889634f)) + 1.f);
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
  // How far weights may outgrow 1 before the reference follows. Both leave room in fp16, whose largest number is 2^16.
  static constexpr float kSlackBits = 8.f;       // of one weight, where the maximum is known
  static constexpr float kLargestSum = 1024.f;   // of a thread's weights in a block, where it is not

  static constexpr float kLargestScale = 1e30f;  // below 2^126, whose inverse exp2_approximate still gives

  float reference[2] = {-INFINITY, -INFINITY};  // in powers of 2; -inf: no key seen yet
  float sum[2] = {0.f, 0.f};                    // of this thread's columns; the quad adds up at the end
  bool lost = false;                            // a weight overflowed: this warp's rows are worthless

  // Turns scores into weights in place, whatever they are. True if earlier results have to be multiplied by `rescale`.
  template <class Scores>
  __device__ __forceinline__ bool step(Scores& scores, float scale_log2, float (&rescale)[2]) {
    constexpr int kBlocks = decltype(size(scores))::value / 4;
    float largest[2][2];  // two chains a row: the maximum's latency is waited for
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float score = scores(4 * i + 2 * r + c);
          largest[r][c] = i == 0 ? score : fmaxf(largest[r][c], score);
        }
      }
    }
    float shift[2];
    bool grows = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float candidate = quad_max(fmaxf(largest[r][0], largest[r][1])) * scale_log2;
      const float before = reference[r];
      // NOTE: -inf - -inf is NaN, which is not larger.
      const bool follows = candidate - before > kSlackBits;
      if (follows) reference[r] = candidate;
      shift[r] = reference[r] == -INFINITY ? 0.f : reference[r];  // exp2(-inf - 0) = 0, where -inf - -inf would be NaN
      rescale[r] = follows ? exp2_approximate(before - shift[r]) : 1.f;
      sum[r] *= rescale[r];
      grows = grows || follows;
    }
    float block_sum[2][2];
    weigh(scores, scale_log2, shift, block_sum, [](int) {}, [](auto&, auto&) {});
    sum[0] += block_sum[0][0] + block_sum[0][1];
    sum[1] += block_sum[1][0] + block_sum[1][1];
    return __any_sync(0xffffffffu, grows);
  }

  // The same for rows that have all seen a key, without looking for the maximum first; rounds each pair of weights by
  // round(index of the first), and calls middle(shift, block_sum) half-way. If a sum shows that the reference lags too far
  // behind, all is scaled down by a power of 2, which is exact; a weight that overflowed has no value left to scale, and
  // `lost` says so.
  template <class Scores, class Round, class Middle>
  __device__ __forceinline__ bool step_unseen(Scores& scores, float scale_log2, float (&rescale)[2], Round round,
                                              Middle middle) {
    constexpr int kBlocks = decltype(size(scores))::value / 4;
    float block_sum[2][2];
    weigh(scores, scale_log2, reference, block_sum, round, middle);
    block_sum[0][0] += block_sum[0][1];
    block_sum[1][0] += block_sum[1][1];
    const bool grows = __any_sync(0xffffffffu, fmaxf(block_sum[0][0], block_sum[1][0]) >= kLargestSum);
    if (rarely(grows)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float most = quad_max(block_sum[r][0]);
        const float bits = most >= kLargestSum ? floorf(log2f(most)) : 0.f;
        lost = lost || most > kLargestScale;
        rescale[r] = exp2_approximate(-bits);
        reference[r] += bits;
        sum[r] *= rescale[r];
        block_sum[r][0] *= rescale[r];
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
          scores(4 * i + 2 * r) *= rescale[r];
          scores(4 * i + 2 * r + 1) *= rescale[r];
          round(4 * i + 2 * r);
        }
      }
    }
    sum[0] += block_sum[0][0];
    sum[1] += block_sum[1][0];
    return grows;
  }

 private:
  template <class Scores, class Round, class Middle>
  __device__ __forceinline__ static void weigh(Scores& scores, float scale_log2, const float (&reference)[2],
                                               float (&block_sum)[2][2], Round round, Middle middle) {
    constexpr int kBlocks = decltype(size(scores))::value / 4;
    float shift[2] = {reference[0], reference[1]};
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (i == kBlocks / 2) middle(shift, block_sum);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores(4 * i + 2 * r + c);
          score = exp2_approximate(score * scale_log2 - shift[r]);
          block_sum[r][c] = i == 0 ? score : block_sum[r][c] + score;
        }
        round(4 * i + 2 * r);
      }
    }
  }
};

}  // namespace fa3
