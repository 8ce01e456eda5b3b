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

}  // namespace fa3
