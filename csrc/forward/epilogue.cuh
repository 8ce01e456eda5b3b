// From a tile's unnormalised output and its softmax to what memory gets: out and lse, or the merged running state.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/numeric_conversion.h>

#include "forward/shared.cuh"
#include "forward/softmax.cuh"

namespace fa3 {

constexpr float kLn2 = 0.6931471805599453f;

// A row of a tile in memory.
struct OutputRow {
  bool exists;
  int64_t at;      // of (batch, seqlen, heads)
  int64_t lse_at;  // of (batch, heads, seqlen)
};

__device__ __forceinline__ OutputRow output_row(const ForwardParams& params, const Tile& tile, TileRow row) {
  return {row.query <= tile.mask.last_row, tile.out_row + int64_t{row.query} * params.heads + row.head,
          tile.lse_row + int64_t{row.head} * params.seqlen_q + row.query};
}

// Whether a tile starts from the running state, and whether it ends in out.
__device__ __forceinline__ bool continues(const ForwardParams& params, const Tile& tile) {
  return params.out_acc != nullptr && !(tile.record.sequence.flags & kVisitFirst);
}
__device__ __forceinline__ bool finishes(const ForwardParams& params, const Tile& tile) {
  return params.out_acc == nullptr || (params.out != nullptr && (tile.record.sequence.flags & kVisitLast));
}

// Rounds fp32 values to the operand of the next product or to the output. For 16-bit types the accumulator's order is the
// operand's.
template <class Element>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
  cutlass::Array<float, 2> pair;
  pair[0] = first;
  pair[1] = second;
  const auto rounded = cutlass::NumericArrayConverter<Element, float, 2>{}(pair);
  return reinterpret_cast<const uint32_t&>(rounded);
}

// Stores rows of 16-bit elements straight from registers. The threads of a quad first trade columns, so that each holds 8
// neighbours, 16 bytes, of a row.
template <class Element, class Output>
__device__ __forceinline__ void store_rounded(const Output& rO, void* out, const OutputRow (&rows)[2], int head_dim) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    Element* const row = static_cast<Element*>(out) + rows[r].at * head_dim;
    const int columns = rows[r].exists ? head_dim : 0;
#pragma unroll
    for (int block = 0; block < decltype(size(rO))::value / 16; ++block) {
      uint32_t pair[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * (4 * block + j) + 2 * r;
        pair[j] = round_pair<Element>(rO(i), rO(i + 1));
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
      if (column < columns) {
        *reinterpret_cast<uint4*>(row + column) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
      }
    }
  }
}

// Stores panels [kFirst, kEnd) of a warp's rows of 16-bit elements as boxes, which the copy engine takes from shared memory
// while the warp goes on. Where that holds half of the panels, each waits for the one half before it.
template <class Config, int kFirst, int kEnd, class Output>
__device__ __forceinline__ void store_boxes(const ForwardArguments& arguments, ForwardShared<Config>& shared,
                                            const Tile& tile, const Output& rO) {
  constexpr int kRowBytes = 2 * Config::kPanelV, kPanelBytes = 16 * kRowBytes, kChunks = kRowBytes / 16;
  constexpr int kTogether = Config::kStagesO == Config::kPanelsO ? Config::kPanelsO : 1;
  const int lane = threadIdx.x % 32, warp = consumer_thread<Config>() / 32, row = lane % 16;
  auto* const boxes = shared.out + warp * 16 * Config::kPanelV * Config::kStagesO;
  // 16 bytes of a row each, swizzled as the map says.
  const int swizzle = kChunks == 8 ? row % 8 : row / 2 % 4;
  const uint32_t first = cast_smem_ptr_to_uint(boxes) + row * kRowBytes + (lane / 16 ^ swizzle) * 16;
#pragma unroll
  for (int panel = kFirst; panel < kEnd; panel += kTogether) {
    if (is_elected()) tma_store_wait<Config::kStagesO / kTogether - 1>();  // until what was there has been read
    __syncwarp();
#pragma unroll
    for (int chunk = panel * kChunks; chunk < (panel + kTogether) * kChunks; chunk += 2) {
      uint32_t pair[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pair[j] = round_pair<typename Config::Element>(rO(4 * chunk + 2 * j), rO(4 * chunk + 2 * j + 1));
      }
      const uint32_t at = (first ^ (chunk % kChunks * 16)) + chunk / kChunks % Config::kStagesO * kPanelBytes;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(pair[0]),
                   "r"(pair[1]), "r"(pair[2]), "r"(pair[3])
                   : "memory");
    }
    tma_store_fence();
    __syncwarp();
    if (is_elected()) {
      const TileRow begin = shared.row[16 * warp];
      // The box is moved down the map's queries until those past the tile's last one lie outside of it.
      const int inside = min(tile.mask.last_row + 1 - begin.query, arguments.box_queries);
#pragma unroll
      for (int i = panel; i < panel + kTogether && inside > 0; ++i) {
        if (i > 0 && i * Config::kPanelV >= arguments.params.head_dim_v) break;
        SM90_TMA_STORE_4D::copy(&arguments.out, boxes + 16 * Config::kPanelV * (i % Config::kStagesO), i * Config::kPanelV,
                                tile.first_head + begin.head, arguments.box_queries - inside,
                                tile.token + begin.query + inside);
      }
      tma_store_arrive();  // a group for each time, be it empty: they are counted
    }
  }
}

// Stores rows in fp32: a quad writes 32 bytes of a row at a time.
template <class Output>
__device__ __forceinline__ void store_float(const Output& rO, float* out, const OutputRow (&rows)[2], int head_dim) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float* const row = out + rows[r].at * head_dim;
    const int columns = rows[r].exists ? head_dim : 0;
#pragma unroll
    for (int i = 0; i < decltype(size(rO))::value / 4; ++i) {
      const int column = 8 * i + 2 * (threadIdx.x % 4);
      if (column < columns) {
        *reinterpret_cast<float2*>(row + column) = make_float2(rO(4 * i + 2 * r), rO(4 * i + 2 * r + 1));
      }
    }
  }
}

// Two neighbours, or zeros without a look at memory. A load of its own kind, which the compiler leaves where it is.
__device__ __forceinline__ float2 load_if(const float* from, bool there) {
  float2 pair;
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.b32 there, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
      "@there ld.global.v2.f32 {%0, %1}, [%2];\n}"
      : "=&f"(pair.x), "=&f"(pair.y)
      : "l"(from), "r"(static_cast<int>(there))
      : "memory");
  return pair;
}

// What a thread multiplies its rows of a tile's output by, and of the running state that the tile continues.
struct RowFactors {
  float output[2];
  float state[2];
};

// Writes lse = log(2^reference sum), merged with the state's where the tile continues one, and returns what it makes of the
// output. Needs no product, and so can run under the last one.
__device__ __forceinline__ RowFactors close_rows(const ForwardParams& params, const Tile& tile, const TileRow (&rows)[2],
                                                 const OnlineSoftmax& softmax, bool is_usual) {
  RowFactors factors{{0.f, 0.f}, {0.f, 0.f}};
  float lse[2];
  int64_t at[2];
  bool exists[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const OutputRow row = output_row(params, tile, rows[r]);
    exists[r] = row.exists;
    at[r] = row.lse_at;
    const float sum = quad_sum(softmax.sum[r]);
    lse[r] = (softmax.reference[r] + log2_approximate(sum)) * kLn2;  // -inf if no key was seen
    factors.output[r] = sum == 0.f ? 0.f : inverse_approximate(sum);
  }
  if (rarely(!is_usual) && continues(params, tile)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float before = exists[r] ? params.lse[at[r]] : -INFINITY;
      const float most = fmaxf(before, lse[r]);
      if (most == -INFINITY) continue;
      const float merged = most + logf(expf(before - most) + expf(lse[r] - most));
      factors.state[r] = expf(before - merged);
      factors.output[r] *= expf(lse[r] - merged);
      lse[r] = merged;
    }
    __syncwarp();  // the quad has read the lse that one of it writes
  }
  if (threadIdx.x % 4 == 0 && params.lse != nullptr) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (exists[r]) params.lse[at[r]] = lse[r];
    }
  }
  return factors;
}

// Adds the running state to the output of a tile that continues it, and stores what is not to be rounded or not to be in
// boxes. True if it has stored it.
template <class Config, class Output>
__device__ __forceinline__ bool write_unusual_rows(const ForwardArguments& arguments, const Tile& tile,
                                                   const TileRow (&rows)[2], const RowFactors& factors, Output& rO) {
  const ForwardParams& params = arguments.params;
  const OutputRow row[2] = {output_row(params, tile, rows[0]), output_row(params, tile, rows[1])};
  if (continues(params, tile)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* const state = params.out_acc + row[r].at * params.head_dim_v;
      const int columns = factors.state[r] != 0.f ? params.head_dim_v : 0;
      constexpr int kBlocks = decltype(size(rO))::value / 4, kAtOnce = Config::kPairsTogether;
      static_assert(kBlocks % kAtOnce == 0);
#pragma unroll
      for (int first = 0; first < kBlocks; first += kAtOnce) {
        float2 before[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int column = 8 * (first + i) + 2 * (threadIdx.x % 4);
          before[i] = load_if(state + column, column < columns);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          rO(4 * (first + i) + 2 * r) += factors.state[r] * before[i].x;
          rO(4 * (first + i) + 2 * r + 1) += factors.state[r] * before[i].y;
        }
      }
    }
  }
  if (!finishes(params, tile)) {
    store_float(rO, params.out_acc, row, params.head_dim_v);
  } else if (params.out_dtype == DType::fp32) {
    store_float(rO, static_cast<float*>(params.out), row, params.head_dim_v);
  } else if (Config::kStagesO > 0 && arguments.box_queries == 0) {
    store_rounded<typename Config::Element>(rO, params.out, row, params.head_dim_v);
  } else {
    return false;
  }
  return true;
}

// out = O / sum, merged with the state. Returns whether panels from kStagesO on are yet to be stored, as boxes.
template <class Config, class Output>
__device__ __forceinline__ bool write_rows(const ForwardArguments& arguments, ForwardShared<Config>& shared,
                                           const Tile& tile, const TileRow (&rows)[2], const RowFactors& factors,
                                           bool is_usual, Output& rO) {
#pragma unroll
  for (int i = 0; i < decltype(size(rO))::value; ++i) rO(i) *= factors.output[i / 2 % 2];
  if (rarely(!is_usual) && write_unusual_rows<Config>(arguments, tile, rows, factors, rO)) return false;
  if constexpr (Config::kStagesO > 0) {
    store_boxes<Config, 0, Config::kStagesO>(arguments, shared, tile, rO);
  } else {
    const ForwardParams& params = arguments.params;
    const OutputRow row[2] = {output_row(params, tile, rows[0]), output_row(params, tile, rows[1])};
    store_rounded<typename Config::Element>(rO, params.out, row, params.head_dim_v);
  }
  return Config::kHalvesOutput;
}

// A row that sees no key: out 0 and lse -inf, or the running state as it is. Called by all lanes of a warp.
template <class Config>
__device__ __forceinline__ void write_unseen_row(const ForwardParams& params, const OutputRow& row, bool merges,
                                                 bool ends) {
  using Element = typename Config::Element;
  if (merges && !ends) return;
  for (int column = threadIdx.x % 32; column < params.head_dim_v; column += 32) {
    const int64_t at = row.at * params.head_dim_v + column;
    const float value = merges ? params.out_acc[at] : 0.f;
    if (!ends) params.out_acc[at] = value;
    else if (params.out_dtype == DType::fp32) static_cast<float*>(params.out)[at] = value;
    else static_cast<Element*>(params.out)[at] = Element(value);
  }
  if (!merges && threadIdx.x % 32 == 0 && params.lse != nullptr) params.lse[row.lse_at] = -INFINITY;
}

// A tile none of whose queries sees a key.
template <class Config>
__device__ __forceinline__ void write_unseen_tile(const ForwardParams& params, const ForwardShared<Config>& shared,
                                                  const Tile& tile) {
  const int warp = consumer_thread<Config>() / 32;
#pragma unroll 1
  for (int row = 16 * warp; row < 16 * warp + 16; ++row) {
    const OutputRow at = output_row(params, tile, shared.row[row]);
    if (at.exists) write_unseen_row<Config>(params, at, continues(params, tile), finishes(params, tile));
  }
}

// Rows of packed queries that lie in no range.
template <class Config>
__device__ __forceinline__ void write_uncovered_rows(const ForwardArguments& arguments) {
  const ForwardParams& params = arguments.params;
  if (params.q_start == nullptr || params.out_acc != nullptr) return;
  const bool some = lists_tiles(params) ? reinterpret_cast<const ScheduleHeader*>(params.workspace)->uncovered
                                        : sequence_at(params, 0).q_len != params.seqlen_q;
  if (!some) return;
  constexpr int kWarps = 4 * Config::kAllConsumers;
  const int warp = blockIdx.x * kWarps + threadIdx.x / 32 - 4;
#pragma unroll 1
  for (int first = 32 * warp; first < params.seqlen_q; first += 32 * kWarps * gridDim.x) {
    const int token = first + threadIdx.x % 32;
    bool covered = token >= params.seqlen_q;
#pragma unroll 1
    for (int i = 0; i < params.ranges; ++i) {
      const Sequence sequence = sequence_at(params, i);
      covered = covered || (token >= sequence.q_base && token - sequence.q_base < sequence.q_len);
    }
    unsigned uncovered = __ballot_sync(0xffffffffu, !covered);
    for (; uncovered != 0; uncovered &= uncovered - 1) {
      const int64_t row = first + __ffs(uncovered) - 1;
#pragma unroll 1
      for (int head = 0; head < params.heads; ++head) {
        const OutputRow at{true, row * params.heads + head, int64_t{head} * params.seqlen_q + row};
        write_unseen_row<Config>(params, at, false, true);
      }
    }
  }
}

}  // namespace fa3
