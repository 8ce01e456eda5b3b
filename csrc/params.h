// What the host hands to a kernel: plain data, no Torch, no CUDA headers, no CuTe.
#pragma once

#include <cstdint>

namespace fa3 {

enum class DType { bf16, fp16, fp32 };

// Distances in elements between neighbours along each dim of a (batch, seqlen, heads, head_dim) tensor.
// NOTE: 64 bits: a tensor with more than 2**31 elements is normal here. A packed tensor has batch 1; dims of
// extent 1 get stride 0, so that their meaningless strides never decide how we load.
struct Strides {
  int64_t batch;
  int64_t seqlen;
  int64_t heads;
  int64_t head_dim;
};

// delta (batch, heads, seqlen) = sum over head_dim of dout * out, minus dlse.
struct DeltaParams {
  const void* dout;
  const void* out;
  const float* dlse;  // (batch, heads, seqlen) or nullptr
  float* delta;       // contiguous

  Strides dout_stride;
  Strides out_stride;
  Strides dlse_stride;  // head_dim unused

  int64_t batch;
  int64_t seqlen;
  int64_t heads;
  int64_t head_dim;
  DType out_dtype;
};

// Attention of a dense batch. Query i sees the keys j with i + first_diagonal <= j <= i + last_diagonal; without a
// bound on a side its diagonal lies outside of the keys.
// q, k, v: head_dim contiguous, 16-byte aligned, other strides multiples of 16 bytes and not 0 where an extent is > 1.
struct ForwardParams {
  const void* q;  // (batch, seqlen_q, heads, head_dim)
  const void* k;  // (batch, seqlen_k, kv_heads, head_dim)
  const void* v;  // (batch, seqlen_k, kv_heads, head_dim_v)
  void* out;      // (batch, seqlen_q, heads, head_dim_v), contiguous, q's dtype
  float* lse;     // (batch, heads, seqlen_q), contiguous
  int32_t* tile_counter;  // one element of scratch memory

  Strides q_stride;
  Strides k_stride;
  Strides v_stride;

  int32_t batch;
  int32_t seqlen_q;
  int32_t seqlen_k;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;    // at most the row's; columns beyond count as 0
  int32_t head_dim_v;
  int32_t first_diagonal;
  int32_t last_diagonal;
  float softmax_scale;
  int32_t sm_margin;  // SMs left to other kernels
};

}  // namespace fa3
