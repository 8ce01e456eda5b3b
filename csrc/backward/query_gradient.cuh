// dQ by a kernel of its own: a tile is a block of queries of one head, and meets all blocks of keys that they see. dQ stays in
// registers until it is done, so nothing is added up in memory. S and dP are computed again, two products more; where a tile
// of keys is as small as large head dims make it, that costs less than the additions. And gradients are bitwise equal from run
// to run.
//
// S = Q K^T, dP = dO V^T, dS = P (dP - delta) and dQ += dS K, in which dS is the operand in the registers that it is computed
// in. Rows of scores are queries, so a thread needs lse and delta of two rows only. The two warpgroups have nothing to do
// with each other: while one computes dS, the other one's products are under way.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "backward/consumer.cuh"
#include "backward/producer.cuh"

namespace fa3 {

template <DType kDType_, int kHeadDim_, int kHeadDimV_>
struct QueryGradientConfig {
  static constexpr DType kDType = kDType_;
  using Element = typename MatrixElement<kDType>::type;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr TileShape kTile = {128, 64};
  static constexpr int kQueries = kTile.queries;
  static constexpr int kKeys = kTile.keys;
  static constexpr int kConsumers = kQueries / 64;
  static_assert(kQueries <= kMostRows && kQueries == kQueryTile);

  static constexpr int kBytesQ = kQueries * kHeadDim * sizeof(Element);
  static constexpr int kBytesDO = kQueries * kHeadDimV * sizeof(Element);
  static constexpr int kBytesK = kKeys * kHeadDim * sizeof(Element);
  static constexpr int kBytesV = kKeys * kHeadDimV * sizeof(Element);
  static constexpr int kBytesShared = 225 * 1024;  // without barriers and other small things
  // Two of everything where there is room; values, of which a step is done first, are the first to go without.
  static constexpr int kStagesQ = 2 * (kBytesQ + kBytesDO + kBytesK + kBytesV) <= kBytesShared ? 2 : 1;  // of Q, of dO
  static constexpr int kStages = 2;
  static constexpr int kStagesV = kStagesQ * (kBytesQ + kBytesDO) + 2 * (kBytesK + kBytesV) <= kBytesShared ? 2 : 1;

  // One producer warpgroup and the consumers.
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // NOTE: the consumers take exactly what the producer gives back; asking for more would wait for ever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static_assert(kLaunchRegisters - kProducerRegisters >= kConsumers * (kConsumerRegisters - kLaunchRegisters));

  using Operand = OperandLayouts<Element>;
  static constexpr int kPanel = Operand::panel_of(kHeadDim);
  static constexpr int kPanelV = Operand::panel_of(kHeadDimV);
  using LayoutQ = typename Operand::template Rows<kQueries, kHeadDim, kPanel>;
  using LayoutDO = typename Operand::template Rows<kQueries, kHeadDimV, kPanelV>;
  using LayoutK = typename Operand::template Rows<kKeys, kHeadDim, kPanel>;
  using LayoutV = typename Operand::template Rows<kKeys, kHeadDimV, kPanelV>;
  using LayoutKt = typename Operand::template Transposed<kKeys, kHeadDim, kPanel>;

  using Warpgroups = Layout<Shape<Int<kConsumers>, _1, _1>>;
  using MmaS = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<Int<kQueries>, Int<kKeys>, Int<kHeadDim>>>(), Warpgroups{}));
  using MmaDQ = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<Int<kQueries>, Int<kHeadDim>, Int<kKeys>>, GMMA::Major::K,
                           GMMA::Major::MN>(),
      Warpgroups{}));
};

// What the kernel gets: the parameters, and what the host derives from them.
struct QueryGradientArguments {
  CUtensorMap q;  // of rows of queries or of keys, as make_key_map describes them
  CUtensorMap dout;
  CUtensorMap k;
  CUtensorMap v;
  BackwardParams params;  // with the workspace of the queries' tiles
  TileCounter* counter;
  HeadGroups head_groups;  // of query heads
};

template <class Config>
struct alignas(1024) QueryGradientShared {
  alignas(1024) typename Config::Element q[Config::kStagesQ][Config::kQueries * Config::kHeadDim];
  alignas(1024) typename Config::Element dout[Config::kStagesQ][Config::kQueries * Config::kHeadDimV];
  alignas(1024) typename Config::Element k[Config::kStages][Config::kKeys * Config::kHeadDim];
  alignas(1024) typename Config::Element v[Config::kStagesV][Config::kKeys * Config::kHeadDimV];

  LoadBarrier q_full[Config::kStagesQ];
  LoadBarrier dout_full[Config::kStagesQ];
  LoadBarrier k_full[Config::kStages];
  LoadBarrier v_full[Config::kStagesV];
  Barrier q_empty[Config::kStagesQ];
  Barrier dout_empty[Config::kStagesQ];
  Barrier k_empty[Config::kStages];
  Barrier v_empty[Config::kStagesV];
  RowTiles tiles;
};

template <class Config>
__device__ __forceinline__ void init_shared(QueryGradientShared<Config>& shared, bool is_listed) {
  constexpr int kConsumerWarps = 4 * Config::kConsumers;
  const auto init = [](auto& full, auto& empty) {
    for (auto& barrier : full) barrier.init(1);
    for (auto& barrier : empty) barrier.init(kConsumerWarps);
  };
  init(shared.q_full, shared.q_empty);
  init(shared.dout_full, shared.dout_empty);
  init(shared.k_full, shared.k_empty);
  init(shared.v_full, shared.v_empty);
  shared.tiles.init(128 * Config::kConsumers + 1, is_listed ? 32 : 1);
  cutlass::arch::fence_barrier_init();
}

// ---- loads -----------------------------------------------------------------------------------------------------------

template <class Config>
__device__ __forceinline__ void load_query_tiles(const QueryGradientArguments& arguments,
                                                 QueryGradientShared<Config>& shared) {
  const ForwardParams& forward = arguments.params.forward;
  const bool packed = forward.q_start != nullptr;
  Ring<Config::kStagesQ> q_ring;
  Ring<Config::kStages> k_ring;
  Ring<Config::kStagesV> v_ring;
  Ring<kRowTileSlots> tile_ring;
  while (true) {
    shared.tiles.full[tile_ring.stage()].wait(tile_ring.parity());
    const RowTile& tile = shared.tiles.tile[tile_ring.stage()];
    if (tile.end) break;
    const Sequence sequence = tile.sequence;
    const int batch = tile.batch, head = tile.head, kv_head = tile.kv_head, first_row = tile.first_row;
    const int first_block = tile.blocks.first, end_block = tile.blocks.end;
    shared.tiles.empty[tile_ring.stage()].arrive();
    tile_ring.advance();

    shared.q_empty[q_ring.stage()].wait(q_ring.parity() ^ 1);
    shared.q_full[q_ring.stage()].arrive_and_expect_tx(Config::kBytesQ);
    load_rows<Config::kQueries, Config::kHeadDim, Config::kPanel>(arguments.q, shared.q_full[q_ring.stage()],
                                                                  shared.q[q_ring.stage()], sequence.q_base, sequence.q_len,
                                                                  first_row, head, batch, packed, forward.head_dim);
    int steps_before_draw = max(end_block - first_block - kStepsDrawnAhead, 0);
#pragma unroll 1
    for (int block = end_block - 1; block >= first_block; --block) {
      if (steps_before_draw-- == 0) shared.tiles.nearly_loaded.arrive();
      shared.k_empty[k_ring.stage()].wait(k_ring.parity() ^ 1);
      shared.k_full[k_ring.stage()].arrive_and_expect_tx(Config::kBytesK);
      load_rows<Config::kKeys, Config::kHeadDim, Config::kPanel>(
          arguments.k, shared.k_full[k_ring.stage()], shared.k[k_ring.stage()], sequence.k_base, sequence.k_len,
          block * Config::kKeys, kv_head, batch, packed, forward.head_dim);
      k_ring.advance();
      if (block == end_block - 1) {
        shared.dout_empty[q_ring.stage()].wait(q_ring.parity() ^ 1);
        shared.dout_full[q_ring.stage()].arrive_and_expect_tx(Config::kBytesDO);
        load_rows<Config::kQueries, Config::kHeadDimV, Config::kPanelV>(
            arguments.dout, shared.dout_full[q_ring.stage()], shared.dout[q_ring.stage()], sequence.q_base, sequence.q_len,
            first_row, head, batch, packed, forward.head_dim_v);
      }
      shared.v_empty[v_ring.stage()].wait(v_ring.parity() ^ 1);
      shared.v_full[v_ring.stage()].arrive_and_expect_tx(Config::kBytesV);
      load_rows<Config::kKeys, Config::kHeadDimV, Config::kPanelV>(
          arguments.v, shared.v_full[v_ring.stage()], shared.v[v_ring.stage()], sequence.k_base, sequence.k_len,
          block * Config::kKeys, kv_head, batch, packed, forward.head_dim_v);
      v_ring.advance();
    }
    q_ring.advance();
  }
}

// ---- products --------------------------------------------------------------------------------------------------------

// The end of the blocks that a warpgroup's rows of a tile see, which may be earlier than the tile's.
template <class Config>
__device__ __forceinline__ int end_of_rows(const RowTile& tile, int warpgroup) {
  if (tile.is_shared) return tile.blocks.end;
  const int last_row = min(tile.first_row + 64 * warpgroup + 64, tile.sequence.q_len) - 1;
  const int end_column = min(tile.sequence.k_len, last_row + tile.sequence.last_diagonal + 1);
  return min(tile.blocks.end, (max(end_column, 0) + Config::kKeys - 1) / Config::kKeys);
}

template <class Config>
__device__ __forceinline__ void consume_keys(const QueryGradientArguments& arguments,
                                             QueryGradientShared<Config>& storage) {
  auto& shared = pinned(storage);
  using Element = typename Config::Element;
  const BackwardParams& params = arguments.params;
  const ForwardParams& forward = params.forward;
  // NOTE: uniform over a warp for the compiler too, so that it keeps what follows from it in uniform registers.
  const int warpgroup = cutlass::canonical_warp_group_idx() - 1;
  const int thread = pinned(static_cast<int>(threadIdx.x % 128));
  const ThreadRows rows{warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4, thread % 4 * 2};
  constexpr float kLog2E = 1.4426950408889634f;
  const float scale_log2 = (forward.softcap == 0.f ? forward.softmax_scale : forward.softcap) * kLog2E;

  typename Config::MmaS mma_s;
  typename Config::MmaDQ mma_dq;
  const auto thread_s = mma_s.get_slice(warpgroup * 128);
  const auto thread_dq = mma_dq.get_slice(warpgroup * 128);
  const auto as = [](Element* data, auto layout) __attribute__((always_inline)) {
    return make_tensor(make_smem_ptr(data), layout);
  };
  Tensor rS = partition_fragment_C(mma_s, Shape<Int<Config::kQueries>, Int<Config::kKeys>>{});
  Tensor rdP = make_tensor_like(rS);
  Tensor rdQ = partition_fragment_C(mma_dq, Shape<Int<Config::kQueries>, Int<Config::kHeadDim>>{});
  constexpr int kScores = decltype(size(rS))::value;

  Ring<Config::kStagesQ> q_ring;
  Ring<Config::kStages> k_ring;
  Ring<Config::kStagesV> v_ring;
  Ring<kRowTileSlots> tile_ring;
  while (true) {
    shared.tiles.full[tile_ring.stage()].wait(tile_ring.parity());
    const RowTile& tile = shared.tiles.tile[tile_ring.stage()];
    if (tile.end) break;
    const int first_block = tile.blocks.first, first_plain = tile.blocks.first_plain, end_open = tile.blocks.end_open;
    int block = tile.blocks.end - 1;

    // Rows that see no key, and those past the end, have lse +inf and delta 0: their weights are exactly 0.
    float lse_log2[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = tile.first_row + rows.row + 8 * r;
      float lse = -INFINITY;
      delta[r] = 0.f;
      if (row < tile.sequence.q_len) {
        const int64_t at = (int64_t{tile.batch} * forward.heads + tile.head) * forward.seqlen_q + tile.sequence.q_base + row;
        lse = forward.lse[at];
        delta[r] = params.delta[at];
      }
      const bool unseen = lse == -INFINITY;
      lse_log2[r] = unseen ? INFINITY : lse * kLog2E;
      if (unseen) delta[r] = 0.f;
    }

    // Blocks that only the other warpgroup's rows see.
    for (const int end = end_of_rows<Config>(tile, warpgroup); block >= max(end, first_block); --block) {
      shared.k_full[k_ring.stage()].wait(k_ring.parity());
      arrive_as_warp(thread, shared.k_empty[k_ring.stage()]);
      k_ring.advance();
      shared.v_full[v_ring.stage()].wait(v_ring.parity());
      arrive_as_warp(thread, shared.v_empty[v_ring.stage()]);
      v_ring.advance();
    }
    shared.q_full[q_ring.stage()].wait(q_ring.parity());
    shared.dout_full[q_ring.stage()].wait(q_ring.parity());
    if (block < first_block) clear(rdQ);
    bool fresh = true;
#pragma unroll 1
    for (; block >= first_block; --block) {
      // S = Q K^T, dP = dO V^T
      shared.k_full[k_ring.stage()].wait(k_ring.parity());
      multiply(mma_s, thread_s.partition_fragment_A(as(shared.q[q_ring.stage()], typename Config::LayoutQ{})),
               thread_s.partition_fragment_B(as(shared.k[k_ring.stage()], typename Config::LayoutK{})), rS, false);
      shared.v_full[v_ring.stage()].wait(v_ring.parity());
      multiply(mma_s, thread_s.partition_fragment_A(as(shared.dout[q_ring.stage()], typename Config::LayoutDO{})),
               thread_s.partition_fragment_B(as(shared.v[v_ring.stage()], typename Config::LayoutV{})), rdP, false);
      warpgroup_wait<1>();
      warpgroup_fence_operand(rS);

      // P = exp(S - lse)
      const bool capped = forward.softcap != 0.f;
      if (capped) {
        // dS is to be multiplied by 1 - tanh^2: that goes into dP, such that dP - delta has it.
        warpgroup_wait<0>();
        warpgroup_fence_operand(rdP);
        const float inner = forward.softmax_scale / forward.softcap;
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          rS(i) = tanh_accurate(rS(i) * inner);
          rdP(i) = (rdP(i) - delta[i / 2 % 2]) * (1.f - rS(i) * rS(i)) + delta[i / 2 % 2];
        }
      }
      if (block < first_plain || block >= end_open) {
        hide_scores(rS, tile, rows, block * Config::kKeys, tile.sequence.k_len);
      }
#pragma unroll
      for (int i = 0; i < kScores; ++i) rS(i) = exp2_approximate(rS(i) * scale_log2 - lse_log2[i / 2 % 2]);

      // dS = P (dP - delta)
      warpgroup_wait<0>();
      warpgroup_fence_operand(rdP);
      arrive_as_warp(thread, shared.v_empty[v_ring.stage()]);
      v_ring.advance();
      if (block == first_block) {
        arrive_as_warp(thread, shared.q_empty[q_ring.stage()]);
        arrive_as_warp(thread, shared.dout_empty[q_ring.stage()]);
      }
      Tensor rdS = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Config::kKeys / 16>>>{});
      static_assert(size(rS) == size(rdS));
#pragma unroll
      for (int i = 0; i < kScores; i += 2) {
        reinterpret_cast<uint32_t&>(rdS(i)) =
            round_pair<Element>(rS(i) * (rdP(i) - delta[i / 2 % 2]), rS(i + 1) * (rdP(i + 1) - delta[i / 2 % 2]));
      }

      // dQ += dS K
      multiply(mma_dq, rdS, thread_dq.partition_fragment_B(as(shared.k[k_ring.stage()], typename Config::LayoutKt{})), rdQ,
               !fresh);
      fresh = false;
      warpgroup_wait<0>();
      warpgroup_fence_operand(rdQ);
      arrive_as_warp(thread, shared.k_empty[k_ring.stage()]);
      k_ring.advance();
    }
    if (fresh) {
      arrive_as_warp(thread, shared.q_empty[q_ring.stage()]);
      arrive_as_warp(thread, shared.dout_empty[q_ring.stage()]);
    }
    q_ring.advance();
    write_rows<Element>(rdQ, forward.softmax_scale, params.dq, params.dq_dtype, forward.head_dim, forward.seqlen_q,
                        forward.heads, tile.head, params.accumulate, tile, rows.row);
    shared.tiles.empty[tile_ring.stage()].arrive();
    tile_ring.advance();
  }
}

// ---- kernel ----------------------------------------------------------------------------------------------------------

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    query_gradient_kernel(const __grid_constant__ QueryGradientArguments arguments) {
  // NOTE: a kernel without static shared memory gets its dynamic memory aligned so; rounding the address up instead would
  // hide from the compiler that it is shared memory.
  extern __shared__ __align__(1024) unsigned char storage[];
  auto& shared = *reinterpret_cast<QueryGradientShared<Config>*>(storage);
  if (static_cast<uint32_t>(__cvta_generic_to_shared(storage)) % 1024 != 0) __trap();
  const ForwardParams& forward = arguments.params.forward;
  if (threadIdx.x == 0) init_shared(shared, lists_tiles(forward));
  clear_if_short<Config::kHeadDim, Config::kPanel>(shared.k, forward.head_dim);
  clear_if_short<Config::kHeadDim, Config::kPanel>(shared.q, forward.head_dim);
  clear_if_short<Config::kHeadDimV, Config::kPanelV>(shared.v, forward.head_dim_v);
  clear_if_short<Config::kHeadDimV, Config::kPanelV>(shared.dout, forward.head_dim_v);
  __syncthreads();

  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    if (threadIdx.x < 32 && is_elected()) load_query_tiles<Config>(arguments, shared);
    if (threadIdx.x >= 32 && threadIdx.x < 64) {
      // NOTE: it needs nothing of the kernel before, beside whose last blocks it begins, so no tile is given to a block
      // before that runs. But it must not end earlier: what comes next waits for this kernel only.
      draw_row_tiles<Config::kQueries, Config::kKeys, false>(forward, forward.heads / forward.kv_heads, *arguments.counter,
                                                             arguments.head_groups, 0, shared.tiles,
                                                             [](auto& barrier, uint32_t parity) { barrier.wait(parity); },
                                                             NoSumClearing{});
      cudaGridDependencySynchronize();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    consume_keys<Config>(arguments, shared);
  }
}

}  // namespace fa3
