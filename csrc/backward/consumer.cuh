// A consumer warpgroup: 64 keys of every tile, or half of the gradients' columns of the 64 keys that it shares.
//
// A step takes a block of queries of one head. S^T = K Q^T and dP^T = V dO^T come out as 64 keys by queries, for a
// warpgroup with keys of its own in the very registers from which P^T and dS^T = P^T (dP^T - delta) go into dV += P^T dO
// and dK += dS^T Q. dS passes through shared memory, where the warpgroups' keys meet for dQ = dS K; where keys are shared,
// so does P. dK and dV stay in registers over all blocks of all query heads of the KV head: they need no reduction.
#pragma once

#include "backward/epilogue.cuh"
#include "forward/consumer.cuh"

namespace fa3 {

// Where a thread's elements lie in a tile of its warpgroup (forward/softmax.cuh).
struct ThreadRows {
  int row;     // the other one is row + 8
  int column;  // of element 0
};

// Hides the scores that the mask hides: rows are keys, columns the queries from `first_query` on.
template <class Config, class Scores>
__device__ __forceinline__ void hide_queries(Scores& scores, const KeyTile& tile, ThreadRows rows, int first_query) {
  constexpr int kColumns = Config::kQueriesOfWarpgroup / 4;  // a thread's
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = tile.first_key + rows.row + 8 * r;
    const int before = key + tile.sequence.first_diagonal - first_query - rows.column;
    const int end = key + tile.sequence.last_diagonal + 1 - first_query - rows.column;
    const int hidden = columns_before(before), seen = key < tile.sequence.q_len ? columns_before(end) : 0;
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

// Writes P^T or dS^T (a warp's 16 keys by the warpgroup's queries, rounded) in panels of 64 queries, of which a key's fill
// 128 bytes, swizzled: Config::LayoutP and Config::LayoutDS.
template <class Config, class Rounded>
__device__ __forceinline__ void store_weights(const Rounded& rounded, typename Config::Element* to, int thread) {
  // NOTE: opaque, since else the compiler keeps all that follows from it in registers, and there are none to spare.
  asm volatile("" : "+r"(thread));
  const int lane = thread % 32;
  const int key = (Config::kSharesKeys ? thread % 128 : thread) / 32 * 16 + lane % 16;
  const uint32_t row = static_cast<uint32_t>(__cvta_generic_to_shared(to)) + key * 128;
  // Of 16-byte pieces; upper lanes point at the next piece, and a second warpgroup that shares keys at the second half.
  const int swizzle = (lane / 16) ^ (key % 8) ^ (Config::kSharesKeys ? thread / 128 * 4 : 0);
  const auto* const pairs = reinterpret_cast<const uint32_t*>(&rounded(0));
#pragma unroll
  for (int i = 0; i < Config::kQueriesOfWarpgroup / 8; i += 2) {
    const uint32_t piece = row + i / 8 * (Config::kKeys * 128) + (((i % 8) ^ swizzle) * 16);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(piece), "r"(pairs[2 * i]),
                 "r"(pairs[2 * i + 1]), "r"(pairs[2 * i + 2]), "r"(pairs[2 * i + 3])
                 : "memory");
  }
}

template <class Config>
__device__ __forceinline__ void consume_queries(const BackwardArguments& arguments, BackwardShared<Config>& shared) {
  using Element = typename Config::Element;
  const BackwardParams& params = arguments.params;
  const ForwardParams& forward = params.forward;
  const int thread = threadIdx.x - 128;
  const int warpgroup = thread / 128;
  const int thread_of_keys = Config::kSharesKeys ? thread % 128 : thread;
  const ThreadRows rows{thread_of_keys / 32 * 16 + thread % 32 / 4,
                        thread % 4 * 2 + (Config::kSharesKeys ? warpgroup * Config::kQueriesOfWarpgroup : 0)};
  // Where a warpgroup's part of the gradients begins.
  const int column_dk = Config::kSharesKeys ? warpgroup * Config::kColumnsDK : 0;
  const int column_dv = Config::kSharesKeys ? warpgroup * Config::kColumnsDV : 0;
  const int thread_of_queries = Config::kSplitsColumns ? thread % 128 : thread;
  const int first_row_dq = Config::kSplitsColumns ? 0 : warpgroup * 64;
  const int column_dq = Config::kSplitsColumns ? warpgroup * (Config::kHeadDim - Config::kColumnsDQ) : 0;
  const int skipped_dq = Config::kSplitsColumns ? warpgroup * (2 * Config::kColumnsDQ - Config::kHeadDim) : 0;
  float* const panels_dq = shared.dq + (Config::kSplitsColumns ? column_dq * 64 : warpgroup * 64 * Config::kHeadDim);
  const bool packed = forward.q_start != nullptr;
  const int group = forward.heads / forward.kv_heads;
  constexpr float kLog2E = 1.4426950408889634f;
  const float scale_log2 = (forward.softcap == 0.f ? forward.softmax_scale : forward.softcap) * kLog2E;

  typename Config::MmaS mma_s;
  typename Config::MmaDK mma_dk;
  typename Config::MmaDV mma_dv;
  typename Config::MmaDQ mma_dq;
  const auto thread_s = mma_s.get_slice(thread);
  const auto thread_dk = mma_dk.get_slice(thread_of_keys);
  const auto thread_dv = mma_dv.get_slice(thread_of_keys);
  const auto thread_dq = mma_dq.get_slice(thread_of_queries);
  const auto as = [](Element* data, auto layout) __attribute__((always_inline)) {
    // NOTE: opaque, since else the compiler keeps the descriptors of all operands in registers, and there are none to spare.
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(data));
    asm volatile("" : "+r"(address));
    return make_tensor(make_smem_ptr(static_cast<Element*>(__cvta_shared_to_generic(address))), layout);
  };

  Tensor rS = partition_fragment_C(mma_s, Shape<Int<Config::kKeys>, Int<Config::kQueries>>{});
  Tensor rdP = make_tensor_like(rS);
  Tensor rdK = partition_fragment_C(mma_dk, Shape<Int<Config::kKeys>, Int<Config::kColumnsDK>>{});
  Tensor rdV = partition_fragment_C(mma_dv, Shape<Int<Config::kKeys>, Int<Config::kColumnsDV>>{});
  Tensor rP = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Config::kQueriesOfWarpgroup / 16>>>{});
  Tensor rdS = make_tensor_like(rP);
  static_assert(size(rS) == size(rP));
  constexpr int kScores = decltype(size(rS))::value;

  // Of the step whose gradients come next: its tile (which they are in, in turn, says slot and stages of K and V), its
  // query head of the group, its block.
  int tile_index = -1, head = 0, block = 0;
  Ring<Config::kStages> ring;  // of the scores' step
  static_assert(Config::kStages == 2);
  const auto stage_of = [](int index, auto stages) { return decltype(stages)::value == 1 ? 0 : index % 2; };
  const auto parity_of = [](int index, auto stages) { return decltype(stages)::value == 1 ? index % 2 : index / 2 % 2; };
  constexpr Int<kKeyTileSlots> kSlots;
  constexpr Int<Config::kStagesK> kStagesK;
  constexpr Int<Config::kStagesV> kStagesV;
  bool fresh = true;           // it is its tile's first: rdK and rdV hold nothing
  bool running = false;        // there is such a step

  while (true) {
    // An iteration takes the scores of a step, and the gradients of the step before, whose tile may be another.
    const int slot = stage_of(tile_index & 3, kSlots), k_stage = stage_of(tile_index & 3, kStagesK);
    const bool tile_ends = !running || (head == group - 1 && block == shared.tile[slot].blocks.end - 1);
    bool more = true;  // there are scores to compute
    int scores_tile = tile_index;
    if (tile_ends) {
      if (running && kStagesK == 1) {
        more = false;  // the next tile's keys come when this one's are no longer needed
      } else {
        ++scores_tile;
        const int next = stage_of(scores_tile, kSlots);
        shared.tile_full[next].wait(parity_of(scores_tile, kSlots));
        more = !shared.tile[next].end;
        if (!more && !running) break;
        if (more) shared.k_full[stage_of(scores_tile, kStagesK)].wait(parity_of(scores_tile, kStagesK));
      }
    }

    // S^T = K Q^T, where there are registers for it, under what follows.
    // NOTE: at the start there are no gradients, and at the end no scores, yet all is multiplied, from whatever lies there,
    // and forgotten: a product that depends on a branch makes the compiler wait for each. And none is under way when the
    // loop closes: the compiler would wait for each then, too.
    const auto multiply_s = [&]() __attribute__((always_inline)) {
      if (more) shared.q_full[ring.stage].wait(ring.parity);
      Element* const sK = shared.k[stage_of(scores_tile, kStagesK)];
      multiply(mma_s, thread_s.partition_fragment_A(as(sK, typename Config::LayoutK{})),
               thread_s.partition_fragment_B(as(shared.q[ring.stage], typename Config::LayoutQ{})), rS, false);
    };
    if constexpr (Config::kEarlyScores) multiply_s();

    // Of the step before: dQ = dS K, dK += dS^T Q
    const int stage = ring.stage, stage_before = 1 - ring.stage;
    if (running) {
      if constexpr (Config::kSharesKeys) store_weights<Config>(rP, shared.p[stage_before], thread);
      store_weights<Config>(rdS, shared.ds[stage_before], thread);
    }
    cutlass::arch::fence_view_async_shared();
    if constexpr (Config::kBulkDQ) {
      if (thread % 128 == 0) tma_store_wait<0>();  // the step before's dQ has left shared memory
    }
    cutlass::arch::NamedBarrier::sync(128 * Config::kConsumers, 0);
    const auto multiply_dv = [&](auto&& weights, int stage, bool first) __attribute__((always_inline)) {
      Element* const sdO = shared.dout[stage] + column_dv * Config::kQueries;
      multiply(mma_dv, weights, thread_dv.partition_fragment_B(as(sdO, typename Config::LayoutDOt{})), rdV, !first);
    };
    Tensor rdQ = partition_fragment_C(mma_dq, Shape<Int<Config::kQueries>, Int<Config::kColumnsDQ>>{});
    multiply(mma_dq, thread_dq.partition_fragment_A(as(shared.ds[stage_before], typename Config::LayoutDS{})),
             thread_dq.partition_fragment_B(
                 as(shared.k[k_stage] + column_dq * Config::kKeys, typename Config::LayoutKt{})),
             rdQ, false);
    const auto sQt = thread_dk.partition_fragment_B(
        as(shared.q[stage_before] + column_dk * Config::kQueries, typename Config::LayoutQt{}));
    if constexpr (Config::kSharesKeys) {
      multiply_dv(thread_dv.partition_fragment_A(as(shared.p[stage_before], typename Config::LayoutP{})), stage_before,
                  fresh);
    }
    // NOTE: rdS would do as well where keys are not shared, but the scores need the registers.
    multiply(mma_dk, thread_dk.partition_fragment_A(as(shared.ds[stage_before], typename Config::LayoutP{})), sQt, rdK,
             !fresh);
    warpgroup_wait<Config::kSharesKeys ? 2 : 1>();
    if constexpr (Config::kEarlyScores) warpgroup_fence_operand(rS);
    warpgroup_fence_operand(rdQ);
    if (running) {
      const KeyTile& tile = shared.tile[slot];
      const int query_head = tile.kv_head * group + head;
      if constexpr (Config::kBulkDQ) {
        store_queries<Config>(rdQ, params.accumulate ? forward.softmax_scale : 1.f, panels_dq, skipped_dq,
                              threadIdx.x % 128);
        cutlass::arch::fence_view_async_shared();
        cutlass::arch::NamedBarrier::sync(128, 1 + warpgroup);
        if (thread % 128 == 0) {
          const int skipped_panels = skipped_dq / Config::kColumnsPanelDQ;
          add_panels<Config>(arguments.dq, panels_dq + skipped_panels * Config::kElementsPanelDQ, column_dq + skipped_dq,
                             column_dq + Config::kColumnsDQ, tile.sequence.k_base, tile.sequence.k_len,
                             block * Config::kQueries + first_row_dq, query_head, tile.batch, packed);
        }
      } else {
        add_queries<Config>(rdQ, params, tile.batch, query_head, tile.sequence.k_base,
                            block * Config::kQueries + first_row_dq + rows.row % 64, tile.sequence.k_len, column_dq,
                            skipped_dq);
      }
    }

    // dP^T = V dO^T
    if constexpr (!Config::kEarlyScores) multiply_s();
    const int v_stage = stage_of(scores_tile, kStagesV);
    if (more) {
      if (tile_ends) shared.v_full[v_stage].wait(parity_of(scores_tile, kStagesV));
      shared.dout_full[ring.stage].wait(ring.parity);
    }
    multiply(mma_s, thread_s.partition_fragment_A(as(shared.v[v_stage], typename Config::LayoutV{})),
             thread_s.partition_fragment_B(as(shared.dout[ring.stage], typename Config::LayoutDO{})), rdP, false);
    warpgroup_wait<1>();
    if constexpr (!Config::kEarlyScores) warpgroup_fence_operand(rS);
    warpgroup_fence_operand(rdV);
    warpgroup_fence_operand(rdK);
    if (running) {
      if constexpr (Config::kSharesKeys) arrive_as_warp(shared.dout_empty[stage_before]);
      arrive_as_warp(shared.q_empty[stage_before]);
      if (tile_ends) {
        arrive_as_warp(shared.k_empty[k_stage]);
        const KeyTile& tile = shared.tile[slot];
        OutputRow row[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int key = tile.first_key + rows.row + 8 * r;
          row[r].exists = key < tile.sequence.q_len;
          row[r].at =
              (int64_t{tile.batch} * forward.seqlen_k + tile.sequence.q_base + key) * forward.kv_heads + tile.kv_head;
        }
        write_keys<Element>(rdV, 1.f, params.dv, params.dv_dtype, params.accumulate, row, column_dv, forward.head_dim_v);
        write_keys<Element>(rdK, forward.softmax_scale, params.dk, params.dk_dtype, params.accumulate, row, column_dk,
                            forward.head_dim);
        shared.tile_empty[slot].arrive();
      }
    }

    // P = exp(S - lse)
    const auto round_weights = [&](int at) __attribute__((always_inline)) {
      reinterpret_cast<uint32_t&>(rP(at)) = round_pair<Element>(rS(at), rS(at + 1));
    };
    const bool capped = forward.softcap != 0.f;
    if (!tile_ends) {
      if (++block == shared.tile[slot].blocks.end) {
        block = shared.tile[slot].blocks.first;
        ++head;
      }
    } else if (more) {
      tile_index = scores_tile;
      block = shared.tile[stage_of(tile_index, kSlots)].blocks.first;
      head = 0;
    }
    fresh = tile_ends;
    // Without scores all this is done to whatever is in the registers: they must not keep what they held for that case.
    if (more) shared.rows_full[stage].wait(ring.parity);
    if (capped) {
      // What the cap multiplies dS by goes into dP, for lack of registers.
      warpgroup_wait<0>();
      warpgroup_fence_operand(rdP);
      const float inner = forward.softmax_scale / forward.softcap;
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        rS(i) = tanh_accurate(rS(i) * inner);
        rdP(i) = (rdP(i) - shared.delta[stage][i / 4 * 8 + rows.column + i % 2]) * (1.f - rS(i) * rS(i));
      }
    }
    const KeyTile& tile = shared.tile[stage_of(tile_index & 3, kSlots)];
    if (block < tile.blocks.first_plain || block >= tile.blocks.end_open) {
      hide_queries<Config>(rS, tile, rows, block * Config::kQueries);
    }
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      const float2 lse = *reinterpret_cast<const float2*>(&shared.lse_log2[stage][8 * i + rows.column]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = 4 * i + 2 * r;
        rS(at) = exp2_approximate(rS(at) * scale_log2 - lse.x);
        rS(at + 1) = exp2_approximate(rS(at + 1) * scale_log2 - lse.y);
        if constexpr (Config::kEarlyWeights) round_weights(at);
      }
    }

    // dV += P^T dO, dS = P (dP - delta)
    if constexpr (Config::kEarlyWeights && !Config::kSharesKeys) {
      multiply_dv(rP, stage, tile_ends);
      warpgroup_wait<1>();
    } else {
      warpgroup_wait<0>();
    }
    warpgroup_fence_operand(rdP);
    if (more && head == group - 1 && block == tile.blocks.end - 1) arrive_as_warp(shared.v_empty[v_stage]);
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      float2 delta = *reinterpret_cast<const float2*>(&shared.delta[stage][8 * i + rows.column]);
      if (capped) delta = make_float2(0.f, 0.f);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = 4 * i + 2 * r;
        if constexpr (!Config::kEarlyWeights) round_weights(at);
        reinterpret_cast<uint32_t&>(rdS(at)) =
            round_pair<Element>(rS(at) * (rdP(at) - delta.x), rS(at + 1) * (rdP(at + 1) - delta.y));
      }
    }
    if (more) arrive_as_warp(shared.rows_empty[stage]);
    if constexpr (!Config::kSharesKeys) {
      if constexpr (!Config::kEarlyWeights) multiply_dv(rP, stage, tile_ends);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rdV);
      if (more) arrive_as_warp(shared.dout_empty[stage]);
    }
    if (more) ring.advance();
    running = more;
  }
  if constexpr (Config::kBulkDQ) {
    if (thread % 128 == 0) tma_store_wait<0>();
  }
}

}  // namespace fa3
