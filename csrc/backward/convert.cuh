// dq = softmax_scale * dq_sum, in dq's dtype: the last pass where dq is not summed up in dq itself. Memory-bound.
#pragma once

#include "backward/epilogue.cuh"
#include "common/vector.cuh"

namespace fa3 {

constexpr int kConvertThreads = 256;

// Writes 8 columns of a row of dq, scaled.
template <class Output, class Sum>
__device__ __forceinline__ void store_scaled(const Sum& sum, float scale, Output* to) {
  Vec<Output, 8> result;
#pragma unroll
  for (int i = 0; i < 8; ++i) result.value[i] = Output(scale * sum(i));
  *reinterpret_cast<Vec<Output, 8>*>(to) = result;
}

// A thread takes 16 columns of a row. The heads of dq_sum are in the order (batch, heads, seqlen), the rows of dq in (batch,
// seqlen, heads); columns of dq_sum are as consumers write them (dq_sum_column).
template <class Output, int kHeadDim>
__global__ void __launch_bounds__(kConvertThreads)
    convert_dq_kernel(const float* dq_sum, Output* dq, int64_t rows, int seqlen, int heads, int head_dim, float scale) {
  const int64_t at = int64_t{blockIdx.x} * kConvertThreads + threadIdx.x;
  constexpr int kPieces = kHeadDim / 16;
  const int64_t row = at / kPieces;
  const int column = static_cast<int>(at % kPieces) * 16;
  if (row >= rows || column >= head_dim) return;
  const int64_t token = row / heads, batch = token / seqlen;
  const int64_t sum_row = (batch * heads + row % heads) * seqlen + token % seqlen;
  constexpr bool kTransposed = transposes_dq(kHeadDim);
  const int from = kTransposed ? column : column ^ (token % seqlen % 2 * 16);  // as store_permuted_queries has it
  const auto sum = load_global<16>(dq_sum + sum_row * kHeadDim + from);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (column + 8 * half >= head_dim) break;
    store_scaled<Output>([&](int i) { return sum.value[dq_sum_column<kTransposed>(8 * half + i)]; }, scale,
                         dq + row * head_dim + column + 8 * half);
  }
}

template <class Output, int kHeadDim>
cudaError_t launch_convert_dq(const BackwardParams& params, cudaStream_t stream) {
  const ForwardParams& forward = params.forward;
  const int64_t rows = int64_t{forward.batch} * forward.seqlen_q * forward.heads;
  const int64_t threads = elements_of_sum(forward, kHeadDim) / 16;
  const int64_t blocks = (threads + kConvertThreads - 1) / kConvertThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  convert_dq_kernel<Output, kHeadDim><<<dim3(static_cast<unsigned>(blocks)), kConvertThreads, 0, stream>>>(
      params.dq_sum, static_cast<Output*>(params.dq), rows, forward.seqlen_q, forward.heads, forward.head_dim,
      forward.softmax_scale);
  return cudaGetLastError();
}

template <class Element, int kHeadDim>
cudaError_t convert_dq(const BackwardParams& params, cudaStream_t stream) {
  return params.dq_dtype == DType::fp32 ? launch_convert_dq<float, kHeadDim>(params, stream)
                                        : launch_convert_dq<Element, kHeadDim>(params, stream);
}

// A thread takes 8 elements.
template <class Output>
__global__ void __launch_bounds__(kConvertThreads) round_dq_kernel(const float* sum, Output* dq, int64_t pieces) {
  const int64_t at = int64_t{blockIdx.x} * kConvertThreads + threadIdx.x;
  if (at >= pieces) return;
  const auto values = load_global<8>(sum + 8 * at);
  store_scaled<Output>([&](int i) { return values.value[i]; }, 1.f, dq + 8 * at);
}

// The same where the sum is scaled, and its rows are dq's; dq_dtype is the inputs'.
template <class Element>
cudaError_t round_dq(const BackwardParams& params, cudaStream_t stream) {
  const ForwardParams& forward = params.forward;
  const int64_t pieces = int64_t{forward.batch} * forward.seqlen_q * forward.heads * forward.head_dim / 8;
  const int64_t blocks = (pieces + kConvertThreads - 1) / kConvertThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  round_dq_kernel<<<dim3(static_cast<unsigned>(blocks)), kConvertThreads, 0, stream>>>(
      params.dq_sum, static_cast<Element*>(params.dq), pieces);
  return cudaGetLastError();
}

}  // namespace fa3
