// Host entries of the backward; defined in backward.cuh, one instance a row of instances.def.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace fa3 {

// Rows of a tile of BackwardParams::dq_sum.
constexpr int kSumTileRows = 16;

// Elements of BackwardParams::dq_sum: of every sequence, whole tiles.
inline int64_t elements_of_sum(const ForwardParams& forward, int head_dim) {
  const int64_t rows = (int64_t{forward.seqlen_q} + kSumTileRows - 1) / kSumTileRows * kSumTileRows;
  return int64_t{forward.batch} * forward.heads * rows * head_dim;
}

// Whether the row of this head_dim can give gradients that are bitwise equal from run to run (BackwardParams::turns).
constexpr bool takes_turns(int64_t head_dim) { return head_dim <= 192; }

// Gradients of `params`, of which no extent is 0: every row of dq, dk and dv, or, where params.accumulate is set, what the
// ranges add to them. cudaErrorInvalidValue: a tensor that the copy engine cannot address (see ForwardParams).
template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace fa3
