// What the warpgroups of a forward block share, and how they hand it to each other.
#pragma once

#include <cuda.h>

#include "forward/config.cuh"
#include "forward/tiles.cuh"

namespace fa3 {

// What the kernel gets: the parameters, and what the host derives from them.
struct ForwardArguments {
  CUtensorMap q;  // (head_dim, heads of a KV head, seqlen, kv_heads, batch), loaded in boxes of a panel
  CUtensorMap k;  // dense: (head_dim, seqlen, heads, batch); packed: see load_block
  CUtensorMap v;
  CUtensorMap out;  // (head_dim, heads, queries of a warp, tokens), stored in boxes of a panel of a warp's rows
  ForwardParams params;
  TileCounter* counter;
  int heads_in_tile;
  cutlass::FastDivmod group;  // query heads of a KV head
  int queries;          // of a sequence in a tile: rows / heads_in_tile
  int units;            // heads / heads_in_tile
  int units_together;   // that are walked together, unless tiles are listed
  int box_queries;      // those of a warp; 0: a warp's rows are no box of `out`
  DenseTiles dense;     // the tiles of a dense launch,
  Sequence sequence;    // and each of its sequences, unless they have offsets of their own:
  bool are_alike;       // there is such a sequence
  bool walks;           // can_walk, and each block of threads does
};

// Which keys the queries of a tile see that is not shared: query j, the last one's for those after it, sees the keys
// [j + first_diagonal, j + end_diagonal) before end_key.
struct alignas(16) TileMask {
  int last_row;  // the last query; queries are counted from the tile's first one, as those of TileRow
  int first_diagonal;
  int end_diagonal;
  int end_key;
};

// A tile on its way from the warp that draws it to the threads that load it and to the consumers, which keep it until they
// have written its results.
struct Tile {
  enum Kind { kWork, kPause, kEnd };  // kPause: no more tiles until all consumers have finished theirs

  Kind kind;
  int index;       // in the order of drawing
  int only_warp;   // the consumer warp that repeats its rows, or kAllWarps
  bool is_shared;  // by ranges: which keys a query sees stands in ForwardShared::bounds
  int batch;
  int first_head;  // of queries
  int kv_head;     // theirs
  TileMask mask;
  TileRecord record;
  KeyBlocks blocks;
  int kept;         // so many of them, the last ones, are there from the tile before (ForwardConfig::kWalks)
  int token;        // of its first query in (batch, seqlen), as `out` counts them
  int64_t out_row;  // of its first query and head in (batch, seqlen, heads)
  int64_t lse_row;  // and in (batch, heads, seqlen)
  KeyBlocks seen[3];  // by a consumer warpgroup's rows, of `blocks` (ForwardConfig::kSkipsBlocks)
};
constexpr int kAllWarps = -1;

// Which query and head a row of any tile is, counted from the tile's first ones.
struct TileRow {
  uint8_t query;  // kNoQuery: none, since the heads that share a tile do not fill it
  uint8_t head;
};
constexpr int kNoQuery = UINT8_MAX;  // past the last query of any tile that heads share

constexpr int kWarpThreads = 32;
constexpr int kTileSlots = 3;
constexpr int kLeadBlocks = 4;  // a tile's successor is drawn when no more than so many of its blocks are to be loaded

// Tiles whose weights overflowed (OnlineSoftmax::step_unseen) are drawn again with known maxima: at the end, or when
// kManyRepeats have come together. By the time that this is seen, every warp may have added those of the tiles under way.
constexpr int kManyRepeats = 16;
struct Repeat {
  int index;
  int warp;
};

// A barrier under which ordinary memory changes hands.
// NOTE: CUTLASS's own let the compiler move loads and stores past them.
struct HandOver : Barrier {
  __device__ __forceinline__ void wait(uint32_t parity) {
    Barrier::wait(parity);
    asm volatile("" ::: "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("" ::: "memory");
    Barrier::arrive();
  }
  // As so many threads.
  __device__ __forceinline__ void arrive_as(int threads) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(cast_smem_ptr_to_uint(this)), "r"(threads) : "memory");
  }
};

// The shared memory of a team.
template <class Config>
struct alignas(1024) ForwardShared {
  alignas(1024) typename Config::Element q[Config::kStagesQ][Config::kQueries * Config::kHeadDim];
  alignas(1024) typename Config::Element k[Config::kStages][Config::kKeys * Config::kHeadDim];
  alignas(1024) typename Config::Element v[Config::kStages][Config::kKeys * Config::kHeadDimV];
  alignas(1024) typename Config::Element out[Config::kStagesO == 0 ? 1 : Config::kStagesO * Config::kQueries * Config::kPanelV];

  LoadBarrier q_full[Config::kStagesQ];
  Barrier q_empty[Config::kStagesQ];
  LoadBarrier k_full[Config::kStages];
  Barrier k_empty[Config::kStages];
  LoadBarrier v_full[Config::kStages];
  Barrier v_empty[Config::kStages];

  TileRow row[Config::kQueries];
  TileSequence packed;  // the tiles of packed ranges
  Tile tile[kTileSlots];
  KeyBounds8 bounds[kTileSlots][Config::kQueries];  // of the queries of shared tiles, counted from sequence.k_base
  HandOver tile_full[kTileSlots];
  HandOver tile_empty[kTileSlots];

  bool q_is_ahead;  // that of the first tile was asked for before the tile was described
  int repeats;
  Repeat repeat[kManyRepeats + 4 * Config::kConsumers * (kTileSlots + 1)];
  HandOver drained;
  Barrier nearly_loaded;
  Barrier keys_begun;
};

// A consumer's team, and its thread within it.
template <class Config>
__device__ __forceinline__ int consumer_team() {
  // NOTE: known to the compiler to be the same in all lanes of a warp, so that its memory's addresses stay in uniform registers.
  return Config::kTeams == 1 ? 0 : (cutlass::canonical_warp_group_idx() - 1) / Config::kConsumers;
}
template <class Config>
__device__ __forceinline__ int consumer_thread() {
  return threadIdx.x - 128 - consumer_team<Config>() * 128 * Config::kConsumers;
}

template <class Config>
__device__ __forceinline__ void init_shared(ForwardShared<Config>& shared) {
  constexpr int kConsumerWarps = 4 * Config::kConsumers;
  for (int stage = 0; stage < Config::kStagesQ; ++stage) {
    shared.q_full[stage].init(1);
    shared.q_empty[stage].init(kConsumerWarps);
  }
  for (int stage = 0; stage < Config::kStages; ++stage) {
    shared.k_full[stage].init(1);
    shared.v_full[stage].init(1);
    shared.k_empty[stage].init(kConsumerWarps);
    shared.v_empty[stage].init(kConsumerWarps);
  }
  for (int slot = 0; slot < kTileSlots; ++slot) {
    shared.tile_full[slot].init(kWarpThreads);  // of the warp that draws, any of which may have written
    // All who read a tile: consumers, the threads that load K and V, and the warp that loads Q.
    shared.tile_empty[slot].init(128 * Config::kConsumers + (Config::kLoadsApart ? 2 + kWarpThreads : 1));
  }
  shared.drained.init(kConsumerWarps);
  shared.nearly_loaded.init(1);
  shared.keys_begun.init(1);
  shared.q_is_ahead = false;
  shared.repeats = 0;
  cutlass::arch::fence_barrier_init();
}

// Whether this lane is the one of its warp that starts bulk operations. Called by all lanes.
// NOTE: it is elected, not known by its number: of an elected lane the compiler knows that it is alone, and around the bulk
// operations of others it writes loops over the lanes, since what these take from uniform registers might differ.
__device__ __forceinline__ bool is_elected() { return cute::elect_one_sync(); }

// Fills an array of operands with zeros. Called by all threads of a block.
template <class Array>
__device__ __forceinline__ void clear_operands(Array& array) {
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < sizeof(array) / 16; i += blockDim.x) {
    reinterpret_cast<uint4*>(array)[i] = make_uint4(0, 0, 0, 0);
  }
  cutlass::arch::fence_view_async_shared();
}

// The same of an array of rows with kColumns columns if the rows of memory are so short that whole panels are never loaded
// (load_rows).
template <int kColumns, int kPanel, class Array>
__device__ __forceinline__ void clear_if_short(Array& array, int head_dim) {
  if constexpr (kColumns > kPanel) {
    if (head_dim <= kColumns - kPanel) clear_operands(array);
  }
}

// Position in a ring of stages, with the parity its barriers are waited for with. kCounts: kept as one number where kStages is a
// power of two, which takes fewer instructions; not everywhere is the code that follows from it faster.
// NOTE: a wait with the opposite parity passes at once on a barrier that nobody has arrived at.
template <int kStages, bool kCounts = false>
class Ring {
 public:
  __device__ __forceinline__ int stage() const { return kIsPower ? at_ % kStages : at_; }
  __device__ __forceinline__ uint32_t parity() const { return kIsPower ? at_ / kStages & 1 : parity_; }

  // The stage in a form that the compiler knows to be the same in all lanes of a warp: what is computed from it, above all
  // the descriptors of products, stays in uniform registers. Called by all lanes.
  // NOTE: called anew for each step, and opaque; else descriptors leave the loop, for registers that are not there.
  __device__ __forceinline__ int uniform_stage() const {
    auto opaque = at_;
    asm volatile("" : "+r"(opaque));
    return __shfl_sync(0xffffffffu, kIsPower ? opaque % kStages : opaque, 0);
  }

  __device__ __forceinline__ void advance() {
    ++at_;
    if (!kIsPower && at_ == kStages) {
      at_ = 0;
      parity_ ^= 1;
    }
  }

  // Without a branch, which would end what the compiler can interleave.
  __device__ __forceinline__ void advance_if(bool condition) {
    if (kIsPower) {
      at_ += condition;
      return;
    }
    const bool wraps = condition && at_ == kStages - 1;
    at_ = wraps ? 0 : at_ + condition;
    parity_ ^= wraps;
  }

 private:
  static constexpr bool kIsPower = kCounts && (kStages & (kStages - 1)) == 0;
  std::conditional_t<kIsPower, unsigned, int> at_ = 0;
  uint32_t parity_ = 0;
};

// One arrival a warp, and one wait: 32 on the same barrier would queue up in front of the tensor cores' reads.
template <class AnyBarrier>
__device__ __forceinline__ void arrive_as_warp(AnyBarrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier.arrive();
}
template <class AnyBarrier>
__device__ __forceinline__ void wait_as_warp(AnyBarrier& barrier, uint32_t parity) {
  if (threadIdx.x % 32 == 0) barrier.wait(parity);
  __syncwarp();
}

// The arrival under a condition, without a branch.
__device__ __forceinline__ void arrive_as_warp_if(bool condition, Barrier& barrier) {
  __syncwarp();
  const int arrives = condition && threadIdx.x % 32 == 0;
  asm volatile("{\n.reg .pred arrives;\nsetp.ne.b32 arrives, %0, 0;\n@arrives mbarrier.arrive.shared::cta.b64 _, [%1];\n}"
               ::"r"(arrives), "r"(cast_smem_ptr_to_uint(&barrier))
               : "memory");
}

// Waits for two barriers; if both phases are over, as they mostly are, in the time of one wait.
__device__ __forceinline__ void wait_for_both(Barrier& first, uint32_t first_parity, Barrier& second,
                                              uint32_t second_parity) {
  int done;
  asm volatile(
      "{\n.reg .pred first, second;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 first, [%1], %2;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 second, [%3], %4;\n"
      "and.pred first, first, second;\nselp.b32 %0, 1, 0, first;\n}"
      : "=r"(done)
      : "r"(cast_smem_ptr_to_uint(&first)), "r"(first_parity), "r"(cast_smem_ptr_to_uint(&second)), "r"(second_parity)
      : "memory");
  if (done) return;
  first.wait(first_parity);
  second.wait(second_parity);
}

}  // namespace fa3
