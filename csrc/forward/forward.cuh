// Attention forward for Hopper, after FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), on persistent blocks: one
// producer warp draws tiles, one or two threads bring their Q, K and V by bulk tensor loads (producer.cuh), and consumer
// warpgroups compute (consumer.cuh).
#pragma once

#include <cuda.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/gemm/collective/builders/sm90_common.inl>

#include <algorithm>
#include <atomic>

#include "common/launch.cuh"
#include "common/tensor_map.h"
#include "forward/consumer.cuh"
#include "forward/producer.cuh"
#include "forward/schedule.h"

namespace fa3 {

// What has to be there before a team begins. Called by all threads of a block.
template <class Config>
__device__ __forceinline__ void prepare_team(const ForwardArguments& arguments, ForwardShared<Config>& shared, int team) {
  if (threadIdx.x == 64 * team) init_shared(shared);
  if (const int row = threadIdx.x - 128; row >= 0 && row < Config::kQueries) {
    const int query = row / arguments.heads_in_tile;
    shared.row[row] = {static_cast<uint8_t>(query < arguments.queries ? query : kNoQuery),
                       static_cast<uint8_t>(row - query * arguments.heads_in_tile)};
  }
  if (arguments.queries * arguments.heads_in_tile < Config::kQueries) {
    // Rows of a tile that no load fills hold zeros: scores of what an earlier kernel left there may overflow.
    clear_operands(shared.q);
  }
  clear_if_short<Config::kHeadDim, Config::kPanel>(shared.k, arguments.params.head_dim);
  clear_if_short<Config::kHeadDimV, Config::kPanelV>(shared.v, arguments.params.head_dim_v);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerProcessor)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  // NOTE: a kernel without static shared memory gets its dynamic memory aligned so; rounding the address up instead would
  // hide from the compiler that it is shared memory.
  extern __shared__ __align__(1024) unsigned char storage[];
  auto* const teams = reinterpret_cast<ForwardShared<Config>*>(storage);
  if (static_cast<uint32_t>(__cvta_generic_to_shared(storage)) % 1024 != 0) __trap();
  if (threadIdx.x == 32) {
    prefetch_tma_descriptor(&arguments.q);
    prefetch_tma_descriptor(&arguments.k);
    prefetch_tma_descriptor(&arguments.v);
    if (arguments.box_queries != 0) prefetch_tma_descriptor(&arguments.out);
  }
#pragma unroll
  for (int team = 0; team < Config::kTeams; ++team) prepare_team<Config>(arguments, teams[team], team);
  __syncthreads();
  cudaGridDependencySynchronize();  // of packed ranges: until their tiles are listed

  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    // A team's loading thread and drawing warp; with one team there are two warps left.
    const int team = Config::kTeams == 1 ? 0 : threadIdx.x / 64, thread = threadIdx.x - 64 * team;
    if (thread < 32 && is_elected()) load_tiles<Config>(arguments, teams[team], team);
    if (thread >= 32 && thread < 64) draw_tiles<Config>(arguments, teams[team], team);
    if (Config::kLoadsApart && thread >= 96 && is_elected()) load_values<Config>(arguments, teams[0]);
    if (Config::kLoadsApart && thread >= 64 && thread < 96) load_queries<Config>(arguments, teams[0]);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    consume<Config>(arguments, teams[consumer_team<Config>()]);
  }
}

// Describes K or V. A packed one as load_rows wants it: (head_dim, rows, heads, tokens).
inline bool make_key_map(CUtensorMap& map, DType dtype, const void* data, const Strides& stride, bool packed,
                         const ForwardParams& params, int head_dim, int rows, int columns) {
  if (!packed) {
    const int64_t extents[4] = {head_dim, params.seqlen_k, params.kv_heads, params.batch};
    const int64_t strides[3] = {stride.seqlen, stride.heads, stride.batch};
    const int box[4] = {columns, rows, 1, 1};
    return make_tensor_map<4>(map, dtype, data, extents, strides, box);
  }
  // NOTE: the map starts `rows` tokens before the tensor, where there may be no memory and nothing is ever read: load_rows'
  // boxes begin so much further on. (A box that lay outside of the map with all of its rows would touch its start.)
  const int64_t token = stride.seqlen == 0 ? 8 : stride.seqlen;  // of one token there is no stride: any will do
  const auto* start = static_cast<const char*>(data) - rows * token * 2;
  const int64_t extents[4] = {head_dim, rows, params.kv_heads, int64_t{params.seqlen_k} + 1};
  const int64_t strides[3] = {token, stride.heads, token};
  const int box[4] = {columns, rows, 1, 1};
  return make_tensor_map<4>(map, dtype, start, extents, strides, box);
}

// Describes out as store_boxes wants it: (head_dim, heads, queries of a warp, tokens), where the last two both step by a
// token, as in make_key_map. Returns the queries of a warp, 0 if its rows are no box.
template <class Config>
int make_output_map(CUtensorMap& map, const ForwardParams& params, int heads_in_tile) {
  if (params.out == nullptr || params.out_dtype == DType::fp32) return 0;
  if (16 % heads_in_tile != 0 && heads_in_tile % 16 != 0) return 0;
  const int64_t tokens = int64_t{params.batch} * params.seqlen_q;
  if (tokens >= INT32_MAX) return 0;
  const int heads = std::min(heads_in_tile, 16), queries = 16 / heads;
  const int64_t row = params.head_dim_v, token = params.heads * row;
  const auto* start = static_cast<const char*>(params.out) - queries * token * 2;
  const int64_t extents[4] = {row, params.heads, queries, tokens + 1};
  const int64_t strides[3] = {row, token, token};
  const int box[4] = {Config::kPanelV, heads, queries, 1};
  return make_tensor_map<4>(map, Config::kDType, start, extents, strides, box) ? queries : 0;
}

// Lets a kernel have `bytes` of dynamic shared memory on the current device; remembers that it did.
template <auto kKernel>
cudaError_t allow_shared_memory(int device, int bytes) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (device < 64 && (done.load() & bit)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) done |= bit;
  return error;
}

constexpr int64_t kMostWalked = INT32_MAX / 128;  // tiles of a launch that walks: 32 bits count them by its blocks

// Whether a block of threads may walk along the tiles of a sequence: none of a warpgroup's queries sees a block of keys that its
// queries of the tile before have seen. NOTE: that holds in all tiles if the end of the keys cuts none of them short, and if
// blocks lie alike on the diagonal of all warpgroups.
template <class Config>
bool can_walk(const Sequence& sequence) {
  const int last = sequence.last_diagonal, first = sequence.first_diagonal;
  if (last < 0 || last % Config::kKeys != 0 || sequence.q_len + last > sequence.k_len) return false;
  const int blocks = (last + 63) / Config::kKeys + 1 - (first >= 0 ? first : first - Config::kKeys + 1) / Config::kKeys;
  return blocks <= Config::kQueries / Config::kKeys;
}

template <class Config>
cudaError_t launch_forward_tiles(const ForwardParams& params, cudaStream_t stream) {
  constexpr DType kDType = Config::kDType;
  const bool packed = params.q_start != nullptr;
  const int group = params.heads / params.kv_heads;
  ForwardArguments arguments{};
  arguments.params = params;
  arguments.heads_in_tile = heads_per_tile(params, Config::kQueries);
  arguments.queries = Config::kQueries / arguments.heads_in_tile;
  arguments.units = params.heads / arguments.heads_in_tile;
  arguments.group = cutlass::FastDivmod(group);
  // NOTE: of packed ranges this is an upper bound, since each may end in a tile of its own.
  const int64_t tiles = ((int64_t{params.seqlen_q} + arguments.queries - 1) / arguments.queries + params.ranges) *
                        arguments.units * params.batch;
  if (tiles > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
  const int tiles_per_unit = (params.seqlen_q + arguments.queries - 1) / arguments.queries;
  // Tiles of windows are all alike and share few keys, but those of all heads the pages of memory that these lie in.
  arguments.units_together =
      Config::kIsNarrow ? arguments.units
                        : units_per_group(params, arguments.heads_in_tile, params.seqlen_k, tiles_per_unit);
  if (!packed) {
    arguments.are_alike = params.offsets == nullptr;
    if (arguments.are_alike) arguments.sequence = sequence_at(params, 0);
    arguments.walks = Config::kWalks && arguments.are_alike && arguments.heads_in_tile == 1 && tiles < kMostWalked &&
                      can_walk<Config>(arguments.sequence);
    arguments.dense = DenseTiles(arguments.units, params.batch, tiles_per_unit, arguments.walks ? 1 : arguments.units_together);
  }
  const bool is_listed = lists_tiles(params);
  arguments.counter = is_listed ? &reinterpret_cast<ScheduleHeader*>(params.workspace)->counter
                                : reinterpret_cast<TileCounter*>(params.tile_counter);

  const int64_t q_extents[5] = {params.head_dim, group, params.seqlen_q, params.kv_heads, params.batch};
  const int64_t q_strides[4] = {params.q_stride.heads, params.q_stride.seqlen, params.q_stride.heads * group,
                                params.q_stride.batch};
  const int q_box[5] = {Config::kPanel, arguments.heads_in_tile, arguments.queries, 1, 1};
  const bool mapped =
      make_tensor_map<5>(arguments.q, kDType, params.q, q_extents, q_strides, q_box) &&
      make_key_map(arguments.k, kDType, params.k, params.k_stride, packed, params, params.head_dim, Config::kKeys,
                   Config::kPanel) &&
      make_key_map(arguments.v, kDType, params.v, params.v_stride, packed, params, params.head_dim_v, Config::kKeys,
                   Config::kPanelV);
  if (!mapped) return cudaErrorInvalidValue;
  if (Config::kStagesO > 0) {
    arguments.box_queries = make_output_map<Config>(arguments.out, params, arguments.heads_in_tile);
  }

  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  constexpr int kSharedBytes = Config::kTeams * sizeof(ForwardShared<Config>);
  static_assert(kSharedBytes <= 227 * 1024);
  cudaError_t error = allow_shared_memory<forward_kernel<Config>>(device, kSharedBytes);
  if (error == cudaSuccess && is_listed) {
    error = launch_schedule(params, Config::kTile, arguments.heads_in_tile, most_records(params), stream);
  }
  if (error != cudaSuccess) return error;
  int64_t blocks = std::min<int64_t>((tiles + Config::kTeams - 1) / Config::kTeams,
                                     Config::kBlocksPerProcessor * std::max(1, processors - params.sm_margin));
  if (arguments.walks) {
    // As many for each unit, if that leaves few processors idle: they then walk side by side through the same memory.
    const int64_t units = int64_t{arguments.units} * params.batch, of_unit = blocks / units;
    if (16 * of_unit * units >= 15 * blocks) blocks = of_unit * units;
  }
  return launch(forward_kernel<Config>, blocks, Config::kThreads, kSharedBytes, stream, is_listed, arguments);
}

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_forward(const ForwardParams& params, cudaStream_t stream) {
  if constexpr (distinguishes_narrow(kHeadDim, kHeadDimV)) {
    if (are_narrow(params)) {
      return launch_forward_tiles<ForwardConfig<kDType, kHeadDim, kHeadDimV, Sequences::kNarrow>>(params, stream);
    }
  }
  using Long = ForwardConfig<kDType, kHeadDim, kHeadDimV, Sequences::kLong>;
  using Short = ForwardConfig<kDType, kHeadDim, kHeadDimV, Sequences::kShort>;
  if constexpr (Long::kQueries != Short::kQueries || Long::kKeys != Short::kKeys ||
                Long::kTakesTurns != Short::kTakesTurns) {
    if (sequences_of(params) == Sequences::kShort) return launch_forward_tiles<Short>(params, stream);
  }
  return launch_forward_tiles<Long>(params, stream);
}

}  // namespace fa3

#define FA3_INSTANTIATE(dtype, head_dim, head_dim_v)                                                           \
  template cudaError_t fa3::launch_forward<fa3::DType::dtype, head_dim, head_dim_v>(const fa3::ForwardParams&, \
                                                                                    cudaStream_t);
