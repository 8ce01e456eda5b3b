// What the warpgroups of a backward block share, and how they hand it to each other.
#pragma once

#include "backward/config.cuh"
#include "forward/shared.cuh"
#include "forward/tiles.cuh"

namespace fa3 {

// Of the heads whose tiles are drawn side by side there are as many as have `tiles` tiles, within bounds; of listed tiles, as many
// as their list says, and no fewer than `least`. Slanted: as turns.cuh says.
struct HeadGroups {
  int tiles;
  int least;
  int most;
  bool slanted;
  int least_last;  // in the last group, as TileSequence has it

  __host__ __device__ __forceinline__ int heads(int tiles_per_head) const {
    const int wanted = (tiles + tiles_per_head - 1) / tiles_per_head, few = wanted > least ? wanted : least;
    return few < most ? few : most;
  }
};

// How a dense launch clears dq_sum (clear.cuh): in chunks of so many rows, of each KV head as many as it has tiles.
struct ClearedAhead {
  int first;  // the chunks [first, end) are cleared by who draws a tile, the others from the start; 0: all
  int end;
  int ahead;  // the chunk is so many after the tile's own number
  int chunks_of_head;
  int rows;
};

// What the kernel gets: the parameters, and what the host derives from them.
struct BackwardArguments {
  CUtensorMap q;  // of rows of queries or of keys, as make_key_map describes them
  CUtensorMap dout;
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap dq;  // what dq is summed up in, by panels
  BackwardParams params;
  ForwardParams transposed;  // params.forward with queries and keys in each other's place: what tiles are drawn from
  TileCounter* counter;
  int group;               // query heads of a tile
  int written_heads;       // of dk and dv: as written_head() counts them
  HeadGroups head_groups;  // of KV heads, or of their parts
  ClearedAhead cleared;
};

// Whether all lanes of the warp that draws tiles have something to do.
__device__ __forceinline__ bool draws_together(const BackwardArguments& arguments) {
  return lists_tiles(arguments.transposed) || arguments.cleared.first > 0;
}

// A tile on its way from the warp that draws it to those that load it and to the consumers, which keep it until they have
// written its results. Its rows are keys, and they meet blocks of queries; or, where dQ has a kernel of its own
// (query_gradient.cuh), queries that meet blocks of keys.
constexpr int kMostRows = 128;  // of any tile
struct RowTile {
  bool end;  // no more tiles; nothing else is said
  int batch;
  int head;  // of KV heads, or of their parts, or of query heads
  int kv_head;
  int first_row;
  Sequence sequence;  // NOTE: with keys for rows, transposed: its "queries" are the keys
  KeyBlocks blocks;   // in [first_plain, end_open) no score is hidden
  bool is_shared;     // by ranges; `bounds` says which columns of scores a row has
  KeyBounds8 bounds[kMostRows];
};

// Of dk and dv: parts that accumulate add to the rows of their KV head, others have rows of their own.
__device__ __forceinline__ const int& written_head(const BackwardParams& params, const RowTile& tile) {
  return params.accumulate ? tile.kv_head : tile.head;
}

constexpr int kRowTileSlots = 2;
constexpr int kAddedSlots = 4;  // additions to dQ that have been made and not been counted
struct RowTiles {
  RowTile tile[kRowTileSlots];
  HandOver full[kRowTileSlots];
  HandOver empty[kRowTileSlots];
  Barrier nearly_loaded;  // of the last tile that was drawn, all but the last loads have been started

  // `readers`: threads that read a tile; `writers`: lanes of the warp that draws, any of which may have written.
  __device__ __forceinline__ void init(int readers, int writers) {
    nearly_loaded.init(1);
    for (int slot = 0; slot < kRowTileSlots; ++slot) {
      full[slot].init(writers);
      empty[slot].init(readers);
    }
  }
};

template <class Config>
struct alignas(1024) BackwardShared {
  alignas(1024) typename Config::Element k[Config::kStagesK][Config::kKeys * Config::kHeadDim];
  alignas(1024) typename Config::Element v[Config::kStagesV][Config::kKeys * Config::kHeadDimV];
  alignas(1024) typename Config::Element q[Config::kStages][Config::kQueries * Config::kHeadDim];
  alignas(1024) typename Config::Element dout[Config::kStages][Config::kQueries * Config::kHeadDimV];
  alignas(1024) typename Config::Element ds[Config::kStages][Config::kElementsDS];
  alignas(Config::kSharesKeys ? 16 : 1024) float dq[Config::kElementsDQ];  // panels
  // P on its way from one warpgroup to the other, where keys are shared.
  alignas(16) typename Config::Element p[Config::kStages][Config::kElementsP];
  alignas(16) float lse_log2[Config::kStages][Config::kQueries];  // +inf for rows whose weights are 0
  alignas(16) float delta[Config::kStages][Config::kQueries];
  int block[Config::kStages];  // of queries

  LoadBarrier k_full[Config::kStagesK];
  LoadBarrier v_full[Config::kStagesV];
  Barrier k_empty[Config::kStagesK];
  Barrier v_empty[Config::kStagesV];
  // [0]: Q and lse_log2; the last: dO and delta.
  // NOTE: at these, and at those where P changes hands, every thread arrives: of a lane that arrives for its warp
  // compute-sanitizer does not know that it speaks for the others, too.
  LoadBarrier step_full[Config::kLoads][Config::kStages];
  HandOver step_empty[Config::kLoads][Config::kStages];

  RowTiles tiles;
  // Where tiles take turns (turns.cuh).
  typename Config::TurnCounter added[kAddedSlots];
  HandOver added_full[kAddedSlots];
  HandOver added_empty[kAddedSlots];

  // Warpgroups with keys of their own: both have finished a step, so its dS is there, and the one before no longer read.
  Barrier step_done;
  // Those that share keys: P is there.
  HandOver p_full[Config::kStages];
  // dQ on its way through shared memory, for each warpgroup.
  Barrier dq_full[Config::kConsumers];
  Barrier dq_empty[Config::kConsumers];
};

template <class Config>
__device__ __forceinline__ void init_shared(BackwardShared<Config>& shared, bool draws_together) {
  constexpr int kConsumerWarps = 4 * Config::kConsumers;
  for (int stage = 0; stage < Config::kStagesK; ++stage) {
    shared.k_full[stage].init(1);
    shared.k_empty[stage].init(Config::kSharesKeys ? 4 : kConsumerWarps);
  }
  for (int stage = 0; stage < Config::kStagesV; ++stage) {
    shared.v_full[stage].init(1);
    shared.v_empty[stage].init(Config::kSharesKeys ? 4 : kConsumerWarps);
  }
  for (int stage = 0; stage < Config::kStages; ++stage) {
    for (int load = 0; load < Config::kLoads; ++load) {
      shared.step_full[load][stage].init(1 + 32);
      shared.step_empty[load][stage].init(128 * Config::kConsumers);
    }
    shared.p_full[stage].init(128);
  }
  shared.step_done.init(kConsumerWarps);
  for (int slot = 0; slot < kAddedSlots; ++slot) {
    shared.added_full[slot].init(1);
    shared.added_empty[slot].init(1);
  }
  // All who read a tile: consumers, the thread that loads, the warp that brings lse and delta, and the thread that adds dQ.
  shared.tiles.init(128 * Config::kConsumers + 1 + 32 + !Config::kSharesKeys, draws_together ? 32 : 1);
  for (int warpgroup = 0; warpgroup < Config::kConsumers; ++warpgroup) {
    shared.dq_full[warpgroup].init(4);
    shared.dq_empty[warpgroup].init(1);
  }
  cutlass::arch::fence_barrier_init();
}

}  // namespace fa3
