// Who keeps the consumers busy: a warp that draws tiles and threads that bring what they need, each as far ahead as there is
// room; that of Q is one of a warp that also has a running state come closer.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "forward/epilogue.cuh"
#include "forward/shared.cuh"

namespace fa3 {

// ---- tiles -----------------------------------------------------------------------------------------------------------

// The tiles of a launch, in the order in which they are drawn; of a unit those with the most keys first.
template <class Config>
class TileOrder {
 public:
  __device__ __forceinline__ TileOrder(const ForwardArguments& arguments, ForwardShared<Config>& shared)
      : arguments_(arguments), shared_(shared) {}

  // What size and fill need. Called by all lanes of the warp that draws, as are these.
  __device__ __forceinline__ void begin() const {
    const ForwardParams& params = arguments_.params;
    if (!rarely(is_packed())) return;
    if (lists_tiles(params)) {
      const auto& header = *reinterpret_cast<const ScheduleHeader*>(params.workspace);
      shared_.packed = TileSequence(arguments_.units, header.records, header.units_per_group, header.least_last_units);
    } else {
      const int queries = arguments_.queries, tiles = (sequence_at(params, 0).q_len + queries - 1) / queries;
      shared_.packed = TileSequence(arguments_.units, tiles, arguments_.units_together);
    }
    __syncwarp();
  }

  __device__ __forceinline__ int size() const {
    return rarely(is_packed()) ? shared_.packed.size() : arguments_.dense.tiles;
  }

  // Whether each block walks along tiles of its own, [first, end). If not, the first is a team's own, and others are drawn.
  __device__ __forceinline__ bool walks() const { return Config::kWalks && arguments_.walks; }
  __device__ __forceinline__ int first(int team) const {
    return walks() ? share(blockIdx.x) : team * gridDim.x + blockIdx.x;
  }
  __device__ __forceinline__ int end() const { return walks() ? share(blockIdx.x + 1) : size(); }

  // Whether a block's first tile, `index`, is described by who loads it: there is no need to draw it, and a tile's way from
  // one thread to the other takes as long as the data's while instructions and constants come from memory.
  __device__ __forceinline__ bool is_known(int index) const { return arguments_.are_alike && index < arguments_.dense.tiles; }

  // Such a tile, but for what `describe` does; its blocks of keys are known earlier.
  __device__ __forceinline__ TileRecord known_record(int rank) const {
    return {arguments_.sequence, (arguments_.dense.tiles_per_unit - 1 - rank) * arguments_.queries, kOneRange};
  }

  // Fills everything of a tile but kind, only_warp, kept and what fill_seen does, and, if ranges share it, the bounds of its
  // queries.
  __device__ __forceinline__ void fill(int slot, int index) const {
    const ForwardParams& params = arguments_.params;
    Tile& tile = shared_.tile[slot];
    const auto [batch, unit, rank] = place(index);
    // NOTE: by way of shared memory, since a tile does not fit into the producer's registers.
    const bool is_listed = lists_tiles(params);
    if (rarely(is_listed)) {
      const int lane = threadIdx.x % 32;
      const auto* record = reinterpret_cast<const int*>(schedule_records(params.workspace) + rank);
      if (lane < kRecordElements) reinterpret_cast<int*>(&tile.record)[lane] = record[lane];
      __syncwarp();
      if (tile.record.first_range != kOneRange) fill_bounds(shared_.bounds[slot], params, tile.record);
    }
    if (threadIdx.x % 32 != 0) return;

    TileRecord& record = tile.record;
    if (!rarely(is_listed)) {
      record = known_record(rank);
      if (rarely(!arguments_.are_alike)) record.sequence = sequence_at(params, batch);
      if (rarely(is_packed())) record.first_query = (shared_.packed.tiles_per_unit - 1 - rank) * arguments_.queries;
    }
    describe(tile, index, batch, unit, visible_blocks(record.sequence, record.first_query, arguments_.queries, Config::kKeys));
  }

  // By one thread: what follows from a tile's record and from where it is.
  __device__ __forceinline__ void describe(Tile& tile, int index, int batch, int unit, const KeyBlocks& blocks) const {
    const ForwardParams& params = arguments_.params;
    const TileRecord& record = tile.record;
    const Sequence& sequence = record.sequence;
    tile.index = index;
    tile.is_shared = record.first_range != kOneRange;
    tile.batch = batch;
    tile.first_head = unit * arguments_.heads_in_tile;
    tile.kv_head = arguments_.group.div(tile.first_head);
    tile.mask = {min(arguments_.queries, sequence.q_len - record.first_query) - 1,
                 record.first_query + sequence.first_diagonal, record.first_query + sequence.last_diagonal + 1,
                 sequence.k_len};
    const int64_t token = int64_t{sequence.q_base} + record.first_query;
    tile.token = batch * params.seqlen_q + static_cast<int>(token);
    tile.out_row = (int64_t{batch} * params.seqlen_q + token) * params.heads + tile.first_head;
    tile.lse_row = (int64_t{batch} * params.heads + tile.first_head) * params.seqlen_q + token;
    tile.blocks = rarely(tile.is_shared) ? all_masked(blocks) : blocks;
    // Softcap is in the step for masked blocks only.
    if (rarely(params.softcap != 0.f)) tile.blocks.end_plain = tile.blocks.first_plain;
  }

  // Fills in the blocks that a warpgroup's rows see, or so it seems by the bounds of the first and the last row of a shared
  // tile; all where that is none, or, in a walk, the last one, which comes before all of the next tile. `unseen`: steps may
  // leave out to look for maxima.
  __device__ __forceinline__ void fill_seen(int slot, int warpgroup, bool unseen) const {
    static_assert(Config::kConsumers <= std::extent_v<decltype(Tile::seen)>);
    Tile& tile = shared_.tile[slot];
    const auto& bounds = shared_.bounds[slot];
    const int first = shared_.row[64 * warpgroup].query;
    const int last = min(int{shared_.row[64 * warpgroup + 63].query}, tile.mask.last_row);
    KeyBlocks seen = walks() ? all_masked({tile.blocks.end - 1, tile.blocks.end, 0, 0, 0}) : tile.blocks;
    if (rarely(first <= last && tile.is_shared)) {
      const int begin = bounds[first].first / Config::kKeys, end = (bounds[last].end + Config::kKeys - 1) / Config::kKeys;
      if (begin < end) seen = all_masked({begin, end, 0, 0, 0});
    } else if (first <= last) {
      const KeyBlocks own = visible_blocks(tile.record.sequence, tile.record.first_query + first, last - first + 1,
                                           Config::kKeys);
      if (own.first < own.end) {
        const bool plain = unseen && arguments_.params.softcap == 0.f;
        seen = {own.first, own.end, own.first_plain, plain ? own.end_plain : own.first_plain, own.end_open};
      }
    }
    tile.seen[warpgroup] = seen;
  }

 private:
  // Where the tiles of a block begin.
  __device__ __forceinline__ int share(unsigned block) const { return block * arguments_.dense.tiles / gridDim.x; }

  __device__ __forceinline__ DenseTiles::Place place(int index) const {
    if (rarely(is_packed())) {
      const auto [unit, rank] = shared_.packed[index];
      return {0, unit, rank};
    }
    return arguments_.dense[index];
  }

  __device__ __forceinline__ bool is_packed() const { return arguments_.params.q_start != nullptr; }

  const ForwardArguments& arguments_;
  ForwardShared<Config>& shared_;
};

// Called by all lanes of a warp, of which one draws and the others help to describe a tile.
template <class Config>
__device__ __forceinline__ void draw_tiles(const ForwardArguments& arguments, ForwardShared<Config>& shared, int team) {
  const TileOrder<Config> order(arguments, shared);
  order.begin();
  const int tiles = order.end();
  TileCounter& counter = *arguments.counter;
  const bool first_lane = threadIdx.x % 32 == 0;
  Ring<kTileSlots, Config::kCounts> ring;
  uint32_t loaded_parity = 0, drained_parity = 0;
  const int drawers = Config::kTeams * gridDim.x;
  int index = order.first(team);
  // Lost tiles that are to be repeated; more than there are, while none is repeated.
  constexpr int kNone = INT32_MAX;
  int repeat = kNone;
  bool is_known = order.is_known(index);
  // The tile before, its first query, and its first block of keys (kWalks).
  int index_before = kNone, query_before = 0, block_before = 0;
#pragma unroll 1
  while (true) {
    Tile::Kind kind = Tile::kWork;
    int drawn = index, only_warp = kAllWarps;
    const int lost = __shfl_sync(0xffffffffu, *const_cast<volatile int*>(&shared.repeats), 0);
    if (rarely(repeat < lost)) {
      drawn = shared.repeat[repeat].index;
      only_warp = shared.repeat[repeat].warp;
      ++repeat;
    } else if (rarely(repeat != kNone)) {
      repeat = kNone;
      __syncwarp();
      if (first_lane) shared.repeats = 0;
      __syncwarp();
      if (index < tiles) continue;
      kind = Tile::kEnd;
    } else if (rarely(!is_known && (index >= tiles || lost >= kManyRepeats))) {
      kind = Tile::kPause;
    }

    Tile& tile = shared.tile[ring.stage()];
    if (is_known) {
      // NOTE: nobody waits for its slot to be empty: by now it may be so for the second time.
      shared.tile_full[ring.stage()].wait(ring.parity());
      is_known = false;
    } else {
      wait_as_warp(shared.tile_empty[ring.stage()], ring.parity() ^ 1);
      // NOTE: no lane waits here; but that one lane has waited for all is more than racecheck can follow.
      shared.tile_empty[ring.stage()].wait(ring.parity() ^ 1);
      if (kind == Tile::kWork) order.fill(ring.stage(), drawn);
      if (first_lane && only_warp != kAllWarps) tile.blocks.end_plain = tile.blocks.first_plain;
      if constexpr (Config::kSkipsBlocks) {
        __syncwarp();
        if (kind == Tile::kWork && threadIdx.x % 32 < Config::kConsumers) {
          order.fill_seen(ring.stage(), threadIdx.x % 32, only_warp == kAllWarps);
        }
        __syncwarp();
      }
      if (first_lane) {
        tile.kind = kind;
        tile.only_warp = only_warp;
        if constexpr (Config::kWalks) {
          const bool follows = order.walks() && kind == Tile::kWork && only_warp == kAllWarps && drawn - 1 == index_before &&
                               tile.record.first_query + arguments.queries == query_before;
          tile.kept = follows ? tile.blocks.end - block_before : 0;
        }
      }
      shared.tile_full[ring.stage()].arrive();
      __syncwarp();
    }
    const bool is_loaded = tile.blocks.first < tile.blocks.end;
    if constexpr (Config::kWalks) {
      index_before = kind == Tile::kWork ? drawn : kNone;
      query_before = tile.record.first_query;
      block_before = tile.blocks.first;
    }
    ring.advance();

    if (rarely(kind == Tile::kEnd)) break;
    if (rarely(kind == Tile::kPause)) {
      if (index >= tiles && first_lane) {
        // The last one to get here leaves the counter as it found it.
        __threadfence();
        if (atomicInc(&counter.finished, drawers - 1) == drawers - 1) atomicExch(&counter.drawn, 0);
      }
      // Until the consumers have finished what was drawn.
      wait_as_warp(shared.drained, drained_parity);
      drained_parity ^= 1;
      repeat = 0;
    } else if (repeat == kNone && order.walks()) {
      ++index;
    } else if (repeat == kNone) {
      // Who draws early keeps a tile from a block that would have been free for it.
      if (is_loaded) {
        wait_as_warp(shared.nearly_loaded, loaded_parity);
        loaded_parity ^= 1;
      }
      if (first_lane) index = drawers + atomicAdd(&counter.drawn, 1);
      index = __shfl_sync(0xffffffffu, index, 0);
    }
  }
}

// ---- loads -----------------------------------------------------------------------------------------------------------

// Starts loading rows [first, first + kRows) of a sequence of `length` rows that starts at row `base`, on a `barrier` that
// counts the bytes of kColumns columns. Rows past the sequence's end read as 0; so do columns past head_dim, except for those
// of whole panels, which are not loaded.
template <int kRows, int kColumns, int kPanel, class Element>
__device__ __forceinline__ void load_rows(const CUtensorMap& map, LoadBarrier& barrier, Element* destination, int base,
                                          int length, int first, int head, int batch, bool packed, int head_dim) {
  int row = first, outer = batch;
  if (rarely(packed)) {
    // The map is (head_dim, kRows, heads, tokens), and rows and tokens both step by a token: the box is moved down the
    // rows until its part past the end of the range lies outside of the map, and reads as 0.
    const int inside = min(length - first, kRows);
    row = kRows - inside;
    outer = base + first + inside;
  }
#pragma unroll
  for (int column = 0; column < kColumns; column += kPanel) {
    if (column == 0 || column < head_dim) {
      SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&barrier), 0, destination + column * kRows, column, row,
                             head, outer);
    } else {
      barrier.complete_transaction(kRows * kPanel * sizeof(Element));
    }
  }
}

// Starts loading a block of rows of K or V, and has `barrier` count its bytes.
template <int kRows, int kColumns, int kPanel, class Element>
__device__ __forceinline__ void load_block(const CUtensorMap& map, LoadBarrier& barrier, Element* destination,
                                           const Sequence& sequence, int first_key, int kv_head, int batch, bool packed,
                                           int head_dim) {
  barrier.arrive_and_expect_tx(kRows * kColumns * sizeof(Element));
  load_rows<kRows, kColumns, kPanel>(map, barrier, destination, sequence.k_base, sequence.k_len, first_key,
                                     kv_head, batch, packed, head_dim);
}

// Brings the blocks of K, or of V, one after the other.
template <class Config, bool kIsKeys>
class BlockLoader {
 public:
  __device__ __forceinline__ BlockLoader(const ForwardArguments& arguments, ForwardShared<Config>& shared)
      : arguments_(arguments), shared_(shared) {}

  __device__ __forceinline__ void load(const Sequence& sequence, int kv_head, int batch, int block) {
    const ForwardParams& params = arguments_.params;
    const bool packed = params.q_start != nullptr;
    const int first_key = block * Config::kKeys;
    if constexpr (kIsKeys) {
      shared_.k_empty[ring_.stage()].wait(ring_.parity() ^ 1);
      load_block<Config::kKeys, Config::kHeadDim, Config::kPanel>(arguments_.k, shared_.k_full[ring_.stage()],
                                                                  shared_.k[ring_.stage()], sequence, first_key, kv_head,
                                                                  batch, packed, params.head_dim);
    } else {
      shared_.v_empty[ring_.stage()].wait(ring_.parity() ^ 1);
      load_block<Config::kKeys, Config::kHeadDimV, Config::kPanelV>(arguments_.v, shared_.v_full[ring_.stage()],
                                                                    shared_.v[ring_.stage()], sequence, first_key, kv_head,
                                                                    batch, packed, params.head_dim_v);
    }
    ring_.advance();
  }
  __device__ __forceinline__ void load(const Tile& tile, int block) {
    load(tile.record.sequence, tile.kv_head, tile.batch, block);
  }

 private:
  const ForwardArguments& arguments_;
  ForwardShared<Config>& shared_;
  Ring<Config::kStages, Config::kCounts> ring_;
};

// The block of keys that loading a tile begins with.
template <class Config>
__device__ __forceinline__ int last_to_load(const Tile& tile) {
  return tile.blocks.end - 1 - (Config::kWalks ? tile.kept : 0);
}

// Brings the queries of one tile after the other.
template <class Config>
class QueryLoader {
 public:
  __device__ __forceinline__ QueryLoader(const ForwardArguments& arguments, ForwardShared<Config>& shared)
      : arguments_(arguments), shared_(shared) {}

  __device__ __forceinline__ void load(int first_head, int kv_head, int batch, int token) {
    // NOTE: Q is read once, and L2 told to keep it, yet that is faster (benchmarks/LOG.md, 84).
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_LAST);
    shared_.q_empty[ring_.stage()].wait(ring_.parity() ^ 1);
    shared_.q_full[ring_.stage()].arrive_and_expect_tx(arguments_.queries * arguments_.heads_in_tile * Config::kHeadDim *
                                                     sizeof(typename Config::Element));
#pragma unroll
    for (int column = 0; column < Config::kHeadDim; column += Config::kPanel) {
      SM90_TMA_LOAD_5D::copy(&arguments_.q, reinterpret_cast<uint64_t*>(&shared_.q_full[ring_.stage()]), kHint,
                             shared_.q[ring_.stage()] + column * Config::kQueries, column,
                             first_head - kv_head * arguments_.group.divisor, token, kv_head, batch);
    }
    ring_.advance();
  }
  __device__ __forceinline__ void load(const Tile& tile) {
    load(tile.first_head, tile.kv_head, tile.batch, tile.record.sequence.q_base + tile.record.first_query);
  }
  // As if a tile's had been loaded.
  __device__ __forceinline__ void pass() { ring_.advance(); }

 private:
  const ForwardArguments& arguments_;
  ForwardShared<Config>& shared_;
  Ring<Config::kStagesQ, Config::kCounts> ring_;
};

// K; and Q and V, unless these have threads of their own.
template <class Config>
__device__ __forceinline__ void load_tiles(const ForwardArguments& arguments, ForwardShared<Config>& shared, int team) {
  QueryLoader<Config> queries(arguments, shared);
  BlockLoader<Config, true> keys(arguments, shared);
  BlockLoader<Config, false> values(arguments, shared);
  Ring<kTileSlots, Config::kCounts> ring;

  // Of the first tile, if it is known, Q and the first K are asked for before it is described.
  bool is_ahead = false;  // those of the tile at `ring` have been asked for
  const TileOrder<Config> order(arguments, shared);
  if (const int index = order.first(team); order.is_known(index)) {
    const auto [batch, unit, rank] = arguments.dense[index];
    const TileRecord record = order.known_record(rank);
    const KeyBlocks blocks = visible_blocks(record.sequence, record.first_query, arguments.queries, Config::kKeys);
    is_ahead = blocks.first < blocks.end;
    if (is_ahead) {
      const int first_head = unit * arguments.heads_in_tile, kv_head = arguments.group.div(first_head);
      queries.load(first_head, kv_head, batch, record.first_query);
      keys.load(record.sequence, kv_head, batch, blocks.end - 1);
    }
    shared.q_is_ahead = is_ahead;
    Tile& tile = shared.tile[0];
    tile.record = record;
    order.describe(tile, index, batch, unit, blocks);
    if constexpr (Config::kSkipsBlocks) {
#pragma unroll 1
      for (int warpgroup = 0; warpgroup < Config::kConsumers; ++warpgroup) order.fill_seen(0, warpgroup, true);
    }
    tile.kind = Tile::kWork;
    tile.only_warp = kAllWarps;
    tile.kept = 0;
    shared.tile_full[0].arrive_as(kWarpThreads);
  }

  // Waits for the tile at `ring` to be drawn, and loads its Q.
  const auto begin_tile = [&] {
    shared.tile_full[ring.stage()].wait(ring.parity());
    const Tile& tile = shared.tile[ring.stage()];
    if (Config::kLoadsApart || rarely(tile.kind != Tile::kWork || tile.blocks.first == tile.blocks.end)) return;
    if (!is_ahead) queries.load(tile);
  };

  // V of one thread comes one block behind K, as it is used; a tile's slot is kept until the last of its V.
  int behind_slot = -1, behind_block = 0;
  const auto load_behind = [&](bool last) {
    if (Config::kLoadsApart || behind_slot < 0) return;
    values.load(shared.tile[behind_slot], behind_block);
    if (last) shared.tile_empty[behind_slot].arrive();
    behind_slot = -1;
  };

  bool begun = false;  // some K has been asked for
  begin_tile();
  while (true) {
    const int slot = ring.stage();
    const Tile& tile = shared.tile[slot];
    if (rarely(tile.kind == Tile::kEnd)) break;
    ring.advance();
    const KeyBlocks blocks = tile.blocks;
    if (rarely(tile.kind == Tile::kPause || blocks.first == blocks.end)) {
      shared.tile_empty[slot].arrive();
      begin_tile();
      continue;
    }
    const int lead_block = min(blocks.end, blocks.first + kLeadBlocks) - 1;
#pragma unroll 1
    for (int block = last_to_load<Config>(tile); block >= blocks.first; --block) {
      if (!is_ahead) keys.load(tile, block);
      is_ahead = false;
      if (Config::kLoadsApart && !begun) shared.keys_begun.arrive();
      begun = true;
      load_behind(false);
      if constexpr (!Config::kLoadsApart) {
        behind_slot = slot;
        behind_block = block;
      }
      if (block == lead_block && tile.only_warp == kAllWarps && !order.walks()) shared.nearly_loaded.arrive();
    }
    // Where one thread loads all, the next Q waits for the consumers to be done with this one, and the last V must not.
    static_assert(Config::kLoadsApart || Config::kStagesQ == 1);
    load_behind(true);
    if (Config::kLoadsApart) shared.tile_empty[slot].arrive();
    begin_tile();
  }
}

// V, by a thread of its own: with blocks of few keys one thread is late with what both K and V wait for.
template <class Config>
__device__ __forceinline__ void load_values(const ForwardArguments& arguments, ForwardShared<Config>& shared) {
  BlockLoader<Config, false> values(arguments, shared);
  Ring<kTileSlots, Config::kCounts> ring;
  bool begun = false;
  while (true) {
    shared.tile_full[ring.stage()].wait(ring.parity());
    const Tile& tile = shared.tile[ring.stage()];
    if (rarely(tile.kind == Tile::kEnd)) break;
    if (tile.kind == Tile::kWork && tile.blocks.first < tile.blocks.end) {
      // A launch begins with Q and K: all processors ask at once.
      if (!begun) shared.keys_begun.wait(0);
      begun = true;
#pragma unroll 1
      for (int block = last_to_load<Config>(tile); block >= tile.blocks.first; --block) values.load(tile, block);
    }
    shared.tile_empty[ring.stage()].arrive();
    ring.advance();
  }
}

// Q, by a thread of its own: it neither keeps K waiting for a tile's last rows, nor comes late for it. The threads of its warp
// have L2 hold what the tile's epilogue will add to, while the tile is computed.
template <class Config>
__device__ __forceinline__ void load_queries(const ForwardArguments& arguments, ForwardShared<Config>& shared) {
  const ForwardParams& params = arguments.params;
  QueryLoader<Config> queries(arguments, shared);
  Ring<kTileSlots, Config::kCounts> ring;
  bool is_first = true;
  while (true) {
    shared.tile_full[ring.stage()].wait(ring.parity());
    const Tile& tile = shared.tile[ring.stage()];
    if (rarely(tile.kind == Tile::kEnd)) break;
    if (tile.kind == Tile::kWork && tile.blocks.first < tile.blocks.end) {
      if (is_elected()) {
        if (is_first && shared.q_is_ahead) queries.pass();
        else queries.load(tile);
      }
      if (rarely(params.out_acc != nullptr) && continues(params, tile)) {
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < Config::kQueries; i += 32) {
          const OutputRow row = output_row(params, tile, shared.row[i]);
          if (!row.exists) continue;
          asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(params.out_acc + row.at * params.head_dim_v),
                       "r"(params.head_dim_v * int(sizeof(float))));
        }
      }
    }
    is_first = false;
    shared.tile_empty[ring.stage()].arrive();
    ring.advance();
  }
}

}  // namespace fa3
