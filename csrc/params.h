// What the host hands to a kernel: plain data, no Torch, no CUDA headers, no CuTe.
#pragma once

#include <cstdint>

namespace fa3 {

enum class DType { bf16, fp16, fp32 };
constexpr int bytes_of(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }

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

// What a visit of the continuation form does with the running state; also in reference.py.
constexpr int32_t kVisitFirst = 1;  // it is not read
constexpr int32_t kVisitLast = 2;   // the result goes to out instead

// Of ForwardParams::tile_counter: two counters, since a backward may be two kernels.
constexpr int32_t kCounterElements = 4;

// A diagonal that bounds nothing.
constexpr int32_t kNoBound = -1;

// Attention of a dense batch, or of ranges of packed tensors: batch 1, and range i holds the queries [q_start[i],
// q_start[i] + q_len[i]) and the keys [k_start[i], k_start[i] + k_len[i]), cut to the tensors. Query j of a sequence sees
// the keys [j + offset - window_left, j + offset + window_right].
// q, k, v: head_dim contiguous, 16-byte aligned, other strides multiples of 16 bytes and not 0 where an extent is > 1.
struct ForwardParams {
  const void* q;   // (batch, seqlen_q, heads, head_dim)
  const void* k;   // (batch, seqlen_k, kv_heads, head_dim)
  const void* v;   // (batch, seqlen_k, kv_heads, head_dim_v)
  void* out;       // (batch, seqlen_q, heads, head_dim_v), contiguous, of out_dtype; nullptr if no visit is the last
  float* lse;      // (batch, heads, seqlen_q), contiguous; of a call that starts anew nullptr, if nobody wants it
  float* out_acc;  // like out, contiguous: the running state, or nullptr if nothing is continued

  const int32_t* q_start;  // (ranges,) each; nullptr: dense
  const int32_t* q_len;
  const int32_t* k_start;
  const int32_t* k_len;
  const int32_t* offsets;  // (ranges,) or (batch,), or nullptr: `offset`
  const int32_t* flags;    // (ranges,) of kVisit*; given together with out_acc
  int32_t ranges;
  int32_t* workspace;      // of several ranges: workspace_elements(most_records()) of scratch memory
  int32_t* tile_counter;   // of others: kCounterElements that are 0 before and after every launch, used by one at a time

  Strides q_stride;
  Strides k_stride;
  Strides v_stride;

  int32_t batch;
  int32_t seqlen_q;    // at most kMaxSequence, as are seqlen_k, heads * batch and ranges
  int32_t seqlen_k;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;    // at most the row's; columns beyond count as 0
  int32_t head_dim_v;

  bool default_offset;    // the end of the queries meets the end of the keys; `offset` is not read
  int32_t offset;
  int32_t window_left;    // >= 0, or kNoBound
  int32_t window_right;
  float softmax_scale;
  float softcap;          // 0: none
  DType out_dtype;        // the inputs' or fp32
  int32_t sm_margin;      // SMs left to other kernels
  bool transposed;        // queries and keys are in each other's place: offsets count backwards
  bool ascending;         // the tiles of a range are drawn in ascending order
};

// Gradients of an attention: delta = rowsum(dout * out) - dlse, and what the forward took and gave (its out, out_acc and
// flags are not read). dout: as q. dq, dk, dv: shapes of q, k and v, contiguous, 16-byte aligned.
struct BackwardParams {
  ForwardParams forward;
  const void* dout;    // (batch, seqlen_q, heads, head_dim_v)
  const float* delta;  // as lse
  void* dq;
  void* dk;
  void* dv;
  float* dq_sum;       // elements_of_sum(forward, the row's head_dim) that dq is summed up in, unless separates_dq: scratch
                       // memory, or with accumulate what is added to, in dq's place, where it is not nullptr
  Strides dout_stride;
  DType dq_dtype;      // the inputs' or fp32
  DType dk_dtype;
  DType dv_dtype;
  bool accumulate;     // dq is fp32 and added to; the ranges' keys are disjoint, and without it the queries, too
  bool accumulate_kv;  // only with accumulate: so are dk and dv; else their rows that a query sees are written
  bool deterministic;  // gradients are bitwise equal from run to run
  int32_t key_parts;   // 1, or: the query heads of a KV head are taken in so many parts (key_parts_of)
  float* dkv_parts;    // then, unless they accumulate: scratch memory, elements_of_parts()
  int32_t* cleared;    // where dq_sum is scratch memory: so is this, an element for each part of a KV head of the batch
  int32_t* turns;      // deterministic, unless separates_dq: scratch memory, two elements for each of lse
  int32_t* query_workspace;  // of several ranges, and separates_dq: as forward.workspace, for query_records() tiles of queries
};

constexpr int32_t kMaxSequence = 1 << 30;

}  // namespace fa3
