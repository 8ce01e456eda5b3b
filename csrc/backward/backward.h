// Host entries of the backward; defined in backward.cuh, one instance a row of instances.def.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace fa3 {

// Whether dq has a kernel of its own (query_gradient.cuh), by the row's head_dim: where two products more cost less than
// additions to memory. Gradients are then bitwise equal from run to run; else they are if tiles take turns (turns.cuh).
constexpr bool separates_dq(int64_t head_dim) { return head_dim > 128; }

// Elements of BackwardParams::dq_sum.
inline int64_t elements_of_sum(const ForwardParams& forward, int64_t head_dim) {
  return int64_t{forward.batch} * forward.heads * forward.seqlen_q * head_dim;
}

// Gradients of `params`, of which no extent is 0: every row of dq, dk and dv, or, where params.accumulate is set, what the
// ranges add to dq, and to dk and dv or write there. cudaErrorInvalidValue: a tensor that the copy engine cannot address
// (see ForwardParams).
template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream);

// dq, in dq_dtype, of the sum that backwards with accumulate have added to: params.dq_sum, whose rows are dq's if
// separates_dq. Reads the queries' extents and softmax_scale beside these.
template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_rounding(const BackwardParams& params, cudaStream_t stream);

}  // namespace fa3
