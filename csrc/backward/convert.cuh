// The last passes, memory-bound: dq = softmax_scale * dq_sum, in dq's dtype, where dq is not summed up in dq itself; and the
// sums of dk's and dv's parts.
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

// Gradients of a row of keys and a KV head, one behind the other for each of its parts.
struct Parts {
  const float* parts;
  void* sum;
  DType dtype;
  int head_dim;
};

// A thread takes 8 columns of a row; blocks with y 0 take dk's, those with y 1 dv's.
template <class Element>
__global__ void __launch_bounds__(kConvertThreads) sum_parts_kernel(const Parts dk, const Parts dv, int64_t rows, int count) {
  const bool is_dv = blockIdx.y == 1;
  const Parts of{is_dv ? dv.parts : dk.parts, is_dv ? dv.sum : dk.sum, is_dv ? dv.dtype : dk.dtype,
                 is_dv ? dv.head_dim : dk.head_dim};
  const int64_t at = int64_t{blockIdx.x} * kConvertThreads + threadIdx.x;
  const int pieces = of.head_dim / 8;
  const int64_t row = at / pieces;
  if (row >= rows) return;
  const float* part = of.parts + row * count * of.head_dim + at % pieces * 8;
  auto sum = load_global<8>(part);
  for (int i = 1; i < count; ++i) {
    part += of.head_dim;
    const auto next = load_global<8>(part);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.value[j] += next.value[j];
  }
  const auto value = [&](int i) { return sum.value[i]; };
  if (of.dtype == DType::fp32) {
    store_scaled(value, 1.f, static_cast<float*>(of.sum) + 8 * at);
  } else {
    store_scaled(value, 1.f, static_cast<Element*>(of.sum) + 8 * at);
  }
}

// dk and dv of `params` from those of `parts`, its in_parts().
template <class Element>
cudaError_t sum_parts(const BackwardParams& params, const BackwardParams& parts, cudaStream_t stream) {
  const ForwardParams& forward = params.forward;
  const int64_t rows = int64_t{forward.batch} * forward.seqlen_k * forward.kv_heads;
  const int64_t threads = rows * std::max(forward.head_dim, forward.head_dim_v) / 8;
  const int64_t blocks = (threads + kConvertThreads - 1) / kConvertThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto of = [](const void* from, void* to, DType dtype, int head_dim) {
    return Parts{static_cast<const float*>(from), to, dtype, head_dim};
  };
  sum_parts_kernel<Element><<<dim3(static_cast<unsigned>(blocks), 2), kConvertThreads, 0, stream>>>(
      of(parts.dk, params.dk, params.dk_dtype, forward.head_dim), of(parts.dv, params.dv, params.dv_dtype, forward.head_dim_v),
      rows, params.key_parts);
  return cudaGetLastError();
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
