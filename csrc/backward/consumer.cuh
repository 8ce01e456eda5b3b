// A consumer warpgroup whose dQ lags a step behind: 64 keys of every tile.
//
// A step takes a block of queries of one head, and S^T, dP^T, P^T and dS^T stay in the registers that they come out in, for
// dV += P^T dO and dK += dS^T Q. dS also goes to shared memory, for dQ = dS K over the keys of both warpgroups, of which each
// takes half of the columns, or of the queries. A warpgroup multiplies dQ not of its step but of the one before, of which the
// other's dS has long been there: so neither waits for the other, and while one has products to issue, the other has
// weights to compute. The first step of warpgroup 1 starts half a step late; they keep that distance by themselves. Where there
// is room for one tile's keys only, dQ of a tile's last step is multiplied with it, between the writing of dV and of dK.
//
// In a step some product is always under way: dP under the weights, dV under dS, and dK, which reads half as much shared
// memory as the others, while dQ is stored there. A thread of the producer warpgroup then starts its bulk addition to global
// memory (add_query_blocks).
#pragma once

#include "backward/epilogue.cuh"
#include "forward/consumer.cuh"

namespace fa3 {

// Where a thread's elements lie in a tile of its warpgroup (forward/softmax.cuh).
struct ThreadRows {
  int row;     // the other one is row + 8
  int column;  // of element 0
};

// Hides the scores that the mask hides, and those of columns from `end_column` on; they begin at column `first_column`.
template <class Scores>
__device__ __forceinline__ void hide_scores(Scores& scores, const RowTile& tile, ThreadRows rows, int first_column,
                                            int end_column) {
  constexpr int kColumns = decltype(size(scores))::value / 2;  // a thread's of a row
  int first[2], end[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = tile.first_row + rows.row + 8 * r;
    first[r] = row + tile.sequence.first_diagonal;
    end[r] = row < tile.sequence.q_len ? row + tile.sequence.last_diagonal + 1 : INT32_MIN / 2;
  }
  if (tile.is_shared) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // NOTE: nothing is said of rows past the tile's last range.
      const KeyBounds8 columns = tile.bounds[rows.row + 8 * r];
      first[r] = columns.first;
      if (tile.first_row + rows.row + 8 * r < tile.sequence.q_len) end[r] = columns.end;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int hidden = columns_before(first[r] - first_column - rows.column);
    const int seen = columns_before(min(end[r], end_column) - first_column - rows.column);
#pragma unroll
    for (int word = 0; word < kColumns; word += 32) {
      const uint32_t visible = low_bits(seen - word) & ~low_bits(hidden - word);
#pragma unroll
      for (int column = word; column < word + 32 && column < kColumns; ++column) {
        float& score = scores(column / 2 * 4 + 2 * r + column % 2);
        score = visible >> (column - word) & 1 ? score : -INFINITY;
      }
    }
  }
}

// The same value, in a register: the compiler would rather compute it again, step after step, from special registers,
// which takes longer.
__device__ __forceinline__ int pinned(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
template <class Shared>
__device__ __forceinline__ Shared& pinned(Shared& shared) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(&shared));
  asm volatile("" : "+r"(address));
  return *static_cast<Shared*>(__cvta_shared_to_generic(address));
}

template <class AnyBarrier>
__device__ __forceinline__ void arrive_as_warp(int thread, AnyBarrier& barrier) {
  __syncwarp();
  if (thread % 32 == 0) barrier.arrive();
}

// The inverse of round_pair.
template <class Element>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  const auto both = cutlass::NumericArrayConverter<float, Element, 2>{}(
      reinterpret_cast<const cutlass::Array<Element, 2>&>(pair));
  return make_float2(both[0], both[1]);
}

// Writes a warpgroup's dS^T (64 keys from `first_key` on by a step's queries, rounded) in panels whose rows fill 128 bytes,
// swizzled: of 64 queries, whose rows are keys, or, where dQ^T is computed, of 64 keys: Config::LayoutDS. 16 queries at a time.
template <class Config, class Rounded>
__device__ __forceinline__ void store_weights(const Rounded& rounded, typename Config::Element* to, int first_key,
                                              int thread) {
  const int lane = thread % 32;
  const uint32_t first_panel = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const auto* const pairs = reinterpret_cast<const uint32_t*>(&rounded(0));
#pragma unroll
  for (int i = 0; i < Config::kQueries / 16; ++i) {
    if constexpr (Config::kTransposesDQ) {
      // A lane points at 8 keys of a query; upper lanes at the queries 8 further on.
      const int query = lane / 16 * 8 + lane % 8;
      const uint32_t piece = ((thread / 32 * 2 + lane / 8 % 2) ^ (lane % 8)) * 16;
      const uint32_t at = first_panel + (first_key / 64 * Config::kQueries + query) * 128 + piece + i * (16 * 128);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(pairs[4 * i]),
                   "r"(pairs[4 * i + 1]), "r"(pairs[4 * i + 2]), "r"(pairs[4 * i + 3])
                   : "memory");
    } else {
      // A lane points at 8 queries of a key; upper lanes at the next 8.
      const int key = first_key + thread / 32 * 16 + lane % 16;
      const uint32_t piece = (i % 4 * 32) ^ (((lane / 16) ^ (lane % 8)) * 16);
      const uint32_t at = first_panel + (i / 4 * Config::kKeys + key) * 128 + piece;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(pairs[4 * i]),
                   "r"(pairs[4 * i + 1]), "r"(pairs[4 * i + 2]), "r"(pairs[4 * i + 3])
                   : "memory");
    }
  }
}

template <class Config>
__device__ __forceinline__ void consume_queries(const BackwardArguments& arguments,
                                                        BackwardShared<Config>& storage) {
  auto& shared = pinned(storage);
  using Element = typename Config::Element;
  const BackwardParams& params = arguments.params;
  const ForwardParams& forward = params.forward;
  // NOTE: uniform over a warp for the compiler too, so that it keeps what follows from it in uniform registers.
  const int warpgroup = cutlass::canonical_warp_group_idx() - 1;
  const int thread = pinned(static_cast<int>(threadIdx.x % 128));
  const ThreadRows rows{warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4, thread % 4 * 2};
  const int group = forward.heads / forward.kv_heads;
  constexpr float kLog2E = 1.4426950408889634f;
  const float scale_log2 = (forward.softcap == 0.f ? forward.softmax_scale : forward.softcap) * kLog2E;

  typename Config::MmaS mma_s;
  typename Config::MmaDK mma_dk;
  typename Config::MmaDV mma_dv;
  typename Config::MmaDQ mma_dq;
  // NOTE: an operand in shared memory is the same for all threads of a warpgroup.
  const auto thread_s = mma_s.get_slice(warpgroup * 128);
  const auto thread_dk = mma_dk.get_slice(warpgroup * 128);
  const auto thread_dv = mma_dv.get_slice(warpgroup * 128);
  const auto thread_dq = mma_dq.get_slice(Config::kSplitsColumns ? 0 : warpgroup * 128);
  const auto as = [](Element* data, auto layout) __attribute__((always_inline)) {
    return make_tensor(make_smem_ptr(data), layout);
  };

  Tensor rS = partition_fragment_C(mma_s, Shape<Int<Config::kKeys>, Int<Config::kQueries>>{});
  Tensor rdK = partition_fragment_C(mma_dk, Shape<Int<Config::kKeys>, Int<Config::kHeadDim>>{});
  Tensor rdV = partition_fragment_C(mma_dv, Shape<Int<Config::kKeys>, Int<Config::kHeadDimV>>{});
  constexpr int kScores = decltype(size(rS))::value;

  Ring<kRowTileSlots> tile_ring;
  Ring<Config::kStagesK> k_ring;
  Ring<Config::kStagesV> v_ring;
  Ring<Config::kStages> ring;
  static_assert(Config::kStages == 2);
  int step = 0;
  uint32_t parity = 0;  // of the step
  // Of the tile: how many steps are to come, which blocks hide nothing, the first token of its queries.
  int steps = 0, first_plain = 0, end_open = 0, first_token = 0;
  int k_before = 0, token_before = 0;  // of the step before: stage of its keys, and its first_token
  // Whether the next tile's keys have a place of their own. If not, a tile's last dQ is multiplied before them.
  constexpr bool kKeepsKeys = Config::kStagesK > 1;
  // Whether the number of steps says what these two say: it is there anyway, but at head_dim 64 takes registers that are not.
  constexpr bool kCountsSteps = kKeepsKeys && Config::kSplitsColumns;
  uint32_t dq_parity = 1;  // of the wait for dQ's place
  bool is_stored = false;  // a dQ is there that has not been handed over

  const auto multiply_dq = [&](auto& rdQ, int ds_stage) __attribute__((always_inline)) {
    Element* const keys = shared.k[k_before] + first_column_dq<Config>(warpgroup) * Config::kKeys;
    const Tensor sdS = as(shared.ds[ds_stage], typename Config::LayoutDS{});
    const Tensor sKt = as(keys, typename Config::LayoutKt{});
    if constexpr (Config::kTransposesDQ) {
      multiply(mma_dq, thread_dq.partition_fragment_A(sKt), thread_dq.partition_fragment_B(sdS), rdQ, false);
    } else {
      multiply(mma_dq, thread_dq.partition_fragment_A(sdS), thread_dq.partition_fragment_B(sKt), rdQ, false);
    }
  };
  const auto store_dq = [&](auto& rdQ) __attribute__((always_inline)) {
    dq_parity ^= 1;
    is_stored = true;
    float* const panels = panels_of(shared, warpgroup);
    const bool in_dq = params.dq_sum == nullptr;
    if constexpr (Config::kTransposesDQ) {
      if (in_dq) {
        store_transposed_queries<Config, false>(rdQ, forward.softmax_scale, panels, thread);
      } else {
        store_transposed_queries<Config, true>(rdQ, 1.f, panels, thread);
      }
    } else if (in_dq) {
      store_queries<Config>(rdQ, forward.softmax_scale, panels, skipped_dq<Config>(warpgroup), thread);
    } else {
      store_permuted_queries<Config>(rdQ, panels, token_before, skipped_dq<Config>(warpgroup), thread);
    }
  };
  const auto hand_over_dq = [&]() __attribute__((always_inline)) {
    is_stored = false;
    cutlass::arch::fence_view_async_shared();
    arrive_as_warp(thread, shared.dq_full[warpgroup]);
  };
  // Multiplies and stores dQ of a step that no other follows before its keys make room.
  const auto finish_dq = [&](int ds_stage, uint32_t step_parity) __attribute__((always_inline)) {
    Tensor rdQ = partition_fragment_C(mma_dq, typename Config::ShapeDQ{});
    shared.step_done.wait(step_parity);
    multiply_dq(rdQ, ds_stage);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rdQ);
    if (!kKeepsKeys) arrive_as_warp(thread, shared.k_empty[k_before]);
    shared.dq_empty[warpgroup].wait(kCountsSteps ? step_parity ^ 1 : dq_parity);
    store_dq(rdQ);
    hand_over_dq();
  };

  while (true) {
    const RowTile& tile = shared.tiles.tile[tile_ring.stage()];
    const bool fresh = steps == 0;
    if (fresh) {
      // NOTE: before anything is waited for: the next keys come when both warpgroups have begun this tile, and the other one may
      // not have, since its last dQ finds no room until this one is on its way (add_query_blocks). Without kKeepsKeys none waits.
      if (kCountsSteps ? step >= 2 : is_stored) hand_over_dq();
      shared.tiles.full[tile_ring.stage()].wait(tile_ring.parity());
      if (tile.end) break;
      first_plain = tile.blocks.first_plain;
      end_open = tile.blocks.end_open;
      first_token = tile.sequence.k_base;
      steps = group * (tile.blocks.end - tile.blocks.first);
      shared.k_full[k_ring.stage()].wait(k_ring.parity());
    }
    if (step == 0 && warpgroup == 1) cutlass::arch::NamedBarrier::sync(256, 1);

    // S^T = K Q^T, dP^T = V dO^T
    const int stage = ring.stage();
    shared.step_full[0][stage].wait(ring.parity());
    multiply(mma_s, thread_s.partition_fragment_A(as(shared.k[k_ring.stage()], typename Config::LayoutK{})),
             thread_s.partition_fragment_B(as(shared.q[stage], typename Config::LayoutQ{})), rS, false);
    if (kCountsSteps ? !fresh && step >= 2 : is_stored) hand_over_dq();
    if (fresh) shared.v_full[v_ring.stage()].wait(v_ring.parity());
    Tensor rdP = make_tensor_like(rS);
    multiply(mma_s, thread_s.partition_fragment_A(as(shared.v[v_ring.stage()], typename Config::LayoutV{})),
             thread_s.partition_fragment_B(as(shared.dout[stage], typename Config::LayoutDO{})), rdP, false);
    const int block = shared.block[stage];
    const auto pair_of = [&](const float* row_values, int i) __attribute__((always_inline)) {
      return *reinterpret_cast<const float2*>(&row_values[8 * i + rows.column]);
    };
    float2 early_lse[Config::kEarlyLse], early_delta[Config::kEarlyDeltas];
#pragma unroll
    for (int i = 0; i < Config::kEarlyLse; ++i) early_lse[i] = pair_of(shared.lse_log2[stage], i);
    warpgroup_wait<1>();
    warpgroup_fence_operand(rS);

    // P = exp(S - lse)
    const bool capped = forward.softcap != 0.f;
    if (capped) {
      // dS is to be multiplied by 1 - tanh^2: for lack of registers that goes into dP, such that dP - delta has it.
      warpgroup_wait<0>();
      warpgroup_fence_operand(rdP);
      const float inner = forward.softmax_scale / forward.softcap;
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        rS(i) = tanh_accurate(rS(i) * inner);
        const float delta = shared.delta[stage][i / 4 * 8 + rows.column + i % 2];
        rdP(i) = (rdP(i) - delta) * (1.f - rS(i) * rS(i)) + delta;
      }
    }
    if (block < first_plain || block >= end_open) hide_scores(rS, tile, rows, block * Config::kQueries, INT32_MAX);
    Tensor rP = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Config::kQueries / 16>>>{});
    static_assert(size(rS) == size(rP));
    const auto weigh = [&](int from, int to) __attribute__((always_inline)) {
#pragma unroll
      for (int i = from; i < to; ++i) {
        const float2 lse = i < Config::kEarlyLse ? early_lse[i] : pair_of(shared.lse_log2[stage], i);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int at = 4 * i + 2 * r;
          rS(at) = exp2_approximate(rS(at) * scale_log2 - lse.x);
          rS(at + 1) = exp2_approximate(rS(at + 1) * scale_log2 - lse.y);
          if constexpr (Config::kEarlyWeights) {
            reinterpret_cast<uint32_t&>(rP(at)) = round_pair<Element>(rS(at), rS(at + 1));
          }
        }
      }
    };

    // dV += P^T dO, dS = P (dP - delta)
    const Tensor tDO = thread_dv.partition_fragment_B(as(shared.dout[stage], typename Config::LayoutDOt{}));
    constexpr int kFirst = Config::kFirstProducts;
    if constexpr (kFirst > 0) {
      weigh(0, 2 * kFirst);
      multiply<0, kFirst>(mma_dv, rP, tDO, rdV, !fresh);
    }
    weigh(2 * kFirst, kScores / 4);
    if constexpr (Config::kEarlyWeights) multiply<kFirst>(mma_dv, rP, tDO, rdV, kFirst > 0 || !fresh);
#pragma unroll
    for (int i = 0; i < Config::kEarlyDeltas; ++i) early_delta[i] = pair_of(shared.delta[stage], i);
    constexpr int kGroupsOfDV = !Config::kEarlyWeights ? 0 : kFirst == 0 ? 1 : 2;
    warpgroup_wait<kGroupsOfDV>();
    warpgroup_fence_operand(rdP);
    --steps;
    if (steps == 0) arrive_as_warp(thread, shared.v_empty[v_ring.stage()]);
    Tensor rdS = make_tensor_like(rP);
    if constexpr (Config::kRoundsWeights) {
#pragma unroll
      for (int i = 0; i < kScores; i += 2) {
        const float2 pair = unpack_pair<Element>(reinterpret_cast<uint32_t&>(rP(i)));
        rS(i) = pair.x, rS(i + 1) = pair.y;
      }
    }
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      const float2 delta = i < Config::kEarlyDeltas ? early_delta[i] : pair_of(shared.delta[stage], i);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = 4 * i + 2 * r;
        if constexpr (!Config::kEarlyWeights) {
          reinterpret_cast<uint32_t&>(rP(at)) = round_pair<Element>(rS(at), rS(at + 1));
        }
        reinterpret_cast<uint32_t&>(rdS(at)) =
            round_pair<Element>(rS(at) * (rdP(at) - delta.x), rS(at + 1) * (rdP(at + 1) - delta.y));
      }
    }

    if constexpr (!Config::kEarlyWeights) multiply(mma_dv, rP, tDO, rdV, !fresh);

    // dQ = dS K of the step before, into whose place dS of the next step then goes; dK += dS^T Q, under which dQ is stored
    shared.step_done.wait(parity ^ 1);
    if (step == 0 && warpgroup == 0) cutlass::arch::NamedBarrier::arrive(256, 1);
    store_weights<Config>(rdS, shared.ds[stage], warpgroup * 64, thread);
    if constexpr (!Config::kFencesLate) cutlass::arch::fence_view_async_shared();
    // NOTE: at a first step there is no step before, yet dQ is multiplied, from whatever lies there, and forgotten: a
    // product that depends on a branch makes the compiler wait for each.
    Tensor rdQ = partition_fragment_C(mma_dq, typename Config::ShapeDQ{});
    multiply_dq(rdQ, 1 - stage);
    multiply(mma_dk, rdS, thread_dk.partition_fragment_B(as(shared.q[stage], typename Config::LayoutQt{})), rdK, !fresh);
    if constexpr (Config::kFencesLate) cutlass::arch::fence_view_async_shared();
    const bool has_dq = kKeepsKeys ? step > 0 : !fresh;
    if (has_dq) shared.dq_empty[warpgroup].wait(kCountsSteps ? parity : dq_parity);
    warpgroup_wait<1>();
    warpgroup_fence_operand(rdV);
    warpgroup_fence_operand(rdQ);
    if (has_dq) store_dq(rdQ);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rdK);
    shared.step_empty[0][stage].arrive();
    arrive_as_warp(thread, shared.step_done);
    if (kKeepsKeys && fresh && step > 0) arrive_as_warp(thread, shared.k_empty[k_before]);
    k_before = k_ring.stage();
    token_before = first_token;

    if (steps == 0) {
      write_rows<Element>(rdV, 1.f, params.dv, params.dv_dtype, forward.head_dim_v, forward.seqlen_k,
                          arguments.written_heads, written_head(params, tile), params.accumulate_kv, tile, rows.row);
      if constexpr (!kKeepsKeys) {
        if (is_stored) hand_over_dq();
        finish_dq(stage, parity);
      }
      write_rows<Element>(rdK, forward.softmax_scale, params.dk, params.dk_dtype, forward.head_dim, forward.seqlen_k,
                          arguments.written_heads, written_head(params, tile), params.accumulate_kv, tile, rows.row);
      shared.tiles.empty[tile_ring.stage()].arrive();
      tile_ring.advance();
      k_ring.advance();
      v_ring.advance();
    }
    ring.advance();
    parity ^= 1;
    ++step;
  }

  if (kKeepsKeys && step > 0) finish_dq(1 - ring.stage(), parity ^ 1);
}

}  // namespace fa3
