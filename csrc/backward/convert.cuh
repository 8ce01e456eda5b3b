// dq = softmax_scale * dq_sum, in dq's dtype: the last pass where dq is not accumulated in place. Memory-bound.
#pragma once

#include "backward/epilogue.cuh"
#include "common/vector.cuh"

namespace fa3 {

constexpr int kConvertThreads = 256;

// How columns of dq_sum are arranged: as they are; permuted by dq_sum_column; and so that, besides, in odd rows the halves
// of each 32 have changed places (store_permuted_queries).
enum class SumColumns { kPlain, kPermuted, kSwapped };

// A thread takes 16 columns of a row. Rows of dq_sum are in the order (batch, heads, seqlen), those of dq in (batch,
// seqlen, heads).
template <class Output, int kHeadDim, SumColumns kColumns>
__global__ void __launch_bounds__(kConvertThreads)
    convert_dq_kernel(const float* dq_sum, Output* dq, int64_t rows, int seqlen, int heads, int head_dim, float scale) {
  constexpr int kPieces = kHeadDim / 16;
  const int64_t at = int64_t{blockIdx.x} * kConvertThreads + threadIdx.x;
  const int64_t row = at / kPieces;
  const int column = static_cast<int>(at % kPieces) * 16;
  if (row >= rows || column >= head_dim) return;
  const int64_t token = row / heads, batch = token / seqlen;
  const int64_t sum_row = (batch * heads + row % heads) * seqlen + token % seqlen;
  const int from = kColumns == SumColumns::kSwapped ? column ^ (token % seqlen % 2 * 16) : column;
  const auto sum = load_global<16>(dq_sum + sum_row * kHeadDim + from);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (column + 8 * half >= head_dim) break;
    Vec<Output, 8> result;
#pragma unroll
    for (int i = 8 * half; i < 8 * half + 8; ++i) {
      result.value[i % 8] = Output(scale * sum.value[kColumns == SumColumns::kPlain ? i : dq_sum_column(i)]);
    }
    *reinterpret_cast<Vec<Output, 8>*>(dq + row * head_dim + column + 8 * half) = result;
  }
}

template <class Output, int kHeadDim, SumColumns kColumns>
cudaError_t convert_dq(const BackwardParams& params, cudaStream_t stream) {
  const ForwardParams& forward = params.forward;
  const int64_t rows = int64_t{forward.batch} * forward.seqlen_q * forward.heads;
  const int64_t blocks = (rows * (kHeadDim / 16) + kConvertThreads - 1) / kConvertThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  convert_dq_kernel<Output, kHeadDim, kColumns><<<dim3(static_cast<unsigned>(blocks)), kConvertThreads, 0, stream>>>(
      params.dq_sum, static_cast<Output*>(params.dq), rows, forward.seqlen_q, forward.heads, forward.head_dim,
      forward.softmax_scale);
  return cudaGetLastError();
}

}  // namespace fa3
