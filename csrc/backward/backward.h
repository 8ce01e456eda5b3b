// Host entries of the backward; defined in backward.cuh, one instance a row of instances.def.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace fa3 {

// Gradients of `params`, of which no extent is 0: every row of dq, dk and dv, or, where params.accumulate is set, what the
// ranges add to them. cudaErrorInvalidValue: a tensor that the copy engine cannot address (see ForwardParams).
template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace fa3
