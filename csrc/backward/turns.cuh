// Deterministic gradients: the tiles that add to a block of dQ take turns, so that its sum is made in the same order in
// every run. (dK and dV need none of this: one block sums them up in registers, step after step.)
//
// The order is that in which tiles are drawn, by their keys (DrawOrder). A (batch, head, block of queries) has a counter of the
// additions that have been made to it, 0 at first. A tile waits until those of all tiles before it that see the block are
// counted, adds, and counts itself.
//
// Why nobody waits for ever. Say that the tiles of a launch are numbered as they are drawn. A tile waits for tiles of its own
// sequence and KV head that come before it in their order. These have smaller numbers: dense tiles are drawn in that order, and
// the schedule lists those of a range so. Numbers are given to blocks that run, by a counter, and a
// block finishes its tiles in the order of their numbers. (It finishes one while it loads the next; but for that it waits
// for no turn but its own, of the tile before.) So of the tiles that are not finished, the one with the smallest number has nobody
// to wait for, whatever the number of blocks that run at a time.
// (Were the first numbers given by blockIdx instead, one might belong to a block that has no processor yet.)
//
// Why few wait at all. Tiles that run side by side have neighbouring keys, and under a mask the later of two sees less of the
// first queries. So they walk from the last block of queries to the first: where all begin together, at the last block, each
// is one addition behind its predecessor, and those that begin elsewhere come after it by as many steps as their keys are
// apart. Of query heads that share their keys each block serves one after the other, to keep that distance. Under a causal
// mask tiles with later keys end earlier: drawn in ascending order, the successors of those that ran side by side would begin
// closer together than they can add. In kSnake they begin as far apart as the tiles before: what each of these was behind its
// predecessor, in one group, it makes up for in the next. (Any further apart, and what they read and add to is no longer in the
// L2 cache when they come.)
#pragma once

#include "backward/shared.cuh"

namespace fa3 {

// What the additions of a tile to a block of dQ wait for.
struct QueryTurn {
  int* count;  // of the additions made to the block
  int before;  // how many of them come before this tile's
};

// `sequence`: transposed, as tiles have it. Ranges of queries that overlap would share counters; they then count more, so
// that some wait for less, but none for ever.
template <class Config>
__device__ __forceinline__ QueryTurn turn_at(const BackwardArguments& arguments, const Sequence& sequence, int batch,
                                             int head, int first_key, int block) {
  const ForwardParams& forward = arguments.params.forward;
  const int first_query = block * Config::kQueries, tile = first_key / Config::kKeys;
  const TileGroup group = tile_group(arguments.transposed.order, tile, (sequence.q_len + Config::kKeys - 1) / Config::kKeys);
  // The first tile whose last key is seen by one of these queries, or by a later one; and the last one whose first key is
  // seen by one of them, or by an earlier one. So all from the one to the other see them.
  const int first_tile = max(first_query - sequence.last_diagonal, 0) / Config::kKeys;
  const int last_query = min(first_query + Config::kQueries, sequence.k_len) - 1;
  const int last_tile = min((last_query - sequence.first_diagonal) / Config::kKeys, group.end - 1);
  const int64_t row = (int64_t{batch} * forward.heads + head) * forward.seqlen_q;
  return {arguments.params.turns + row + sequence.k_base + first_query, max(group.first - first_tile, 0) + last_tile - tile};
}

// Whether the turn has come. If so, what the tiles before have added is there for what this thread does next.
__device__ __forceinline__ bool has_come(const QueryTurn& turn) {
  int count;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(turn.count) : "memory");
  return count >= turn.before;
}

// Counts an addition that has been made, by this thread or by one that it has met at a barrier since.
__device__ __forceinline__ void end_turn(int* count) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
}

// NOTE: bulk additions go by the asynchronous proxy, counts by the generic one, and acquire and release order only what goes
// by one (PTX ISA, "Proxies" and "Async proxy"): a fence between proxies stands before the additions of a turn that has
// come, and between additions that have been made and their count.
__device__ __forceinline__ void fence_additions() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Waits until this thread's bulk additions have been made and are visible to it. (That shared memory has been read, which is
// all that cp.async.bulk.wait_group.read waits for, says nothing of the sums.)
__device__ __forceinline__ void wait_for_additions() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  fence_additions();
}

// A release waits until all that its thread has seen done is done for all threads, which takes so long that the thread that
// adds leaves it to the one that draws tiles, which has time. What is left to it is in the order of the additions.
template <class Config>
class TurnEnds {
 public:
  __device__ __forceinline__ explicit TurnEnds(BackwardShared<Config>& shared) : shared_(shared) {}

  // By the thread that adds: additions have been made; or, nullptr, there will be no more.
  __device__ __forceinline__ void leave(int* count) {
    shared_.added_empty[ring_.stage()].wait(ring_.parity() ^ 1);
    shared_.added[ring_.stage()] = count;
    shared_.added_full[ring_.stage()].arrive();
    ring_.advance();
  }

  // By the other one: counts an addition, if there is one. False: there will be no more.
  __device__ __forceinline__ bool count_one() {
    if (!shared_.added_full[ring_.stage()].test_wait(ring_.parity())) return true;
    asm volatile("" ::: "memory");
    int* const count = shared_.added[ring_.stage()];
    shared_.added_empty[ring_.stage()].arrive();
    ring_.advance();
    if (count == nullptr) return false;
    end_turn(count);
    return true;
  }

 private:
  BackwardShared<Config>& shared_;
  Ring<kAddedSlots> ring_;
};

}  // namespace fa3
