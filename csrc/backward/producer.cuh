// Who keeps the consumers busy: a warp that draws tiles, a thread that brings their tensors by bulk loads, and a warp that
// brings lse and delta, each as far ahead as there is room.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "backward/epilogue.cuh"
#include "backward/turns.cuh"
#include "forward/producer.cuh"

namespace fa3 {

// Calls visit(query head of the tile, block of queries) for the steps of a tile that sees the blocks [first, end), in
// their order: head after head, or, where tiles take turns, as turns.cuh says.
template <class Config, class Visit>
__device__ __forceinline__ void for_each_step(const BackwardArguments& arguments, int first, int end, Visit visit) {
  const bool backwards = in_turns<Config>(arguments);
  int head = 0, block = backwards ? end - 1 : first;
#pragma unroll 1
  while (backwards ? block >= first : head < arguments.group) {
    visit(head, block);
    if (backwards) {
      if (++head == arguments.group) head = 0, --block;
    } else {
      if (++block == end) block = first, ++head;
    }
  }
}

// ---- zeros for dq_sum (clear.cuh) -------------------------------------------------------------------------------------

// By the warp that draws tiles.
template <class Config>
class SumClearing {
 public:
  __device__ __forceinline__ explicit SumClearing(const BackwardArguments& arguments) : arguments_(arguments) {}

  __device__ __forceinline__ bool is_needed() const { return !Config::kTurnsOfWarpgroups && arguments_.cleared.first > 0; }

  // Clears what goes with the tile of that number. Called by all lanes.
  __device__ __forceinline__ void clear_chunk(int tile) const {
    const ClearedAhead& cleared = arguments_.cleared;
    const int chunk = tile + cleared.ahead;
    if (!is_needed() || chunk < cleared.first || chunk >= cleared.end) return;
    const int head = chunk / cleared.chunks_of_head, lane = threadIdx.x % 32;
    const int64_t rows = int64_t{arguments_.group} * arguments_.params.forward.seqlen_q;
    const int64_t first = int64_t{chunk - head * cleared.chunks_of_head} * cleared.rows;
    constexpr int kPieces = Config::kHeadDim / 4;  // of 16 bytes
    uint4* const sums = reinterpret_cast<uint4*>(arguments_.params.dq_sum) + head * rows * kPieces;
    const int64_t end = min(first + cleared.rows, rows) * kPieces;  // before the first one where no rows are left
#pragma unroll 1
    for (int64_t i = first * kPieces + lane; i < end; i += 32) sums[i] = make_uint4(0, 0, 0, 0);
    fence_additions();
    __syncwarp();
    if (lane == 0) {
      asm volatile("fence.release.gpu;" ::: "memory");
      end_turn(arguments_.params.cleared + head);
    }
  }

 private:
  const BackwardArguments& arguments_;
};

// By the thread that adds: until all that the tiles of a KV head of the batch, or of a part of one, add to is clear.
// NOTE: not by the warp that draws, since what follows would wait for the answer; the first dQ takes longer.
template <class Config>
__device__ __forceinline__ void wait_until_clear(const BackwardArguments& arguments, int head) {
  const ClearedAhead& cleared = arguments.cleared;
  if (Config::kTurnsOfWarpgroups || cleared.first == 0 || (head + 1) * cleared.chunks_of_head <= cleared.first) return;
  const int32_t* const count = arguments.params.cleared + head;
  int counted;
  do {
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(counted) : "l"(count));
  } while (counted < cleared.chunks_of_head);
  begin_turn();
}

// Where nothing is added up in memory.
struct NoSumClearing {
  __device__ __forceinline__ bool is_needed() const { return false; }
  __device__ __forceinline__ void clear_chunk(int) const {}
};

// ---- tiles -----------------------------------------------------------------------------------------------------------

// The tiles of a launch, in the order in which they are drawn; of a head those that see most first. Of each kRows rows,
// which meet blocks of kColumns. `params`: transposed if the rows are keys; so many of its heads have the same KV head.
// `known`: so many tiles go to the blocks by their numbers, without asking.
// kMoves: blocks begin at the first column that a tile sees, not at a multiple of kColumns: the sequence that it gets is cut
// there. wait(barrier, parity), by one lane, waits for a barrier. clearing: of dq_sum (SumClearing). Called by all lanes of a
// warp, of which one draws; the others help to clear and, if ranges may share tiles, to describe these.
template <int kRows, int kColumns, bool kMoves, class Wait, class Clearing>
__device__ __forceinline__ void draw_row_tiles(const ForwardParams& params, int heads_of_kv_head, TileCounter& counter,
                                               const HeadGroups& groups, int known, RowTiles& tiles, Wait wait,
                                               const Clearing& clearing) {
  const bool is_listed = lists_tiles(params);
  const bool first_lane = threadIdx.x % 32 == 0;
  const bool together = is_listed || clearing.is_needed();
  if (!together && !first_lane) return;
  const unsigned lanes = together ? 0xffffffffu : 1u;
  int per_unit = 0, units_together = 0;
  if (is_listed) {
    const auto& header = *reinterpret_cast<const ScheduleHeader*>(params.workspace);
    per_unit = header.records;
    units_together = max(header.units_per_group, groups.least);
  } else {
    per_unit = (sequence_at(params, 0).q_len + kRows - 1) / kRows;  // of all sequences of a batch
    units_together = groups.heads(max(per_unit, 1));
  }
  const RowTileOrder order(params.heads * params.batch, per_unit, units_together, groups);
  Ring<kRowTileSlots> ring;
  uint32_t loaded_parity = 1;
  const auto wait_together = [&](auto& barrier, uint32_t parity) __attribute__((always_inline)) {
    if (first_lane) wait(barrier, parity);
    __syncwarp(lanes);
  };
  const auto draw = [&] {
    // Who draws long before keeps a tile from a block that is free earlier; and tiles that begin in the order in which they
    // are drawn have what they load in common.
    wait_together(tiles.nearly_loaded, loaded_parity);
    int drawn = 0;
    if (first_lane) drawn = known + atomicAdd(&counter.drawn, 1);
    return __shfl_sync(lanes, drawn, 0);
  };
#pragma unroll 1
  for (int index = known > 0 ? blockIdx.x : draw(); index < order.size(); clearing.clear_chunk(index), index = draw()) {
    const auto [unit, rank] = order[index];
    if (rank >= per_unit) continue;
    const int batch = unit / params.heads;
    // Under a causal mask the first keys are seen by the most queries, and the last queries see the most keys.
    const TileRecord record =
        is_listed ? schedule_records(params.workspace)[rank]
                  : TileRecord{sequence_at(params, batch), (params.transposed ? rank : per_unit - 1 - rank) * kRows, kOneRange};
    Sequence sequence = record.sequence;
    const int first_row = record.first_query;
    const bool is_shared = record.first_range != kOneRange;
    if (kMoves && !is_shared && !params.ascending) {
      const int unseen = min(max(first_row + sequence.first_diagonal, 0), sequence.k_len);
      sequence.k_base += unseen;
      sequence.k_len -= unseen;
      sequence.first_diagonal -= unseen;
      sequence.last_diagonal -= unseen;
    }
    KeyBlocks blocks = visible_blocks(sequence, first_row, kRows, kColumns);
    if (blocks.first == blocks.end) continue;  // the gradients of rows that see nothing are 0 from the start
    if (is_shared) blocks = all_masked(blocks);
    // Rows past the end are hidden one by one.
    if (first_row + kRows > sequence.q_len) blocks.end_open = blocks.first_plain;
    wait_together(tiles.empty[ring.stage()], ring.parity() ^ 1);
    RowTile& tile = tiles.tile[ring.stage()];
    if (is_shared) fill_bounds(tile.bounds, params, record);
    if (first_lane) {
      tile.end = false;
      tile.batch = batch;
      tile.head = unit - batch * params.heads;
      tile.kv_head = tile.head / heads_of_kv_head;
      tile.first_row = first_row;
      tile.sequence = sequence;
      tile.blocks = blocks;
      tile.is_shared = is_shared;
    }
    tiles.full[ring.stage()].arrive();
    ring.advance();
    loaded_parity ^= 1;
  }
  wait_together(tiles.empty[ring.stage()], ring.parity() ^ 1);
  if (first_lane) tiles.tile[ring.stage()].end = true;
  tiles.full[ring.stage()].arrive();
  if (!first_lane) return;
  // The last block to get here leaves the counter as it found it.
  __threadfence();
  if (atomicInc(&counter.finished, gridDim.x - 1) == gridDim.x - 1) atomicExch(&counter.drawn, 0);
}

template <class Config>
__device__ __forceinline__ void draw_key_tiles(const BackwardArguments& arguments, BackwardShared<Config>& shared) {
  // Until tiles are listed and memory is cleared; all others do what they do for a tile that comes from here.
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();  // dQ's kernel, if it has one, may begin where this one has ended
  const auto draw = [&](int known, auto wait, const auto& clearing) __attribute__((always_inline)) {
    draw_row_tiles<Config::kKeys, Config::kQueries, Config::kLongBlocks>(
        arguments.transposed, arguments.params.key_parts, *arguments.counter, arguments.head_groups, known, shared.tiles, wait,
        clearing);
  };
  // Each block's first tile is known without asking, unless tiles take turns (turns.cuh).
  if constexpr (Config::kSharesKeys) {
    draw(gridDim.x, [](auto& barrier, uint32_t parity) { barrier.wait(parity); }, NoSumClearing{});
  } else {
    const bool takes_turns = in_turns<Config>(arguments);
    TurnEnds<Config> ends(shared);
    draw(takes_turns ? 0 : gridDim.x, [&](auto& barrier, uint32_t parity) {
      if (!takes_turns) return barrier.wait(parity);
      while (!barrier.test_wait(parity)) ends.count(arguments.params);
      asm volatile("" ::: "memory");
    }, SumClearing<Config>(arguments));
    while (threadIdx.x % 32 == 0 && takes_turns && ends.count(arguments.params)) {
    }
  }
}

// The next tile is drawn when this many steps of a tile are yet to be loaded.
constexpr int kStepsDrawnAhead = 2;

// ---- loads -----------------------------------------------------------------------------------------------------------

template <class Config>
__device__ __forceinline__ void load_key_tiles(const BackwardArguments& arguments, BackwardShared<Config>& shared) {
  const ForwardParams& forward = arguments.params.forward;
  const bool packed = forward.q_start != nullptr;
  Ring<Config::kStagesK> k_ring;
  Ring<Config::kStagesV> v_ring;
  Ring<Config::kStages> ring;
  Ring<kRowTileSlots> tile_ring;
  while (true) {
    shared.tiles.full[tile_ring.stage()].wait(tile_ring.parity());
    const RowTile& tile = shared.tiles.tile[tile_ring.stage()];
    if (tile.end) break;
    const Sequence sequence = tile.sequence;
    const int batch = tile.batch, first_key = tile.first_row;
    const int first_head = tile.head * arguments.group, kv_head = tile.kv_head;
    const int first_block = tile.blocks.first, end_block = tile.blocks.end;
    const int first_query = packed ? 0 : sequence.k_base;  // of packed ranges load_rows adds it
    shared.tiles.empty[tile_ring.stage()].arrive();
    tile_ring.advance();
    shared.k_empty[k_ring.stage()].wait(k_ring.parity() ^ 1);
    shared.k_full[k_ring.stage()].arrive_and_expect_tx(Config::kBytesK);
    load_rows<Config::kKeys, Config::kHeadDim, Config::kPanel>(arguments.k, shared.k_full[k_ring.stage()],
                                                               shared.k[k_ring.stage()], sequence.q_base, sequence.q_len,
                                                               first_key, kv_head, batch, packed, forward.head_dim);
    k_ring.advance();
    int steps_before_draw = max(arguments.group * (end_block - first_block) - kStepsDrawnAhead, 0);
    bool values_wait = true;  // V comes after the first Q: that is the order in which they are needed
    for_each_step<Config>(arguments, first_block, end_block, [&](int head, int block) {
      if (steps_before_draw-- == 0) shared.tiles.nearly_loaded.arrive();
      LoadBarrier& q_full = shared.step_full[0][ring.stage()];
      LoadBarrier& dout_full = shared.step_full[Config::kLoads - 1][ring.stage()];
      shared.step_empty[0][ring.stage()].wait(ring.parity() ^ 1);
      q_full.arrive_and_expect_tx(Config::kBytesQ + (Config::kLoads == 1 ? Config::kBytesDO : 0));
      load_rows<Config::kQueries, Config::kHeadDim, Config::kPanel>(
          arguments.q, q_full, shared.q[ring.stage()], sequence.k_base, sequence.k_len,
          first_query + block * Config::kQueries, first_head + head, batch, packed, forward.head_dim);
      if (values_wait) {
        shared.v_empty[v_ring.stage()].wait(v_ring.parity() ^ 1);
        shared.v_full[v_ring.stage()].arrive_and_expect_tx(Config::kBytesV);
        load_rows<Config::kKeys, Config::kHeadDimV, Config::kPanelV>(
            arguments.v, shared.v_full[v_ring.stage()], shared.v[v_ring.stage()], sequence.q_base, sequence.q_len,
            first_key, kv_head, batch, packed, forward.head_dim_v);
        v_ring.advance();
        values_wait = false;
      }
      if constexpr (Config::kLoads == 2) {
        shared.step_empty[1][ring.stage()].wait(ring.parity() ^ 1);
        dout_full.arrive_and_expect_tx(Config::kBytesDO);
      }
      load_rows<Config::kQueries, Config::kHeadDimV, Config::kPanelV>(
          arguments.dout, dout_full, shared.dout[ring.stage()], sequence.k_base, sequence.k_len,
          first_query + block * Config::kQueries, first_head + head, batch, packed, forward.head_dim_v);
      ring.advance();
    });
  }
}

// Brings lse, in powers of 2, and delta, by ordinary loads of one warp. Rows that see no key, and rows past the end,
// get lse +inf and delta 0: their weights are exactly 0 whatever the scores, and so is what they add.
template <class Config>
__device__ __forceinline__ void load_row_values(const BackwardArguments& arguments, BackwardShared<Config>& shared) {
  constexpr float kLog2E = 1.4426950408889634f;
  const ForwardParams& params = arguments.params.forward;
  const int lane = threadIdx.x % 32;
  Ring<Config::kStages> ring;
  Ring<kRowTileSlots> tile_ring;
  while (true) {
    shared.tiles.full[tile_ring.stage()].wait(tile_ring.parity());
    const RowTile& tile = shared.tiles.tile[tile_ring.stage()];
    if (tile.end) break;
    const int rows = tile.sequence.k_len;
    const int64_t first_head = int64_t{tile.batch} * params.heads + tile.head * arguments.group;
    const int64_t base = first_head * params.seqlen_q + tile.sequence.k_base;
    const int first_block = tile.blocks.first, end_block = tile.blocks.end;
    shared.tiles.empty[tile_ring.stage()].arrive();
    tile_ring.advance();
    for_each_step<Config>(arguments, first_block, end_block, [&](int head, int block) {
      const int64_t first_row = base + int64_t{head} * params.seqlen_q;
      const float* const lse = params.lse + first_row;
      const float* const delta = arguments.params.delta + first_row;
      shared.step_empty[0][ring.stage()].wait(ring.parity() ^ 1);
      if (lane == 0) shared.block[ring.stage()] = block;
      constexpr int kSteps = (Config::kQueries + 31) / 32;
      const auto is_inside = [&](int i) { return Config::kQueries % 32 == 0 || 32 * i + lane < Config::kQueries; };
      float row_delta[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int row = block * Config::kQueries + 32 * i + lane;
        float row_lse = -INFINITY;
        row_delta[i] = 0.f;
        if (row < rows && is_inside(i)) {
          row_lse = lse[row];
          row_delta[i] = delta[row];
        }
        const bool unseen = row_lse == -INFINITY;
        if (is_inside(i)) shared.lse_log2[ring.stage()][32 * i + lane] = unseen ? INFINITY : row_lse * kLog2E;
        if (unseen) row_delta[i] = 0.f;
      }
      if constexpr (Config::kLoads == 2) {
        asm volatile("" ::: "memory");
        shared.step_full[0][ring.stage()].arrive();
        shared.step_empty[1][ring.stage()].wait(ring.parity() ^ 1);
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (is_inside(i)) shared.delta[ring.stage()][32 * i + lane] = row_delta[i];
      }
      asm volatile("" ::: "memory");
      shared.step_full[Config::kLoads - 1][ring.stage()].arrive();
      ring.advance();
    });
  }
}

// Adds dQ, or stores it, a warpgroup's part at a time, as the consumers leave it in shared memory, which it takes half a step to
// read: a part's place is given back once the other warpgroup's next part is on its way.
template <class Config>
__device__ __forceinline__ void add_query_blocks(const BackwardArguments& arguments, BackwardShared<Config>& shared) {
  const bool packed = arguments.transposed.q_start != nullptr;
  const bool takes_turns = in_turns<Config>(arguments);
  const int columns = arguments.params.dq_sum == nullptr ? arguments.params.forward.head_dim : Config::kHeadDim;
  TurnEnds<Config> ends(shared);
  Ring<kRowTileSlots> tile_ring;
  uint32_t parity = 0;
  int unread = -1;  // the warpgroup whose part is still to be read, or is not known to have been
  const auto give_back = [&] {
    if (unread >= 0) shared.dq_empty[unread].arrive();
    unread = -1;
  };
  while (true) {
    shared.tiles.full[tile_ring.stage()].wait(tile_ring.parity());
    const RowTile& tile = shared.tiles.tile[tile_ring.stage()];
    if (tile.end) break;
    const Sequence sequence = tile.sequence;
    const int batch = tile.batch, first_head = tile.head * arguments.group, first_key = tile.first_row;
    const int first_block = tile.blocks.first, end_block = tile.blocks.end;
    const int first_query = packed ? 0 : sequence.k_base;  // of packed ranges add_panels adds it
    // What comes from one tile alone is not added to zeros (clear.cuh).
    const bool stores = packed && !arguments.params.accumulate && (tile.is_shared || sequence.q_len <= Config::kKeys);
    const int unit = batch * arguments.transposed.heads + tile.head;
    shared.tiles.empty[tile_ring.stage()].arrive();
    tile_ring.advance();
    wait_until_clear<Config>(arguments, unit);
    typename Config::TurnCounter last = Config::kNoTurn;  // where additions are to be counted that are on their way
    const auto end_last_turn = [&] {
      if (last == Config::kNoTurn) return;
      wait_for_additions<0>();
      give_back();
      ends.leave(last);
      if (Config::kTurnsOfWarpgroups) last = Config::kNoTurn;
    };
    for_each_step<Config>(arguments, first_block, end_block, [&](int head, int block) {
      QueryTurn<Config> turn{};
      if (takes_turns) {
        turn = turn_at<Config>(arguments.params, sequence, batch, first_head + head, first_key, block);
        if constexpr (!Config::kTurnsOfWarpgroups) {
          // Asked for the first time while the additions before are on their way.
          int count = counted(arguments.params, turn);
          end_last_turn();
          while (count < turn.before) count = counted(arguments.params, turn);
          begin_turn();
          last = turn.counter;
        }
      }
#pragma unroll
      for (int warpgroup = 0; warpgroup < Config::kConsumers; ++warpgroup) {
        if constexpr (Config::kTurnsOfWarpgroups) {
          // Asked for the first time while dQ is waited for: the answer takes as long.
          const int count = counted(arguments.params, turn);
          shared.dq_full[warpgroup].wait(parity);
          if (count < turn.before) {
            end_last_turn();
            while (counted(arguments.params, turn) < turn.before) {
            }
          }
          begin_turn();
        } else {
          shared.dq_full[warpgroup].wait(parity);
        }
        const int skipped = skipped_dq<Config>(warpgroup), column = first_column_dq<Config>(warpgroup);
        const float* const panels = panels_of(shared, warpgroup) + skipped * Config::kRowsPanelDQ;
        add_panels<Config>(arguments.dq, stores, panels, column + skipped, min(column + Config::kColumnsDQ, columns),
                           sequence.k_base, sequence.k_len,
                           first_query + block * Config::kQueries + (Config::kSplitsColumns ? 0 : warpgroup * 64),
                           first_head + head, batch, packed);
        // The part before has been read, or added, by now, most likely; to wait for this one would keep the next one waiting.
        if constexpr (Config::kTurnsOfWarpgroups) {
          wait_for_additions<1>();
        } else {
          tma_store_wait<1>();
        }
        give_back();
        unread = warpgroup;
        if constexpr (Config::kTurnsOfWarpgroups) {
          if (last != Config::kNoTurn) ends.leave(last);
          last = turn.counter++;
        }
      }
      parity ^= 1;
    });
    end_last_turn();
  }
  tma_store_wait<0>();
  if (takes_turns) ends.leave(Config::kNoTurn);
}

}  // namespace fa3
