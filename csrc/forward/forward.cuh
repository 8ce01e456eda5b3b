// Attention forward for Hopper: FlashAttention-3's schedule (Shah et al. 2024, arXiv:2407.08608) on persistent blocks.
//
// A producer warp brings tiles of Q, K and V by bulk tensor loads. Two or three consumer warpgroups own 64 rows of
// queries each, and overlap in two ways: inside a warpgroup the softmax of a block of keys runs while the tensor cores
// multiply the block before it by V; between warpgroups, turns on the tensor cores are handed round, so that one computes
// softmax while another multiplies.
#pragma once

#include <cuda.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/gemm/collective/builders/sm90_common.inl>
#include <cutlass/numeric_conversion.h>

#include <algorithm>

#include "common/tensor_map.h"
#include "forward/config.cuh"
#include "forward/forward.h"
#include "forward/schedule.cuh"
#include "forward/softmax.cuh"

namespace fa3 {

// ---- producer --------------------------------------------------------------------------------------------------------

// Starts loading rows [row, row + kRows) of a head, and has `barrier` count its bytes.
template <int kRows, int kColumns, int kPanel, class Element>
__device__ __forceinline__ void load_tile(const CUtensorMap& map, LoadBarrier& barrier, Element* destination, int row,
                                          int head, int batch) {
  barrier.arrive_and_expect_tx(kRows * kColumns * sizeof(Element));
#pragma unroll
  for (int column = 0; column < kColumns; column += kPanel) {
    SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&barrier), 0, destination + column * kRows, column, row,
                           head, batch);
  }
}

// One thread draws tiles and loads what they need, as far ahead as there is room.
template <class Config>
__device__ __forceinline__ void produce(const ForwardArguments& arguments, ForwardShared<Config>& shared, int tiles) {
  const ForwardParams& params = arguments.params;
  Ring<Config::kStages> k_ring, v_ring;
  Ring<2> tile_ring;
  uint32_t q_parity = 0;
  // NOTE: a wait with the opposite parity passes at once on a barrier that nobody has arrived at.
  int index = blockIdx.x;
  while (true) {
    shared.tile_empty[tile_ring.stage].wait(tile_ring.parity ^ 1);
    shared.tile[tile_ring.stage] = index;
    shared.tile_full[tile_ring.stage].arrive();
    tile_ring.advance();
    if (index >= tiles) break;
    const Tile tile = tile_at<Config>(arguments, index);
    index = gridDim.x + atomicAdd(params.tile_counter, 1);

    const KeyBlocks blocks = visible_blocks<Config>(params, tile.first_query);
    if (blocks.first == blocks.end) continue;
    const int kv_head = tile.head / (params.heads / params.kv_heads);
    auto load_k = [&](int block) {
      shared.k_empty[k_ring.stage].wait(k_ring.parity ^ 1);
      load_tile<Config::kKeys, Config::kHeadDim, Config::kPanel>(arguments.k, shared.k_full[k_ring.stage],
                                                                 shared.k[k_ring.stage], block * Config::kKeys, kv_head,
                                                                 tile.batch);
      k_ring.advance();
    };
    auto load_v = [&](int block) {
      shared.v_empty[v_ring.stage].wait(v_ring.parity ^ 1);
      load_tile<Config::kKeys, Config::kHeadDimV, Config::kPanelV>(arguments.v, shared.v_full[v_ring.stage],
                                                                   shared.v[v_ring.stage], block * Config::kKeys,
                                                                   kv_head, tile.batch);
      v_ring.advance();
    };
    shared.q_empty.wait(q_parity ^ 1);
    load_tile<Config::kQueries, Config::kHeadDim, Config::kPanel>(arguments.q, shared.q_full, shared.q,
                                                                  tile.first_query, tile.head, tile.batch);
    q_parity ^= 1;
    load_k(blocks.end - 1);
#pragma unroll 1
    for (int block = blocks.end - 2; block >= blocks.first; --block) {
      load_k(block);
      load_v(block + 1);
    }
    load_v(blocks.first);
  }
}

// ---- consumers -------------------------------------------------------------------------------------------------------

// Starts c = a b, or c += a b, as one group of asynchronous products.
template <bool kAccumulate, class Mma, class A, class B, class C>
__device__ __forceinline__ void multiply(Mma& mma, const A& a, const B& b, C& c) {
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  mma.accumulate_ = kAccumulate ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
#pragma unroll
  for (int k = 0; k < size<2>(a); ++k) {
    cute::gemm(mma, a(_, _, k), b(_, _, k), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
}

// A warpgroup's turn on the tensor cores: it waits for its own barrier, and arrives at the next warpgroup's.
template <class Config>
struct Turn {
  int warpgroup;

  __device__ explicit Turn(int warpgroup) : warpgroup(warpgroup) {
    if (warpgroup == Config::kConsumers - 1) pass();  // the first turn is warpgroup 0's
  }
  __device__ void take() const { cutlass::arch::NamedBarrier::sync(256, warpgroup); }
  __device__ void pass() const {
    cutlass::arch::NamedBarrier::arrive(256, warpgroup + 1 == Config::kConsumers ? 0 : warpgroup + 1);
  }
};

// Where a thread's elements lie in a tile (softmax.cuh).
struct ThreadRows {
  int row;     // the other one is row + 8
  int column;  // of element 0
};

// Hides the scores that the mask or the end of the keys hide.
template <class Config, class Scores>
__device__ __forceinline__ void hide(Scores& scores, const ForwardParams& params, ThreadRows rows, int first_query,
                                     int first_key) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = first_query + rows.row + 8 * r;
    const int last = min(query + params.last_diagonal, params.seqlen_k - 1) - first_key - rows.column;
    const int first = query + params.first_diagonal - first_key - rows.column;
#pragma unroll
    for (int i = 0; i < Config::kKeys / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (8 * i + c > last || 8 * i + c < first) scores(4 * i + 2 * r + c) = -INFINITY;
      }
    }
  }
}

// Rounds scores to the operand of the next product. For 16-bit types the accumulator's order is the operand's.
template <class Element, class From, class To>
__device__ __forceinline__ void round_to(const From& from, To& to) {
  cutlass::NumericArrayConverter<Element, float, 2> convert;
#pragma unroll
  for (int i = 0; i < decltype(size(from))::value; i += 2) {
    reinterpret_cast<cutlass::Array<Element, 2>&>(to(i)) =
        convert(reinterpret_cast<const cutlass::Array<float, 2>&>(from(i)));
  }
}

// Stores a tile of the output straight from registers. The threads of a quad first trade columns, so that each holds 8
// neighbours, 16 bytes, of a row.
template <class Config, class Output>
__device__ __forceinline__ void store_output(const Output& rO, const float (&factor)[2], const ForwardParams& params,
                                             ThreadRows rows, const Tile& tile) {
  using Element = typename Config::Element;
  cutlass::NumericArrayConverter<Element, float, 2> convert;
  const int lane = threadIdx.x % 4;
  const int64_t row_stride = int64_t(params.heads) * params.head_dim_v;
  Element* const out = static_cast<Element*>(params.out) + int64_t(tile.batch) * params.seqlen_q * row_stride +
                       int64_t(tile.head) * params.head_dim_v;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = tile.first_query + rows.row + 8 * r;
#pragma unroll
    for (int block = 0; block < Config::kHeadDimV / 32; ++block) {
      uint32_t pair[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * (4 * block + j) + 2 * r;
        cutlass::Array<float, 2> values;
        values[0] = rO(i) * factor[r];
        values[1] = rO(i + 1) * factor[r];
        const cutlass::Array<Element, 2> rounded = convert(values);
        pair[j] = reinterpret_cast<const uint32_t&>(rounded);
      }
      // Transposes the quad's 4 x 4 pairs, one bit of the lane and of j at a time.
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j & bit) continue;
          const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? pair[j] : pair[j | bit], bit);
          (upper ? pair[j] : pair[j | bit]) = received;
        }
      }
      const int column = 32 * block + 8 * lane;
      if (query < params.seqlen_q && column < params.head_dim_v) {
        *reinterpret_cast<uint4*>(out + query * row_stride + column) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void consume(const ForwardArguments& arguments, ForwardShared<Config>& shared, int tiles) {
  using Element = typename Config::Element;
  const ForwardParams& params = arguments.params;
  const int thread = threadIdx.x - 128;
  const ThreadRows rows{thread / 32 * 16 + thread % 32 / 4, thread % 4 * 2};
  const Turn<Config> turn(thread / 128);

  typename Config::MmaQK mma_qk;
  typename Config::MmaPV mma_pv;
  const auto thread_qk = mma_qk.get_slice(thread);
  const auto thread_pv = mma_pv.get_slice(thread);
  const Tensor sQ = thread_qk.partition_fragment_A(make_tensor(make_smem_ptr(shared.q), typename Config::LayoutQ{}));
  auto sK = [&](int stage) {
    return thread_qk.partition_fragment_B(make_tensor(make_smem_ptr(shared.k[stage]), typename Config::LayoutK{}));
  };
  auto sVt = [&](int stage) {
    return thread_pv.partition_fragment_B(make_tensor(make_smem_ptr(shared.v[stage]), typename Config::LayoutVt{}));
  };
  Tensor rS = partition_fragment_C(mma_qk, Shape<Int<Config::kQueries>, Int<Config::kKeys>>{});
  Tensor rO = partition_fragment_C(mma_pv, Shape<Int<Config::kQueries>, Int<Config::kHeadDimV>>{});
  Tensor rP = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Config::kKeys / 16>>>{});
  static_assert(size(rS) == size(rP));

  Ring<Config::kStages> k_ring, v_ring;
  Ring<2> tile_ring;
  uint32_t q_parity = 0;

  while (true) {
    shared.tile_full[tile_ring.stage].wait(tile_ring.parity);
    const int index = shared.tile[tile_ring.stage];
    shared.tile_empty[tile_ring.stage].arrive();
    tile_ring.advance();
    if (index >= tiles) break;
    const Tile tile = tile_at<Config>(arguments, index);
    const KeyBlocks blocks = visible_blocks<Config>(params, tile.first_query);
    OnlineSoftmax softmax{params.softmax_scale * 1.4426950408889634f};
    clear(rO);

    if (blocks.first < blocks.end) {
      float rescale[2];
      shared.q_full.wait(q_parity);
      q_parity ^= 1;

      // S = Q K^T and its softmax, last block of keys
      int block = blocks.end - 1;
      shared.k_full[k_ring.stage].wait(k_ring.parity);
      turn.take();
      multiply<false>(mma_qk, sQ, sK(k_ring.stage), rS);
      warpgroup_wait<0>();
      turn.pass();
      warpgroup_fence_operand(rS);
      shared.k_empty[k_ring.stage].arrive();
      k_ring.advance();
      if (block == blocks.first) shared.q_empty.arrive();
      if (!blocks.plain(block)) hide<Config>(rS, params, rows, tile.first_query, block * Config::kKeys);
      softmax.step(rS, rescale);
      round_to<Element>(rS, rP);
      shared.v_full[v_ring.stage].wait(v_ring.parity);

      auto step = [&](int block, auto is_plain) __attribute__((always_inline)) {
        // S = Q K^T of this block; O += P V of the block before it, which the softmax of this one hides
        shared.k_full[k_ring.stage].wait(k_ring.parity);
        turn.take();
        multiply<false>(mma_qk, sQ, sK(k_ring.stage), rS);
        multiply<true>(mma_pv, rP, sVt(v_ring.stage), rO);
        turn.pass();
        warpgroup_wait<1>();
        warpgroup_fence_operand(rS);
        shared.k_empty[k_ring.stage].arrive();
        k_ring.advance();
        if (block == blocks.first) shared.q_empty.arrive();
        if constexpr (!decltype(is_plain)::value) {
          hide<Config>(rS, params, rows, tile.first_query, block * Config::kKeys);
        }
        softmax.step(rS, rescale);
        // NOTE: the wait for this block's V stands here, and not where V is used, because a wait ends a basic block:
        // without it ptxas moves the wait for P V in front of the softmax, and nothing overlaps.
        const int used = v_ring.stage;
        v_ring.advance();
        shared.v_full[v_ring.stage].wait(v_ring.parity);
        warpgroup_wait<0>();
        warpgroup_fence_operand(rO);
        shared.v_empty[used].arrive();
        round_to<Element>(rS, rP);
#pragma unroll
        for (int i = 0; i < decltype(size(rO))::value; ++i) rO(i) *= rescale[i / 2 % 2];
      };
      --block;
#pragma unroll 1
      while (block >= blocks.first) {
        if (!blocks.plain(block)) {
          step(block--, false_type{});
        } else {
          const int last = max(blocks.first, blocks.first_plain);
#pragma unroll 1
          for (; block >= last; --block) step(block, true_type{});
        }
      }

      // O += P V, first block of keys
      multiply<true>(mma_pv, rP, sVt(v_ring.stage), rO);
      softmax.row_sum[0] = quad_sum(softmax.row_sum[0]);
      softmax.row_sum[1] = quad_sum(softmax.row_sum[1]);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rO);
      shared.v_empty[v_ring.stage].arrive();
      v_ring.advance();
    }

    // out = O / sum, lse = scale * max + log(sum)
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = softmax.row_sum[r];
      const int query = tile.first_query + rows.row + 8 * r;
      factor[r] = sum == 0.f ? 0.f : 1.f / sum;
      if (thread % 4 == 0 && query < params.seqlen_q) {
        params.lse[(int64_t(tile.batch) * params.heads + tile.head) * params.seqlen_q + query] =
            sum == 0.f ? -INFINITY : softmax.row_max[r] * params.softmax_scale + logf(sum);
      }
    }
    store_output<Config>(rO, factor, params, rows, tile);
  }
}

// ---- kernel and launch -----------------------------------------------------------------------------------------------

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  extern __shared__ char unaligned[];
  auto& shared = *reinterpret_cast<ForwardShared<Config>*>((reinterpret_cast<uintptr_t>(unaligned) + 1023) &
                                                           ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    constexpr int kConsumerThreads = 128 * Config::kConsumers;
    shared.q_full.init(1);
    shared.q_empty.init(kConsumerThreads);
    for (int stage = 0; stage < Config::kStages; ++stage) {
      shared.k_full[stage].init(1);
      shared.v_full[stage].init(1);
      shared.k_empty[stage].init(kConsumerThreads);
      shared.v_empty[stage].init(kConsumerThreads);
    }
    for (int stage = 0; stage < 2; ++stage) {
      shared.tile_full[stage].init(1);
      shared.tile_empty[stage].init(kConsumerThreads);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int tiles = arguments.tiles_per_head * arguments.params.heads * arguments.params.batch;
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    if (threadIdx.x == 0) produce<Config>(arguments, shared, tiles);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    consume<Config>(arguments, shared, tiles);
  }
}

// How many heads' K and V half of the L2 cache holds, in whole groups of query heads that share them.
inline int heads_in_cache(const ForwardParams& params) {
  constexpr int64_t kCacheBytes = 24 << 20;
  const int64_t bytes = int64_t(params.seqlen_k) * (params.head_dim + params.head_dim_v) * 2;
  const int64_t kv_heads = std::max<int64_t>(1, kCacheBytes / std::max<int64_t>(bytes, 1));
  return static_cast<int>(std::min<int64_t>(kv_heads * (params.heads / params.kv_heads),
                                            int64_t(params.heads) * params.batch));
}

template <DType kDType, class Config>
cudaError_t launch_forward_tiles(const ForwardParams& params, cudaStream_t stream) {
  ForwardArguments arguments{};
  arguments.params = params;
  arguments.tiles_per_head = (params.seqlen_q + Config::kQueries - 1) / Config::kQueries;
  arguments.heads_per_group = heads_in_cache(params);
  const bool mapped =
      make_tensor_map(arguments.q, kDType, params.q, params.q_stride, params.batch, params.seqlen_q, params.heads,
                      params.head_dim, Config::kQueries, Config::kPanel) &&
      make_tensor_map(arguments.k, kDType, params.k, params.k_stride, params.batch, params.seqlen_k, params.kv_heads,
                      params.head_dim, Config::kKeys, Config::kPanel) &&
      make_tensor_map(arguments.v, kDType, params.v, params.v_stride, params.batch, params.seqlen_k, params.kv_heads,
                      params.head_dim_v, Config::kKeys, Config::kPanelV);
  if (!mapped) return cudaErrorInvalidValue;

  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  constexpr int kSharedBytes = sizeof(ForwardShared<Config>) + 1024;
  // NOTE: set at every launch, since the attribute belongs to the current device.
  cudaError_t error =
      cudaFuncSetAttribute(forward_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(params.tile_counter, 0, sizeof(int32_t), stream);
  if (error != cudaSuccess) return error;
  const int64_t tiles = int64_t(arguments.tiles_per_head) * params.heads * params.batch;
  if (tiles > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
  const int64_t blocks = std::min<int64_t>(tiles, std::max(1, processors - params.sm_margin));
  forward_kernel<Config><<<dim3(static_cast<unsigned>(blocks)), Config::kThreads, kSharedBytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream) {
  const bool masked = params.first_diagonal > -params.seqlen_q + 1 || params.last_diagonal < params.seqlen_k - 1;
  using Full = ForwardConfigFor<kDType, kHeadDim, kHeadDimV, false>;
  using Masked = ForwardConfigFor<kDType, kHeadDim, kHeadDimV, true>;
  return masked ? launch_forward_tiles<kDType, Masked>(params, stream)
                : launch_forward_tiles<kDType, Full>(params, stream);
}

}  // namespace fa3

#define FA3_INSTANTIATE(dtype, head_dim, head_dim_v)                                                        \
  template cudaError_t fa3::launch_forward<fa3::DType::dtype, head_dim, head_dim_v>(const fa3::ForwardParams&, \
                                                                                    cudaStream_t);
