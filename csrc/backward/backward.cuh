// Attention backward for Hopper, after FlashAttention-2 and -3 (arXiv:2307.08691, arXiv:2407.08608), on persistent
// blocks: a tile is a block of keys of one KV head, and meets all blocks of queries, of all query heads of the KV head or
// of a part of them (key_parts_of), that see it. One producer warpgroup draws tiles and brings what they need
// (producer.cuh), consumer warpgroups compute (consumer.cuh, paired_consumers.cuh). dq is summed up in fp32 in global memory
// and then converted (convert.cuh), or has a kernel of its own, whose tiles are blocks of queries (query_gradient.cuh).
#pragma once

#include "backward/clear.cuh"
#include "backward/convert.cuh"
#include "backward/paired_consumers.cuh"
#include "backward/producer.cuh"
#include "backward/query_gradient.cuh"
#include "forward/forward.cuh"
#undef FA3_INSTANTIATE  // the forward's

namespace fa3 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  // NOTE: a kernel without static shared memory gets its dynamic memory aligned so; rounding the address up instead would
  // hide from the compiler that it is shared memory.
  extern __shared__ __align__(1024) unsigned char storage[];
  auto& shared = *reinterpret_cast<BackwardShared<Config>*>(storage);
  if (static_cast<uint32_t>(__cvta_generic_to_shared(storage)) % 1024 != 0) __trap();
  const ForwardParams& forward = arguments.params.forward;
  if (threadIdx.x == 0) init_shared(shared, draws_together(arguments));
  clear_if_short<Config::kHeadDim, Config::kPanel>(shared.k, forward.head_dim);
  clear_if_short<Config::kHeadDim, Config::kPanel>(shared.q, forward.head_dim);
  clear_if_short<Config::kHeadDimV, Config::kPanelV>(shared.v, forward.head_dim_v);
  clear_if_short<Config::kHeadDimV, Config::kPanelV>(shared.dout, forward.head_dim_v);
  __syncthreads();

  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    if (threadIdx.x < 32 && is_elected()) load_key_tiles<Config>(arguments, shared);
    if (threadIdx.x >= 32 && threadIdx.x < 64) draw_key_tiles<Config>(arguments, shared);
    if (threadIdx.x >= 64 && threadIdx.x < 96) load_row_values<Config>(arguments, shared);
    if constexpr (!Config::kSharesKeys) {
      if (threadIdx.x >= 96 && is_elected()) add_query_blocks<Config>(arguments, shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    if constexpr (Config::kSharesKeys) {
      if (cutlass::canonical_warp_group_idx() == 1) {
        consume_weights<Config>(arguments, shared);
      } else {
        consume_weight_gradients<Config>(arguments, shared);
      }
    } else {
      consume_queries<Config>(arguments, shared);
    }
  }
}

// The same attention seen from the keys: key j is seen by the queries [j - offset - window_right, j - offset + window_left].
inline ForwardParams transpose(const ForwardParams& params) {
  ForwardParams transposed = params;
  std::swap(transposed.q_start, transposed.k_start);
  std::swap(transposed.q_len, transposed.k_len);
  std::swap(transposed.seqlen_q, transposed.seqlen_k);
  std::swap(transposed.window_left, transposed.window_right);
  transposed.heads = params.kv_heads;
  transposed.transposed = true;
  return transposed;
}

// How many KV heads are walked together, each in `tiles` tiles, or, of a packed range, in so many at most (benchmarks/LOG.md,
// backward, 69 to 72). Of few heads the tiles that run at a time share their queries in the L2 cache. Those of a masked batch
// differ in length, and the longest of a group come first: so a group is two tiles a processor, a long one and a short one, or
// one a processor if there is another group for each. Of short sequences whose sums are cleared beside the tiles (clear.cuh) it is
// better that zeros, and what is added to them, stay in the cache, and only the last group is so large; where heads share keys,
// groups of one tile a processor come in pairs before it.
inline HeadGroups key_head_groups(const ForwardParams& transposed, bool takes_turns, bool clears, int group, int64_t tiles) {
  const int all = transposed.kv_heads * transposed.batch;
  if (lists_tiles(transposed)) return {0, 2, all, false, 0};  // two are faster than one for long documents
  const bool dense = transposed.q_start == nullptr;
  const bool full = transposed.window_left == kNoBound && transposed.window_right == kNoBound;
  const bool causal = transposed.window_left != kNoBound && transposed.window_right == kNoBound;
  if (takes_turns) {
    // The more heads there are, the fewer of their tiles run at a time and wait for each other. Slanted they hardly wait; but the
    // long tiles of the last heads come last, so there must be many, and sequences must fit into the cache.
    constexpr int kTurnTiles = 256, kSlantedTiles = 512, kFewTiles = 1024;
    if (causal && dense && group == 1 && tiles >= 2048 / transposed.head_dim && 2 * tiles <= kSlantedTiles &&
        all * tiles >= kFewTiles) {
      return {kSlantedTiles, 2, static_cast<int>(std::min<int64_t>(all, tiles)), true, 0};
    }
    const int least = full ? 2 : !causal ? 8 : group == 1 ? 32 : std::max(2, 16 / group);
    return {kTurnTiles, std::min(all, least), all, false, 0};
  }
  constexpr int kOneEach = 128, kTwoEach = 256, kShortTiles = 32, kTogether = 16, kPairedTiles = 16;
  const auto heads_of = [&](int wanted) { return static_cast<int>((wanted + tiles - 1) / tiles); };
  if (clears && full) return {kTogether / 2, 1, all, false, 0};
  if (clears && group == 1 && tiles <= kShortTiles) {
    return {kTogether, 1, all, false, heads_of(kTwoEach)};
  }
  if (clears && group > 1 && tiles >= kPairedTiles) {
    const int together = heads_of(kOneEach);
    const int pairs = TileSequence::groups_before_last(all, together, heads_of(kTwoEach)) / 2;
    return {kOneEach, 1, all, false, all - 2 * pairs * together};
  }
  const int in_cache = units_per_group(transposed, 1, int64_t{transposed.seqlen_k} * group, tiles);
  if (full) return {0, in_cache, in_cache, false, 0};
  const bool in_pairs = !dense && all % (2 * heads_of(kOneEach)) == 0;
  const int most = std::max(in_cache, std::min({all, 16, 2048 / transposed.head_dim}));
  return {in_pairs ? kOneEach : kTwoEach, in_cache, most, false, 0};
}

// Whether every query of a dense batch, or every key if `params` are transposed, is known to take part in some score:
// gradients of others are never written.
inline bool sees_with_every_row(const ForwardParams& params) {
  if (params.q_start != nullptr || params.offsets != nullptr) return false;
  int64_t shift = params.default_offset ? int64_t{params.seqlen_k} - params.seqlen_q : params.offset;
  if (params.transposed && !params.default_offset) shift = -shift;
  const bool first = params.window_right == kNoBound || shift + params.window_right >= 0;
  const bool last = params.window_left == kNoBound || params.seqlen_q + shift - params.window_left <= params.seqlen_k;
  return first && last;
}

// Describes Q or dO, whose rows are queries, as make_key_map describes K.
inline bool make_query_map(CUtensorMap& map, DType dtype, const void* data, const Strides& stride, bool packed,
                           const ForwardParams& params, int head_dim, int rows, int columns) {
  ForwardParams queries = params;
  queries.seqlen_k = params.seqlen_q;
  queries.kv_heads = params.heads;
  return make_key_map(map, dtype, data, stride, packed, queries, head_dim, rows, columns);
}

// Describes what dq is summed up in: dq itself, or dq_sum, whose rows have `columns` and lie head by head, so that the
// additions that are under way at a time meet in the cache. By panels of so many rows and columns. If packed, with the rows
// twice, as make_key_map does.
inline bool make_sum_map(CUtensorMap& map, const BackwardParams& params, bool packed, int64_t columns, int panel_rows,
                         int panel_columns) {
  const ForwardParams& forward = params.forward;
  const bool in_dq = params.dq_sum == nullptr;
  float* const data = in_dq ? static_cast<float*>(params.dq) : params.dq_sum;
  const int64_t token = in_dq ? forward.heads * int64_t{forward.head_dim} : columns;
  const int64_t head = in_dq ? forward.head_dim : forward.seqlen_q * columns;
  const int64_t width = in_dq ? forward.head_dim : columns;
  const int box[4] = {panel_columns, panel_rows, 1, 1};
  if (!packed) {
    const int64_t batch = int64_t{forward.seqlen_q} * forward.heads * width;
    const int64_t extents[4] = {width, forward.seqlen_q, forward.heads, forward.batch};
    const int64_t strides[3] = {token, head, batch};
    return make_tensor_map<4>(map, DType::fp32, data, extents, strides, box);
  }
  const int64_t extents[4] = {width, panel_rows, forward.heads, int64_t{forward.seqlen_q} + 1};
  const int64_t strides[3] = {token, head, token};
  return make_tensor_map<4>(map, DType::fp32, data - panel_rows * token, extents, strides, box);
}

// Processors of the current device, and what a kernel needs to have so much shared memory on it.
template <auto kKernel>
cudaError_t prepare_device(int shared_bytes, int& processors) {
  int device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return allow_shared_memory<kKernel>(device, shared_bytes);
}

// Tiles of so many rows.
// NOTE: of packed ranges this is an upper bound, since each may end in a tile of its own.
inline int64_t count_tiles(const ForwardParams& params, int rows) {
  return ((int64_t{params.seqlen_q} + rows - 1) / rows + params.ranges) * params.heads * params.batch;
}

// The same launch, with the query heads of a KV head in parts: each a KV head of its own, whose keys are those of others, too,
// and whose dk and dv, in fp32, are summed up afterwards, or by the parts themselves, who accumulate them.
inline BackwardParams in_parts(const BackwardParams& params) {
  BackwardParams parts = params;
  const ForwardParams& forward = params.forward;
  parts.forward.kv_heads *= params.key_parts;
  if (params.accumulate) {
    parts.accumulate_kv = true;
    return parts;
  }
  parts.dk = params.dkv_parts;
  parts.dv = params.dkv_parts + int64_t{forward.batch} * forward.seqlen_k * parts.forward.kv_heads * forward.head_dim;
  parts.dk_dtype = parts.dv_dtype = DType::fp32;
  return parts;
}

// The KV heads that there are.
inline ForwardParams with_whole_heads(const BackwardParams& params) {
  ForwardParams forward = params.forward;
  forward.kv_heads /= params.key_parts;
  return forward;
}

// Describes Q, dO, K and V, of whose rows a kernel loads so many at a time.
template <class Config, class Arguments>
bool make_operand_maps(Arguments& arguments, const BackwardParams& params) {
  const ForwardParams& forward = params.forward;
  const ForwardParams whole = with_whole_heads(params);
  const bool packed = forward.q_start != nullptr;
  constexpr DType kDType = Config::kDType;
  return make_query_map(arguments.q, kDType, forward.q, forward.q_stride, packed, forward, forward.head_dim,
                        Config::kQueries, Config::kPanel) &&
         make_query_map(arguments.dout, kDType, params.dout, params.dout_stride, packed, forward, forward.head_dim_v,
                        Config::kQueries, Config::kPanelV) &&
         make_key_map(arguments.k, kDType, forward.k, forward.k_stride, packed, whole, forward.head_dim, Config::kKeys,
                      Config::kPanel) &&
         make_key_map(arguments.v, kDType, forward.v, forward.v_stride, packed, whole, forward.head_dim_v,
                      Config::kKeys, Config::kPanelV);
}

// dQ by tiles of queries, beside the last of the tiles of keys; those of several ranges have been listed.
template <class Config>
cudaError_t launch_query_tiles(const BackwardParams& params, cudaStream_t stream) {
  QueryGradientArguments arguments{};
  arguments.params = params;
  ForwardParams& forward = arguments.params.forward;
  forward = with_whole_heads(params);
  forward.workspace = params.query_workspace;
  const int heads = units_per_group(forward, 1, forward.seqlen_k, (forward.seqlen_q + Config::kQueries - 1) / Config::kQueries);
  arguments.head_groups = {0, lists_tiles(forward) ? 1 : heads, heads, false, 0};
  arguments.counter = lists_tiles(forward)
                          ? &reinterpret_cast<ScheduleHeader*>(forward.workspace)->counter
                          : reinterpret_cast<TileCounter*>(forward.tile_counter) + 1;
  if (!make_operand_maps<Config>(arguments, params)) return cudaErrorInvalidValue;
  constexpr int kSharedBytes = sizeof(QueryGradientShared<Config>);
  static_assert(kSharedBytes <= 227 * 1024);
  int processors = 0;
  const cudaError_t error = prepare_device<query_gradient_kernel<Config>>(kSharedBytes, processors);
  if (error != cudaSuccess) return error;
  const int64_t blocks =
      std::min<int64_t>(count_tiles(forward, Config::kQueries), std::max(1, processors - forward.sm_margin));
  return launch(query_gradient_kernel<Config>, blocks, Config::kThreads, kSharedBytes, stream, true, arguments);
}

// dK and dV by tiles of keys, and dQ with them or after them.
template <class Config, class QueryConfig>
cudaError_t launch_ranges(const BackwardParams& params, cudaStream_t stream) {
  constexpr int kHeadDim = Config::kHeadDim;
  const ForwardParams& forward = params.forward;
  const bool packed = forward.q_start != nullptr;
  BackwardArguments arguments{};
  arguments.params = params;
  arguments.group = forward.heads / forward.kv_heads;
  arguments.written_heads = params.accumulate ? with_whole_heads(params).kv_heads : forward.kv_heads;
  arguments.transposed = transpose(forward);
  arguments.transposed.ascending = params.turns != nullptr;
  const int tiles_of_head = (forward.seqlen_k + Config::kKeys - 1) / Config::kKeys;
  const bool clears_ahead = !Config::kSharesKeys && !packed && !params.accumulate && params.turns == nullptr;
  arguments.head_groups =
      key_head_groups(arguments.transposed, params.turns != nullptr, clears_ahead, arguments.group, tiles_of_head);
  const bool is_listed = lists_tiles(forward);
  arguments.counter = is_listed ? &reinterpret_cast<ScheduleHeader*>(forward.workspace)->counter
                                : reinterpret_cast<TileCounter*>(forward.tile_counter);
  if (!make_operand_maps<Config>(arguments, params)) return cudaErrorInvalidValue;
  if (!Config::kSharesKeys &&
      !make_sum_map(arguments.dq, params, packed, kHeadDim, Config::kRowsPanelDQ, Config::kColumnsPanelDQ)) {
    return cudaErrorInvalidValue;
  }
  const int64_t tiles = count_tiles(arguments.transposed, Config::kKeys);
  if (std::max(tiles, count_tiles(forward, QueryConfig::kQueries)) > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
  constexpr int kSharedBytes = sizeof(BackwardShared<Config>);
  static_assert(kSharedBytes <= 227 * 1024);
  int processors = 0;
  cudaError_t error = prepare_device<backward_kernel<Config>>(kSharedBytes, processors);

  const int64_t blocks = std::min<int64_t>(tiles, std::max(1, processors - forward.sm_margin));
  const auto clear = [&](void* to, int64_t elements, DType dtype) {
    if (error == cudaSuccess) error = cudaMemsetAsync(to, 0, elements * bytes_of(dtype), stream);
  };
  const int64_t query_rows = int64_t{forward.batch} * forward.seqlen_q * forward.heads;
  if (params.turns != nullptr) {
    const int64_t counters = counters_of_block<Config>() * query_rows;
    if (Config::kTurnsOfWarpgroups && counters >= UINT32_MAX) return cudaErrorInvalidConfiguration;
    clear(params.turns, counters, DType::fp32);  // as wide
  }
  if (!params.accumulate && !packed) {
    const int64_t key_rows = int64_t{forward.batch} * forward.seqlen_k * forward.kv_heads;
    if (!Config::kSharesKeys) {
      if (clears_ahead) {
        const HeadGroups& groups = arguments.head_groups;
        arguments.cleared = clear_ahead(forward.kv_heads * forward.batch, int64_t{arguments.group} * forward.seqlen_q,
                                        tiles_of_head, groups.heads(tiles_of_head), groups.least_last, blocks);
      }
      if (arguments.cleared.first == 0) clear(params.dq_sum, elements_of_sum(forward, kHeadDim), DType::fp32);
    } else if (!sees_with_every_row(forward)) {
      clear(params.dq, query_rows * forward.head_dim, params.dq_dtype);
    }
    if (!sees_with_every_row(arguments.transposed)) {
      clear(params.dk, key_rows * forward.head_dim, params.dk_dtype);
      clear(params.dv, key_rows * forward.head_dim_v, params.dv_dtype);
    }
  }
  if (error == cudaSuccess && is_listed) {
    error = launch_schedule(arguments.transposed, {Config::kKeys, Config::kQueries}, 1,
                            most_records(arguments.transposed), stream);
    if (error == cudaSuccess && Config::kSharesKeys) {
      ForwardParams queries = with_whole_heads(params);
      queries.workspace = params.query_workspace;
      error = launch_schedule(queries, QueryConfig::kTile, 1, query_records(forward, params.accumulate, forward.ranges),
                              stream, true);
    }
  }
  const bool clears_start = arguments.cleared.first > 0, clears = packed && !params.accumulate;
  if (error == cudaSuccess && clears_start) {
    error = launch(clear_start_kernel, processors, kScanThreads, 0, stream, false, params, arguments.cleared,
                   int64_t{arguments.group} * forward.seqlen_q, kHeadDim);
  } else if (error == cudaSuccess && clears) {
    error = launch(clear_kernel<Config>, processors, kScanThreads, 0, stream, is_listed, params, arguments.transposed);
  }
  if (error != cudaSuccess) return error;
  const bool early = is_listed || clears || clears_start;
  error = launch(backward_kernel<Config>, blocks, Config::kThreads, kSharedBytes, stream, early, arguments);
  if (error != cudaSuccess) return error;
  if constexpr (Config::kSharesKeys) return launch_query_tiles<QueryConfig>(params, stream);
  return params.accumulate ? cudaSuccess : convert_dq<typename Config::Element, kHeadDim>(params, stream);
}

// As many ranges at a time as may be.
template <class Config, class QueryConfig>
cudaError_t launch_by_ranges(const BackwardParams& params, cudaStream_t stream) {
  const ForwardParams& forward = params.forward;
  const int together = ranges_at_a_time(forward, params.accumulate, params.deterministic, Config::kHeadDim);
  if (together == forward.ranges) return launch_ranges<Config, QueryConfig>(params, stream);
  for (int range = 0; range < forward.ranges; range += together) {
    BackwardParams part = params;
    for (const int32_t** column : {&part.forward.q_start, &part.forward.q_len, &part.forward.k_start, &part.forward.k_len,
                                   &part.forward.offsets}) {
      if (*column != nullptr) *column += range;
    }
    part.forward.ranges = std::min(together, forward.ranges - range);
    const cudaError_t error = launch_ranges<Config, QueryConfig>(part, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Of whole KV heads, or of what in_parts() gives.
template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_heads(const BackwardParams& params, cudaStream_t stream) {
  using Config = BackwardConfig<kDType, kHeadDim, kHeadDimV>;
  using QueryConfig = QueryGradientConfig<kDType, kHeadDim, kHeadDimV>;
  if constexpr (has_long_blocks(kDType, kHeadDim)) {
    using Long = BackwardConfig<kDType, kHeadDim, kHeadDimV, QueryBlocks::kLong>;
    using LongInTurns = BackwardConfig<kDType, kHeadDim, kHeadDimV, QueryBlocks::kLongInTurns>;
    if (takes_long_blocks(params.forward)) {
      return params.turns != nullptr ? launch_by_ranges<LongInTurns, QueryConfig>(params, stream)
                                     : launch_by_ranges<Long, QueryConfig>(params, stream);
    }
  }
  return launch_by_ranges<Config, QueryConfig>(params, stream);
}

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream) {
  if (params.key_parts == 1) return launch_heads<kDType, kHeadDim, kHeadDimV>(params, stream);
  const BackwardParams parts = in_parts(params);
  cudaError_t error = cudaSuccess;
  if (params.accumulate && !params.accumulate_kv) {
    int processors = 0;
    error = prepare_device<clear_keys_kernel>(0, processors);
    if (error == cudaSuccess) {
      error = launch(clear_keys_kernel, processors, kScanThreads, 0, stream, false, params, transpose(params.forward));
    }
  }
  if (error == cudaSuccess) error = launch_heads<kDType, kHeadDim, kHeadDimV>(parts, stream);
  if (error != cudaSuccess || params.accumulate) return error;
  return sum_parts<typename MatrixElement<kDType>::type>(params, parts, stream);
}

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch_rounding(const BackwardParams& params, cudaStream_t stream) {
  using Element = typename BackwardConfig<kDType, kHeadDim, kHeadDimV>::Element;
  if constexpr (separates_dq(kHeadDim)) return round_dq<Element>(params, stream);
  return convert_dq<Element, kHeadDim>(params, stream);
}

}  // namespace fa3

#define FA3_INSTANTIATE(dtype, head_dim, head_dim_v)                                                             \
  template cudaError_t fa3::launch_backward<fa3::DType::dtype, head_dim, head_dim_v>(const fa3::BackwardParams&, \
                                                                                     cudaStream_t);              \
  template cudaError_t fa3::launch_rounding<fa3::DType::dtype, head_dim, head_dim_v>(const fa3::BackwardParams&, \
                                                                                     cudaStream_t);
