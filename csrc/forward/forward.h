// Host entry of the forward family; defined in forward.cuh, one instance a row of instances.def.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace fa3 {

// Writes every element of params.out and params.lse, of which there is at least one.
// cudaErrorInvalidValue: a tensor that the copy engine cannot address (see ForwardParams).
template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream);

}  // namespace fa3
