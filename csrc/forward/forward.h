// Host entries of the forward; each is defined in a .cuh, one instance a row of instances.def.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace fa3 {

// Rows of queries and of keys that a block works on at a time; 64 rows of queries a consumer warpgroup.
struct TileShape {
  int queries;
  int keys;
};

// Attention of `params`, of which no extent is 0. Writes every row of out and lse, or, where params.flags is given, those
// of the visits. cudaErrorInvalidValue: a tensor that the copy engine cannot address (see ForwardParams).
template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream);

// Lists the tiles of params' ranges in params.workspace, which holds so many, those with the most keys first. A tile has rows
// of `heads_in_tile` heads. `early`: beside the kernel before, than which it ends no earlier.
cudaError_t launch_schedule(const ForwardParams& params, TileShape tile, int heads_in_tile, int64_t records,
                            cudaStream_t stream, bool early = false);

}  // namespace fa3
