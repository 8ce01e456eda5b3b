// Descriptors for the bulk tensor copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "params.h"

namespace fa3 {

// cuTensorMapEncodeTiled, from the driver that is running: nothing links against libcuda.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encode;
}

// Describes a (batch, seqlen, heads, head_dim) tensor of 16-bit elements, read in boxes of `rows` rows by `columns` (32
// or 64) columns of a head, swizzled; what lies outside of the tensor reads as 0. False if the driver refuses.
inline bool make_tensor_map(CUtensorMap& map, DType dtype, const void* data, const Strides& stride, int batch,
                            int seqlen, int heads, int head_dim, int rows, int columns) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return false;
  constexpr cuuint64_t kElementBytes = 2;
  // NOTE: dims of extent 1 have stride 0, which the engine does not take; any multiple of 16 bytes will do there.
  const auto bytes = [](int64_t elements) { return elements == 0 ? 16 : elements * kElementBytes; };
  const cuuint64_t extents[4] = {cuuint64_t(head_dim), cuuint64_t(seqlen), cuuint64_t(heads), cuuint64_t(batch)};
  const cuuint64_t strides[3] = {bytes(stride.seqlen), bytes(stride.heads), bytes(stride.batch)};
  const cuuint32_t box[4] = {cuuint32_t(columns), cuuint32_t(rows), 1, 1};
  const cuuint32_t every[4] = {1, 1, 1, 1};
  const auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto swizzle = columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode(&map, type, 4, const_cast<void*>(data), extents, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace fa3
