// Two consumer warpgroups that share a tile's 64 keys, where one warpgroup's registers would not hold both dK and dV of them.
//
// The first has S^T = K Q^T, the weights P^T and dV += P^T dO, the second dP^T = V dO^T, dS^T = P^T (dP^T - delta) and
// dK += dS^T Q: so each has one product from shared memory for its scores, and one from registers for its gradient, and P
// is all that passes between them. dQ has a kernel of its own (query_gradient.cuh).
#pragma once

#include "backward/consumer.cuh"

namespace fa3 {

// What both warpgroups keep of where they are.
template <class Config>
struct PairedSteps {
  const BackwardArguments& arguments;
  BackwardShared<Config>& shared;
  Ring<kRowTileSlots> tile_ring;
  Ring<Config::kStagesK> operand_ring;  // of the tile's K, or V
  Ring<Config::kStages> ring;
  // Of the tile: its blocks, how many steps are to come; and the step's block.
  int first_block = 0, end_block = 0, steps = 0, block = 0;

  // Of the tile that comes next; false: there are no more.
  __device__ __forceinline__ bool begin_tile() {
    shared.tiles.full[tile_ring.stage()].wait(tile_ring.parity());
    if (tile().end) return false;
    const ForwardParams& forward = arguments.params.forward;
    first_block = tile().blocks.first;
    end_block = tile().blocks.end;
    steps = forward.heads / forward.kv_heads * (end_block - first_block);
    block = first_block;
    return true;
  }
  __device__ __forceinline__ const RowTile& tile() const { return shared.tiles.tile[tile_ring.stage()]; }
  __device__ __forceinline__ void next_step() {
    ring.advance();
    if (++block == end_block) block = first_block;
  }
  __device__ __forceinline__ void end_tile() {
    shared.tiles.empty[tile_ring.stage()].arrive();
    tile_ring.advance();
    operand_ring.advance();
  }
};

// P on its way from a thread to the one that has the same elements of dP.
template <class Config, class Weights>
__device__ __forceinline__ void send_weights(const Weights& rP, typename Config::Element* to, int thread) {
  const auto* const pairs = reinterpret_cast<const uint32_t*>(&rP(0));
#pragma unroll
  for (int i = 0; i < decltype(size(rP))::value / 8; ++i) {
    reinterpret_cast<uint4*>(to)[i * 128 + thread] =
        make_uint4(pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
  }
}
template <class Config, class Weights>
__device__ __forceinline__ void receive_weights(Weights& rP, const typename Config::Element* from, int thread) {
  auto* const pairs = reinterpret_cast<uint32_t*>(&rP(0));
#pragma unroll
  for (int i = 0; i < decltype(size(rP))::value / 8; ++i) {
    const uint4 four = reinterpret_cast<const uint4*>(from)[i * 128 + thread];
    pairs[4 * i] = four.x, pairs[4 * i + 1] = four.y, pairs[4 * i + 2] = four.z, pairs[4 * i + 3] = four.w;
  }
}

template <class Config>
using RoundedScores = decltype(make_tensor<typename Config::Element>(
    Layout<Shape<Shape<_2, _2, _2>, _1, Int<Config::kQueries / 16>>>{}));

template <class Config>
__device__ __forceinline__ void consume_weights(const BackwardArguments& arguments, BackwardShared<Config>& storage) {
  using Element = typename Config::Element;
  auto& shared = pinned(storage);
  const BackwardParams& params = arguments.params;
  const ForwardParams& forward = params.forward;
  const int thread = pinned(static_cast<int>(threadIdx.x % 128));
  const ThreadRows rows{thread / 32 * 16 + thread % 32 / 4, thread % 4 * 2};
  constexpr float kLog2E = 1.4426950408889634f;
  const float scale_log2 = (forward.softcap == 0.f ? forward.softmax_scale : forward.softcap) * kLog2E;

  typename Config::MmaS mma_s;
  typename Config::MmaDV mma_dv;
  const auto thread_s = mma_s.get_slice(0);
  const auto thread_dv = mma_dv.get_slice(0);
  const auto as = [](Element* data, auto layout) __attribute__((always_inline)) {
    return make_tensor(make_smem_ptr(data), layout);
  };
  Tensor rdV = partition_fragment_C(mma_dv, Shape<Int<Config::kKeys>, Int<Config::kHeadDimV>>{});
  PairedSteps<Config> at{arguments, shared};

  while (true) {
    const bool fresh = at.steps == 0;
    if (fresh) {
      if (!at.begin_tile()) break;
      shared.k_full[at.operand_ring.stage()].wait(at.operand_ring.parity());
    }
    const RowTile& tile = at.tile();

    // S^T = K Q^T
    const int stage = at.ring.stage();
    const uint32_t parity = at.ring.parity();
    shared.step_full[0][stage].wait(parity);
    Tensor rS = partition_fragment_C(mma_s, Shape<Int<Config::kKeys>, Int<Config::kQueries>>{});
    multiply(mma_s, thread_s.partition_fragment_A(as(shared.k[at.operand_ring.stage()], typename Config::LayoutK{})),
             thread_s.partition_fragment_B(as(shared.q[stage], typename Config::LayoutQ{})), rS, false);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rS);

    // P = exp(S - lse)
    constexpr int kScores = decltype(size(rS))::value;
    RoundedScores<Config> rP;
    static_assert(size(rS) == size(rP));
    const bool capped = forward.softcap != 0.f;
    if (capped) {
      const float inner = forward.softmax_scale / forward.softcap;
#pragma unroll
      for (int i = 0; i < kScores; ++i) rS(i) = tanh_accurate(rS(i) * inner);
    }
    Tensor rT = make_tensor_like(rP);  // where scores are capped: 1 - tanh^2, by which dS is multiplied
    if (capped) {
#pragma unroll
      for (int i = 0; i < kScores; i += 2) {
        reinterpret_cast<uint32_t&>(rT(i)) =
            round_pair<Element>(1.f - rS(i) * rS(i), 1.f - rS(i + 1) * rS(i + 1));
      }
    }
    if (at.block < tile.blocks.first_plain || at.block >= tile.blocks.end_open) {
      hide_scores(rS, tile, rows, at.block * Config::kQueries, INT32_MAX);
    }
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      const float2 lse = *reinterpret_cast<const float2*>(&shared.lse_log2[stage][8 * i + rows.column]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int e = 4 * i + 2 * r;
        reinterpret_cast<uint32_t&>(rP(e)) = round_pair<Element>(exp2_approximate(rS(e) * scale_log2 - lse.x),
                                                                 exp2_approximate(rS(e + 1) * scale_log2 - lse.y));
      }
    }
    shared.step_empty[0][stage].arrive();
    if (capped) {
#pragma unroll
      for (int i = 0; i < kScores; i += 2) {
        auto& factor = reinterpret_cast<uint32_t&>(rT(i));
        const float2 t = unpack_pair<Element>(factor), p = unpack_pair<Element>(reinterpret_cast<uint32_t&>(rP(i)));
        factor = round_pair<Element>(p.x * t.x, p.y * t.y);
      }
      send_weights<Config>(rT, shared.p[stage], thread);
    } else {
      send_weights<Config>(rP, shared.p[stage], thread);
    }
    shared.p_full[stage].arrive();

    if (at.steps == 1) arrive_as_warp(thread, shared.k_empty[at.operand_ring.stage()]);

    // dV += P^T dO
    shared.step_full[1][stage].wait(parity);
    multiply(mma_dv, rP, thread_dv.partition_fragment_B(as(shared.dout[stage], typename Config::LayoutDOt{})), rdV,
             !fresh);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rdV);
    shared.step_empty[1][stage].arrive();
    at.next_step();

    if (--at.steps == 0) {
      write_rows<Element>(rdV, 1.f, params.dv, params.dv_dtype, forward.head_dim_v, forward.seqlen_k,
                          arguments.written_heads, written_head(params, tile), params.accumulate_kv, tile, rows.row);
      at.end_tile();
    }
  }
}

template <class Config>
__device__ __forceinline__ void consume_weight_gradients(const BackwardArguments& arguments,
                                                         BackwardShared<Config>& storage) {
  using Element = typename Config::Element;
  auto& shared = pinned(storage);
  const BackwardParams& params = arguments.params;
  const ForwardParams& forward = params.forward;
  const int thread = pinned(static_cast<int>(threadIdx.x % 128));
  const ThreadRows rows{thread / 32 * 16 + thread % 32 / 4, thread % 4 * 2};

  typename Config::MmaS mma_s;
  typename Config::MmaDK mma_dk;
  const auto thread_s = mma_s.get_slice(0);
  const auto thread_dk = mma_dk.get_slice(0);
  const auto as = [](Element* data, auto layout) __attribute__((always_inline)) {
    return make_tensor(make_smem_ptr(data), layout);
  };
  Tensor rdK = partition_fragment_C(mma_dk, Shape<Int<Config::kKeys>, Int<Config::kHeadDim>>{});
  PairedSteps<Config> at{arguments, shared};

  while (true) {
    const bool fresh = at.steps == 0;
    if (fresh) {
      if (!at.begin_tile()) break;
      shared.v_full[at.operand_ring.stage()].wait(at.operand_ring.parity());
    }
    const RowTile& tile = at.tile();

    // dP^T = V dO^T
    const int stage = at.ring.stage();
    const uint32_t parity = at.ring.parity();
    shared.step_full[1][stage].wait(parity);
    Tensor rdP = partition_fragment_C(mma_s, Shape<Int<Config::kKeys>, Int<Config::kQueries>>{});
    multiply(mma_s, thread_s.partition_fragment_A(as(shared.v[at.operand_ring.stage()], typename Config::LayoutV{})),
             thread_s.partition_fragment_B(as(shared.dout[stage], typename Config::LayoutDO{})), rdP, false);
    RoundedScores<Config> rP;
    shared.p_full[stage].wait(parity);
    receive_weights<Config>(rP, shared.p[stage], thread);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rdP);
    --at.steps;
    if (at.steps == 0) arrive_as_warp(thread, shared.v_empty[at.operand_ring.stage()]);

    // dS = P (dP - delta)
    constexpr int kScores = decltype(size(rdP))::value;
    RoundedScores<Config> rdS;
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[stage][8 * i + rows.column]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int e = 4 * i + 2 * r;
        const float2 weights = unpack_pair<Element>(reinterpret_cast<const uint32_t&>(rP(e)));
        reinterpret_cast<uint32_t&>(rdS(e)) =
            round_pair<Element>(weights.x * (rdP(e) - delta.x), weights.y * (rdP(e + 1) - delta.y));
      }
    }
    shared.step_empty[1][stage].arrive();

    // dK += dS^T Q
    // NOTE: P of the next step but one goes where this one's lies, but not before this step's Q, given back below, has been
    // replaced.
    shared.step_full[0][stage].wait(parity);
    multiply(mma_dk, rdS, thread_dk.partition_fragment_B(as(shared.q[stage], typename Config::LayoutQt{})), rdK, !fresh);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rdK);
    shared.step_empty[0][stage].arrive();
    at.next_step();

    if (at.steps == 0) {
      write_rows<Element>(rdK, forward.softmax_scale, params.dk, params.dk_dtype, forward.head_dim, forward.seqlen_k,
                          arguments.written_heads, written_head(params, tile), params.accumulate_kv, tile, rows.row);
      at.end_tile();
    }
  }
}

}  // namespace fa3
