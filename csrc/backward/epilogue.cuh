// From a tile's accumulators to memory: the gradients of its rows once a tile, dQ of tiles of keys once a block of queries,
// by additions in fp32.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "backward/shared.cuh"
#include "forward/epilogue.cuh"

namespace fa3 {

// ---- dQ --------------------------------------------------------------------------------------------------------------

// The columns of a warpgroup's dQ begin here, and these of them are the other warpgroup's.
template <class Config>
__device__ __forceinline__ int first_column_dq(int warpgroup) {
  return Config::kSplitsColumns ? warpgroup * (Config::kHeadDim - Config::kColumnsDQ) : 0;
}
template <class Config>
__device__ __forceinline__ int skipped_dq(int warpgroup) {
  return Config::kSplitsColumns ? warpgroup * (2 * Config::kColumnsDQ - Config::kHeadDim) : 0;
}

// Where the panels of a warpgroup's dQ begin.
template <class Config>
__device__ __forceinline__ float* panels_of(BackwardShared<Config>& shared, int warpgroup) {
  return shared.dq + (Config::kSplitsColumns ? first_column_dq<Config>(warpgroup) * Config::kRowsPanelDQ
                                             : warpgroup * 64 * Config::kHeadDim);
}

// Writes a thread's part of a warpgroup's dQ, 64 queries, to panels of shared memory as the bulk addition reads them:
// rows of 128 bytes whose 16-byte pieces are swizzled.
template <class Config, class Gradient>
__device__ __forceinline__ void store_queries(const Gradient& rdQ, float scale, float* first_panel, int skipped,
                                              int thread) {
  constexpr int kBlocks = decltype(size(rdQ))::value / 4;  // of 8 columns
  const int lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;
  // NOTE: threads of odd rows write two blocks further on, and back: of four rows that a store writes at a time, no two
  // then meet in a memory bank.
  const bool odd = lane & 4;
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(first_panel)) + row * 128 + lane % 2 * 8;
  const uint32_t swizzle = ((odd ? 4 : 0) ^ (lane % 4 / 2) ^ (row % 8)) * 16;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    if (8 * i < skipped) continue;
    const uint32_t at = to + i / 4 * (Config::kElementsPanelDQ * 4) + ((i % 4 * 32) ^ swizzle);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int even_at = 4 * i + 2 * r, odd_at = 4 * (i ^ 2) + 2 * r;
      const float first = scale * (odd ? rdQ(odd_at) : rdQ(even_at));
      const float second = scale * (odd ? rdQ(odd_at + 1) : rdQ(even_at + 1));
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + 8 * r * 128), "f"(first), "f"(second) : "memory");
    }
  }
}

// The same, unscaled, for dq_sum, whose columns are permuted (dq_sum_column): 16 bytes at a time. In rows of odd tokens
// the halves of a panel have changed places, so that of the two rows that a phase of a store writes, none meets the
// other in a memory bank.
template <class Config, class Gradient>
__device__ __forceinline__ void store_permuted_queries(const Gradient& rdQ, float* first_panel, int first_token,
                                                       int skipped, int thread) {
  constexpr int kBlocks = decltype(size(rdQ))::value / 4;  // of 8 columns
  const int lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(first_panel)) + row * 128;
  const uint32_t swizzle = ((lane % 4) ^ (lane / 4) ^ ((first_token + lane / 4) % 2 * 4)) * 16;
#pragma unroll
  for (int i = 0; i < kBlocks; i += 2) {
    if (8 * i < skipped) continue;
    const uint32_t at = to + i / 4 * (Config::kElementsPanelDQ * 4) + ((i % 4 * 32) ^ swizzle);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int e = 4 * i + 2 * r;
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at + 8 * r * 128), "f"(rdQ(e)), "f"(rdQ(e + 1)),
                   "f"(rdQ(e + 4)), "f"(rdQ(e + 5))
                   : "memory");
    }
  }
}

// Writes a thread's part of a warpgroup's dQ^T, 64 columns, to panels like these; for dq_sum, whose columns are permuted
// (dq_sum_column), 8 bytes at a time.
template <class Config, bool kPermuted, class Gradient>
__device__ __forceinline__ void store_transposed_queries(const Gradient& rdQt, float scale, float* first_panel, int thread) {
  const int lane = thread % 32;
  const int column = thread / 32 % 2 * 16;  // of a panel: a warp's 16 begin here
  const uint32_t panel =
      static_cast<uint32_t>(__cvta_generic_to_shared(first_panel)) + thread / 64 * (Config::kElementsPanelDQ * 4);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = lane % 4 * 2 + e;  // of 8, in each of which a thread has two columns, 8 apart
    if constexpr (kPermuted) {
      const int place = column + lane / 4 * 2;
      const uint32_t to = panel + row * 128 + ((place / 4) ^ row) * 16 + place % 4 * 4;
#pragma unroll
      for (int i = 0; i < Config::kQueries / 8; ++i) {
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + i * 1024), "f"(rdQt(4 * i + e)), "f"(rdQt(4 * i + 2 + e))
                     : "memory");
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = column + half * 8 + lane / 4;
        const uint32_t to = panel + row * 128 + ((place / 4) ^ row) * 16 + place % 4 * 4;
#pragma unroll
        for (int i = 0; i < Config::kQueries / 8; ++i) {
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + i * 1024), "f"(scale * rdQt(4 * i + 2 * half + e)) : "memory");
        }
      }
    }
  }
}

// Adds panels of shared memory to dq or dq_sum, or stores them there, as one group of bulk operations: rows from `row` on of a
// range of `length` that starts at `base`, of which none past the end; panels that begin before `last_column`. By one thread.
template <class Config>
__device__ __forceinline__ void add_panels(const CUtensorMap& map, bool stores, const float* first_panel,
                                           int first_column, int last_column, int base, int length, int row, int head,
                                           int batch, bool packed) {
  int inside_at = row, outer = batch;
  if (packed) {
    // As in load_rows.
    const int inside = min(length - row, Config::kRowsPanelDQ);
    inside_at = Config::kRowsPanelDQ - inside;
    outer = base + row + inside;
    if (inside <= 0) last_column = first_column;  // a group that is empty: others are counted from the last one
  }
#pragma unroll 1
  for (int column = first_column; column < last_column; column += Config::kColumnsPanelDQ) {
    if (stores) {
      SM90_TMA_STORE_4D::copy(&map, first_panel, column, inside_at, head, outer);
    } else {
      SM90_TMA_REDUCE_ADD_4D::copy(&map, first_panel, column, inside_at, head, outer);
    }
    first_panel += Config::kElementsPanelDQ;
  }
  tma_store_arrive();
}

// Where a column of dQ lies in dq_sum, whose columns are permuted, so that a thread's elements of two neighbouring blocks
// of 8 columns are neighbours. A quad's fill 64 bytes: column 16 j + 8 h + 2 q + e is at 16 j + 4 q + 2 h + e; or, where dQ^T is
// computed, column 16 j + 8 h + l is at 16 j + 2 l + h.
template <bool kTransposed>
__host__ __device__ constexpr int dq_sum_column(int column) {
  if (kTransposed) return column / 16 * 16 + column % 8 * 2 + column / 8 % 2;
  return column / 16 * 16 + column % 8 / 2 * 4 + column / 8 % 2 * 2 + column % 2;
}

// ---- gradients of a tile's rows --------------------------------------------------------------------------------------

__device__ __forceinline__ void add_global(float* to, float a, float b) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b) : "memory");
}

// Stores 16-bit rows. The threads of a quad first trade columns, so that each holds 8 neighbours, 16 bytes, of a row.
template <class Element, class Gradient>
__device__ __forceinline__ void store_columns(const Gradient& rG, float scale, Element* row, int r, int columns) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int block = 0; block < decltype(size(rG))::value / 16; ++block) {
    __syncwarp();  // NOTE: blocks that the compiler interleaves take registers that are not there
    uint32_t pair[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = 4 * (4 * block + j) + 2 * r;
      pair[j] = round_pair<Element>(scale * rG(i), scale * rG(i + 1));
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

// Writes a thread's rows of a tile's gradient, scaled, or adds them to what is there: in one order, where the rows of a
// launch's ranges are disjoint; by the L2 cache, since a thread would have to wait for what is there.
template <class Element, class Gradient>
__device__ __forceinline__ void write_rows(const Gradient& rG, float scale, void* to, DType dtype, int head_dim,
                                           int seqlen, int heads, const int& head, bool accumulate, const RowTile& tile,
                                           int first_row) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // NOTE: worked out anew each time: registers are short where a tile ends.
    const int row = tile.first_row + first_row + 8 * r;
    const int columns = row < tile.sequence.q_len ? head_dim : 0;
    const int64_t at = ((int64_t{tile.batch} * seqlen + tile.sequence.q_base + row) * heads + head) * head_dim;
    if (dtype != DType::fp32) {
      store_columns(rG, scale, static_cast<Element*>(to) + at, r, columns);
      continue;
    }
    float* const to_row = static_cast<float*>(to) + at;
#pragma unroll
    for (int i = 0; i < decltype(size(rG))::value / 4; ++i) {
      const int column = 8 * i + 2 * (threadIdx.x % 4);
      if (column >= columns) continue;
      const float2 value = make_float2(scale * rG(4 * i + 2 * r), scale * rG(4 * i + 2 * r + 1));
      if (accumulate) {
        add_global(to_row + column, value.x, value.y);
      } else {
        *reinterpret_cast<float2*>(to_row + column) = value;
      }
    }
  }
}

}  // namespace fa3
