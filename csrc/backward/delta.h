// Host entry of the delta family; defined in delta.cuh, one instance a row of instances.def.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace fa3 {

// Writes every element of params.delta, of which there is at least one.
// cudaErrorInvalidConfiguration: an extent near 2**31, or more tiles than a grid holds.
template <DType kDout>
cudaError_t launch_delta(const DeltaParams& params, cudaStream_t stream);

}  // namespace fa3
