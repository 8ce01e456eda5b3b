// Who keeps the consumers busy: a thread that draws tiles and one that brings what they need, each as far ahead as there
// is room, and a warp that has a running state come closer.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "forward/epilogue.cuh"
#include "forward/shared.cuh"

namespace fa3 {

// ---- tiles -----------------------------------------------------------------------------------------------------------

// The tiles of a launch, in the order in which they are drawn: group of units after group of units; inside a group those
// with the most keys first, and the units side by side.
template <class Config>
class TileOrder {
 public:
  __device__ __forceinline__ explicit TileOrder(const ForwardArguments& arguments) : arguments_(arguments) {
    if (arguments.params.q_start != nullptr) {
      const auto& header = *reinterpret_cast<const ScheduleHeader*>(arguments.params.workspace);
      per_unit_ = header.records;
      units_per_group_ = header.units_per_group;
    } else {
      per_unit_ = (arguments.params.seqlen_q + arguments.queries - 1) / arguments.queries;
      units_per_group_ = arguments.units_per_group;
    }
  }

  __device__ __forceinline__ int size() const { return per_unit_ * arguments_.units * arguments_.params.batch; }

  // Fills everything of a tile but kind and only_warp.
  __device__ __forceinline__ void fill(Tile& tile, int index) const {
    const ForwardParams& params = arguments_.params;
    const int group = index / (units_per_group_ * per_unit_);
    const int in_group = index - group * units_per_group_ * per_unit_;
    const int units_here = min(units_per_group_, arguments_.units * params.batch - group * units_per_group_);
    const int rank = in_group / units_here;
    const int unit = group * units_per_group_ + in_group - rank * units_here;
    tile.index = index;
    tile.batch = unit / arguments_.units;
    tile.first_head = (unit - tile.batch * arguments_.units) * arguments_.heads_in_tile;
    Sequence sequence;
    int first_query;
    if (params.q_start != nullptr) {
      const TileRecord record = schedule_records(params.workspace)[rank];
      sequence = record.sequence;
      first_query = record.first_query;
    } else {
      sequence = sequence_at(params, tile.batch);
      first_query = (per_unit_ - 1 - rank) * arguments_.queries;
    }
    tile.sequence = sequence;
    tile.first_query = first_query;
    tile.last_query = min(first_query + arguments_.queries, sequence.q_len) - 1;
    tile.blocks = visible_blocks(sequence, first_query, arguments_.queries, Config::kKeys);
    // Softcap is in the step for masked blocks only.
    if (params.softcap != 0.f) tile.blocks.end_plain = tile.blocks.first_plain;
  }

 private:
  const ForwardArguments& arguments_;
  int per_unit_;
  int units_per_group_;
};

template <class Config>
__device__ __forceinline__ void draw_tiles(const ForwardArguments& arguments, ForwardShared<Config>& shared) {
  const TileOrder<Config> order(arguments);
  Ring<kTileSlots> ring;
  const auto publish = [&](Tile::Kind kind, int index, int only_warp) __attribute__((always_inline)) -> KeyBlocks {
    shared.tile_empty[ring.stage].wait(ring.parity ^ 1);
    Tile& tile = shared.tile[ring.stage];
    if (kind == Tile::kWork) order.fill(tile, index);
    if (only_warp != kAllWarps) tile.blocks.end_plain = tile.blocks.first_plain;
    tile.kind = kind;
    tile.only_warp = only_warp;
    const KeyBlocks blocks = tile.blocks;
    shared.tile_full[ring.stage].arrive();
    ring.advance();
    return blocks;
  };

  // Waits until the consumers have finished what was drawn, and has them repeat what was lost.
  uint32_t drained_parity = 0;
  const auto draw_repeats = [&]() __attribute__((always_inline)) {
    publish(Tile::kPause, 0, kAllWarps);
    shared.drained.wait(drained_parity);
    drained_parity ^= 1;
    const int repeats = shared.repeats;
#pragma unroll 1
    for (int i = 0; i < repeats; ++i) publish(Tile::kWork, shared.repeat[i].index, shared.repeat[i].warp);
    shared.repeats = 0;
  };

  const int tiles = order.size();
  TileCounter& counter = *arguments.counter;
  uint32_t loaded_parity = 0;
#pragma unroll 1
  for (int index = blockIdx.x; index < tiles; index = gridDim.x + atomicAdd(&counter.drawn, 1)) {
    if (*const_cast<volatile int*>(&shared.repeats) >= kManyRepeats) draw_repeats();
    const KeyBlocks blocks = publish(Tile::kWork, index, kAllWarps);
    // Who draws early keeps a tile from a block that would have been free for it.
    if (blocks.end - blocks.first > kLongTile) {
      shared.nearly_loaded.wait(loaded_parity);
      loaded_parity ^= 1;
    }
  }
  // The last block to get here leaves the counter as it found it.
  __threadfence();
  if (atomicInc(&counter.finished, gridDim.x - 1) == gridDim.x - 1) atomicExch(&counter.drawn, 0);
  draw_repeats();
  publish(Tile::kEnd, 0, kAllWarps);
}

// ---- loads -----------------------------------------------------------------------------------------------------------

// Starts loading a block of rows of K or V, and has `barrier` count its bytes.
template <int kRows, int kColumns, int kPanel, class Element>
__device__ __forceinline__ void load_block(const CUtensorMap& map, LoadBarrier& barrier, Element* destination,
                                           const Tile& tile, int group, int first_key, bool packed) {
  int row = first_key, outer = tile.batch;
  if (packed) {
    // The map is (head_dim, kRows, heads, tokens), and rows and tokens both step by a token: the box is moved down the
    // rows until its part past the end of the range lies outside of the map, and reads as 0.
    const int inside = min(tile.sequence.k_len - first_key, kRows);
    row = kRows - inside;
    outer = tile.sequence.k_base + first_key + inside;
  }
  const int kv_head = tile.first_head / group;
  barrier.arrive_and_expect_tx(kRows * kColumns * sizeof(Element));
#pragma unroll
  for (int column = 0; column < kColumns; column += kPanel) {
    SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&barrier), 0, destination + column * kRows, column, row,
                           kv_head, outer);
  }
}

template <class Config>
__device__ __forceinline__ void load_tiles(const ForwardArguments& arguments, ForwardShared<Config>& shared) {
  const ForwardParams& params = arguments.params;
  const bool packed = params.q_start != nullptr;
  const int group = params.heads / params.kv_heads;
  Ring<Config::kStagesQ> q_ring;
  Ring<Config::kStages> k_ring, v_ring;
  Ring<kTileSlots> ring;

  // Waits for the tile at `ring` to be drawn, and loads its Q.
  const auto begin_tile = [&] {
    shared.tile_full[ring.stage].wait(ring.parity);
    const Tile& tile = shared.tile[ring.stage];
    if (tile.kind != Tile::kWork || tile.blocks.first == tile.blocks.end) return;
    shared.q_empty[q_ring.stage].wait(q_ring.parity ^ 1);
    shared.q_full[q_ring.stage].arrive_and_expect_tx(arguments.queries * arguments.heads_in_tile * Config::kHeadDim *
                                                     sizeof(typename Config::Element));
#pragma unroll
    for (int column = 0; column < Config::kHeadDim; column += Config::kPanel) {
      SM90_TMA_LOAD_5D::copy(&arguments.q, reinterpret_cast<uint64_t*>(&shared.q_full[q_ring.stage]), 0,
                             shared.q[q_ring.stage] + column * Config::kQueries, column, tile.first_head % group,
                             tile.sequence.q_base + tile.first_query, tile.first_head / group, tile.batch);
    }
    q_ring.advance();
  };

  // V comes one block behind K, as it is used; a tile's slot is kept until the last of its V.
  int behind_slot = -1, behind_key = 0;
  const auto load_behind = [&](bool last) {
    if (behind_slot < 0) return;
    shared.v_empty[v_ring.stage].wait(v_ring.parity ^ 1);
    load_block<Config::kKeys, Config::kHeadDimV, Config::kPanelV>(arguments.v, shared.v_full[v_ring.stage],
                                                                  shared.v[v_ring.stage], shared.tile[behind_slot],
                                                                  group, behind_key, packed);
    v_ring.advance();
    if (last) shared.tile_empty[behind_slot].arrive();
    behind_slot = -1;
  };

  begin_tile();
  while (true) {
    const int slot = ring.stage;
    const Tile& tile = shared.tile[slot];
    if (tile.kind == Tile::kEnd) break;
    ring.advance();
    const KeyBlocks blocks = tile.blocks;
    if (tile.kind == Tile::kPause || blocks.first == blocks.end) {
      if (tile.kind == Tile::kPause) load_behind(true);
      shared.tile_empty[slot].arrive();
      begin_tile();
      continue;
    }
    const bool is_long = blocks.end - blocks.first > kLongTile;
    // The next Q comes early where there are two stages: the one before this tile's is free once this tile is under way.
    const int next_q = Config::kStagesQ == 1 ? blocks.first : is_long ? blocks.first + 1 : max(blocks.end - 2, blocks.first);
#pragma unroll 1
    for (int block = blocks.end - 1; block >= blocks.first; --block) {
      shared.k_empty[k_ring.stage].wait(k_ring.parity ^ 1);
      load_block<Config::kKeys, Config::kHeadDim, Config::kPanel>(arguments.k, shared.k_full[k_ring.stage],
                                                                  shared.k[k_ring.stage], tile, group,
                                                                  block * Config::kKeys, packed);
      k_ring.advance();
      load_behind(block == blocks.end - 1);
      behind_slot = slot;
      behind_key = block * Config::kKeys;
      if (is_long && block == blocks.first + kLongTile - 1 && tile.only_warp == kAllWarps) shared.nearly_loaded.arrive();
      if (block == next_q) begin_tile();
    }
  }
  load_behind(true);
}

// ---- running state ---------------------------------------------------------------------------------------------------

// Has L2 hold what a tile's epilogue will add to, while the tile is computed.
template <class Config>
__device__ __forceinline__ void prefetch_state(const ForwardArguments& arguments, ForwardShared<Config>& shared) {
  const ForwardParams& params = arguments.params;
  Ring<kTileSlots> ring;
  while (true) {
    shared.tile_full[ring.stage].wait(ring.parity);
    const Tile& tile = shared.tile[ring.stage];
    if (tile.kind == Tile::kEnd) break;
    if (tile.kind == Tile::kWork && tile.blocks.first < tile.blocks.end && continues(params, tile)) {
#pragma unroll 1
      for (int i = threadIdx.x % 32; i < Config::kQueries; i += 32) {
        const OutputRow row = output_row(arguments, tile, i);
        if (!row.exists) continue;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(params.out_acc + row.at * params.head_dim_v),
                     "r"(params.head_dim_v * int(sizeof(float))));
      }
    }
    shared.tile_empty[ring.stage].arrive();
    ring.advance();
  }
}

}  // namespace fa3
