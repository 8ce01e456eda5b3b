// dq = softmax_scale * dq_sum, in dq's dtype: the last pass where dq is not accumulated in place. Memory-bound.
#pragma once

#include "backward/epilogue.cuh"
#include "common/vector.cuh"

namespace fa3 {

constexpr int kConvertThreads = 256;

// A thread takes 16 columns of a row: what dq_sum_column permutes among themselves, where kPermuted.
template <class Output, int kHeadDim, bool kPermuted>
__global__ void __launch_bounds__(kConvertThreads)
    convert_dq_kernel(const float* dq_sum, Output* dq, int64_t rows, int head_dim, float scale) {
  constexpr int kPieces = kHeadDim / 16;
  const int64_t at = int64_t{blockIdx.x} * kConvertThreads + threadIdx.x;
  const int64_t row = at / kPieces;
  const int column = static_cast<int>(at % kPieces) * 16;
  if (row >= rows || column >= head_dim) return;
  const auto sum = load_global<16>(dq_sum + row * kHeadDim + column);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (column + 8 * half >= head_dim) break;
    Vec<Output, 8> result;
#pragma unroll
    for (int i = 8 * half; i < 8 * half + 8; ++i) {
      result.value[i % 8] = Output(scale * sum.value[kPermuted ? dq_sum_column(i) : i]);
    }
    *reinterpret_cast<Vec<Output, 8>*>(dq + row * head_dim + column + 8 * half) = result;
  }
}

template <class Output, int kHeadDim, bool kPermuted>
cudaError_t convert_dq(const float* dq_sum, void* dq, int64_t rows, int head_dim, float scale, cudaStream_t stream) {
  const int64_t blocks = (rows * (kHeadDim / 16) + kConvertThreads - 1) / kConvertThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  convert_dq_kernel<Output, kHeadDim, kPermuted><<<dim3(static_cast<unsigned>(blocks)), kConvertThreads, 0, stream>>>(
      dq_sum, static_cast<Output*>(dq), rows, head_dim, scale);
  return cudaGetLastError();
}

}  // namespace fa3
