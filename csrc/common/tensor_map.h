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

// Describes a tensor whose dim 0 is contiguous, read (or added to) in boxes of 64 or 128 bytes of columns, swizzled; what
// lies outside of the tensor reads as 0. Strides are those of dims 1 and up, in elements. False if the driver refuses.
template <int kDims>
bool make_tensor_map(CUtensorMap& map, DType dtype, const void* data, const int64_t (&extents)[kDims],
                     const int64_t (&strides)[kDims - 1], const int (&box)[kDims]) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return false;
  const cuuint64_t element_bytes = bytes_of(dtype);
  cuuint64_t sizes[kDims], bytes[kDims - 1];
  cuuint32_t boxes[kDims], every[kDims];
  for (int dim = 0; dim < kDims; ++dim) {
    sizes[dim] = static_cast<cuuint64_t>(extents[dim]);
    boxes[dim] = static_cast<cuuint32_t>(box[dim]);
    every[dim] = 1;
    // NOTE: dims of extent 1 have stride 0, which the engine does not take; any multiple of 16 bytes will do there.
    if (dim > 0) bytes[dim - 1] = strides[dim - 1] == 0 ? 16 : strides[dim - 1] * element_bytes;
  }
  const auto type = dtype == DType::fp32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto swizzle = box[0] * element_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode(&map, type, kDims, const_cast<void*>(data), sizes, bytes, boxes, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace fa3
