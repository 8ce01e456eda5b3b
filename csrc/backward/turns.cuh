// Deterministic gradients: the tiles that add to a block of dQ take turns, so that its sum is made in the same order in
// every run. (dK and dV need none of this: one block sums them up in registers, step after step.)
//
// The order is that of the keys. A (batch, head, block of queries) has a counter of the additions that have been made to
// it, 0 at first. A tile waits until those of all tiles before it that see the block are counted, adds, and counts itself. Or
// each of its warpgroups does so, which add to different parts of the block (kTurnsOfWarpgroups).
//
// Why nobody waits for ever. Say that the tiles of a launch are numbered as they are drawn. A tile waits for tiles of its own
// sequence and KV head with smaller keys. These have smaller numbers: dense tiles are drawn in the order of their keys, and
// the schedule lists those of a range so (ForwardParams::ascending). Numbers are given to blocks that run, by a counter, and a
// block finishes its tiles in the order of their numbers. (It finishes one while it loads the next; but for that it waits
// for no turn but its own, of the tile before.) So of the tiles that are not finished, the one with the smallest number has nobody
// to wait for, whatever the number of blocks that run at a time.
// (Were the first numbers given by blockIdx instead, one might belong to a block that has no processor yet.)
//
// Why few wait at all. Tiles that run side by side have neighbouring keys, and under a mask the later of two sees less of the
// first queries. So they walk from the last block of queries to the first: where all begin together, at the last block, each
// is one addition behind its predecessor, and those that begin elsewhere come after it by as many steps as their keys are
// apart. Of query heads that share their keys each block serves one after the other, to keep that distance. Under a causal
// mask the tiles that run side by side end in the reverse order, and their successors begin in the order in which they are
// drawn, so those are drawn no earlier than they are needed.
//
// Where heads are walked in groups, all tiles that run are long ones at a group's start and short ones at its end, and then they
// begin faster than one after the other can add. So under a causal mask the order is slanted where that pays (key_head_groups):
// of G heads that are walked together each begins about 1/G of its tiles later than the one before. At any time tiles of all
// lengths begin, at a steady rate. (Numbers of this order that belong to no tile are nobody's to wait for.)
#pragma once

#include "backward/shared.cuh"

namespace fa3 {

// The order in which tiles are drawn: that of TileSequence, or slanted (step after step, of each head that has begun and has
// tiles left one).
class RowTileOrder {
 public:
  __device__ __forceinline__ RowTileOrder(int units, int tiles_per_unit, int units_together, const HeadGroups& groups)
      : groups_(units, tiles_per_unit, units_together, groups.least_last),
        slant_(groups.slanted ? (tiles_per_unit + units_together - 1) / units_together : 0) {}

  __device__ __forceinline__ int size() const {
    return slant_ == 0 ? groups_.size() : (groups_.units + groups_.units_per_group - 1) * slant_ * groups_.units_per_group;
  }

  // NOTE: slanted, some places are no tile's: their rank is past the last one.
  __device__ __forceinline__ TileSequence::Place operator[](int index) const {
    if (slant_ == 0) return groups_[index];
    const int step = index / groups_.units_per_group, behind = index - step * groups_.units_per_group;
    const int unit = step / slant_ - behind;  // of those that have begun, the last one first
    const bool exists = unit >= 0 && unit < groups_.units;
    return {unit, exists ? step - unit * slant_ : groups_.tiles_per_unit};
  }

 private:
  TileSequence groups_;
  int slant_;  // steps by which each unit begins after the one before; 0: in groups
};

// What the additions of a tile to a block of dQ wait for.
template <class Config>
struct QueryTurn {
  typename Config::TurnCounter counter;  // of the additions to the block, or to the first warpgroup's part; the other's follows
  int before;                            // how many of them come before this tile's
};

// Whether tiles take turns.
template <class Config>
__device__ __forceinline__ bool in_turns(const BackwardArguments& arguments) {
  return Config::kTurnsOfWarpgroups || arguments.params.turns != nullptr;
}

template <class Config>
constexpr int counters_of_block() {
  return Config::kTurnsOfWarpgroups ? Config::kConsumers : 1;
}

__device__ __forceinline__ int32_t* counter_at(const BackwardParams&, int32_t* counter) { return counter; }
__device__ __forceinline__ int32_t* counter_at(const BackwardParams& params, uint32_t counter) { return params.turns + counter; }

// `sequence`: transposed, as tiles have it. Ranges of queries that overlap would share counters; they then count more, so
// that some wait for less, but none for ever.
template <class Config>
__device__ __forceinline__ QueryTurn<Config> turn_at(const BackwardParams& params, const Sequence& sequence, int batch,
                                                     int head, int first_key, int block) {
  const int first_query = block * Config::kQueries;
  // The first tile whose last key is seen by one of these queries, or by a later one: so all from it to this one see them.
  const int first_tile = max(first_query - sequence.last_diagonal, 0) / Config::kKeys;
  const int before = first_key / Config::kKeys - first_tile;
  using Place = std::conditional_t<Config::kTurnsOfWarpgroups, uint32_t, int64_t>;
  const Place row = (Place(batch) * params.forward.heads + head) * params.forward.seqlen_q;
  const Place place = counters_of_block<Config>() * (row + sequence.k_base + first_query);
  if constexpr (Config::kTurnsOfWarpgroups) {
    return {place, before};
  } else {
    return {params.turns + place, before};
  }
}

// How many additions have been counted where a turn waits for its own: it has come when `before` of them have. NOTE: relaxed,
// for a load that acquires keeps its thread waiting; so begin_turn comes before the additions.
template <class Config>
__device__ __forceinline__ int counted(const BackwardParams& params, const QueryTurn<Config>& turn) {
  int count;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter_at(params, turn.counter)));
  return count;
}

// Counts an addition that has been made, by a thread that has passed a fence for the device since it learnt of that.
__device__ __forceinline__ void end_turn(int32_t* count) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
}

// NOTE: bulk additions go by the asynchronous proxy, counts by the generic one, and acquire and release order only what goes
// by one (PTX ISA, "Proxies" and "Async proxy"): a fence between proxies stands before the additions of a turn that has
// come, and between additions that have been made and their count.
__device__ __forceinline__ void fence_additions() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// After this, what the tiles before have added is there for what this thread adds: it has seen their additions counted.
__device__ __forceinline__ void begin_turn() {
  asm volatile("fence.acquire.gpu;" ::: "memory");
  fence_additions();
}

// Waits until this thread's bulk additions, but for the last kPending groups, have been made and are visible to it. (That shared
// memory has been read, which is all that cp.async.bulk.wait_group.read waits for, says nothing of the sums.)
template <int kPending>
__device__ __forceinline__ void wait_for_additions() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
  fence_additions();
}

// A release waits until all that its thread has seen done is done for all threads, which takes so long that the thread that
// adds leaves it to the one that draws tiles, which has time. What is left to it is in the order of the additions.
// NOTE: the thread that adds may keep a turn that is over until the next dQ is there: that dQ waits for no other block.
template <class Config>
class TurnEnds {
 public:
  __device__ __forceinline__ explicit TurnEnds(BackwardShared<Config>& shared) : shared_(shared) {}

  // By the thread that adds: additions have been made; or, kNoTurn, there will be no more.
  __device__ __forceinline__ void leave(typename Config::TurnCounter counter) {
    shared_.added_empty[ring_.stage()].wait(ring_.parity() ^ 1);
    shared_.added[ring_.stage()] = counter;
    shared_.added_full[ring_.stage()].arrive();
    ring_.advance();
  }

  // By the other one: counts what additions it finds. False: there will be no more.
  __device__ __forceinline__ bool count(const BackwardParams& params) {
    if (!is_one_left()) return true;
    const typename Config::TurnCounter counter = take();
    if (counter == Config::kNoTurn) return false;
    // Turns of warpgroups end twice a step: two of them after one fence, which takes most of the time.
    const bool is_next = Config::kTurnsOfWarpgroups && is_one_left();
    const typename Config::TurnCounter next = is_next ? take() : Config::kNoTurn;
    asm volatile("fence.release.gpu;" ::: "memory");
    end_turn(counter_at(params, counter));
    if (next != Config::kNoTurn) end_turn(counter_at(params, next));
    return !is_next || next != Config::kNoTurn;
  }

 private:
  __device__ __forceinline__ bool is_one_left() {
    return shared_.added_full[ring_.stage()].test_wait(ring_.parity());
  }

  __device__ __forceinline__ typename Config::TurnCounter take() {
    asm volatile("" ::: "memory");
    const typename Config::TurnCounter counter = shared_.added[ring_.stage()];
    shared_.added_empty[ring_.stage()].arrive();
    ring_.advance();
    return counter;
  }

  BackwardShared<Config>& shared_;
  Ring<kAddedSlots> ring_;
};

}  // namespace fa3
