// A consumer warpgroup: 64 rows of queries of every tile of its team.
//
// A step starts the product S = Q K^T of a block of keys and the product O += P V of the block before it, and computes the
// softmax of the former while the tensor cores finish the latter. Exponentials take a warp 8 cycles each, in which it can do
// what else softmax needs; the compiler arranges that, but only within a basic block. Where there is room for the next tile's
// queries, one stream of steps runs through all tiles of a block: the two products of a step may belong to different tiles.
// Turns on the tensor cores are handed from warpgroup to warpgroup, so that one computes softmax while another multiplies.
#pragma once

#include "forward/epilogue.cuh"
#include "forward/shared.cuh"
#include "forward/softmax.cuh"

namespace fa3 {

// Starts c = a b, or c += a b, as one group of asynchronous products: of all that a and b have, or of products kFrom to kTo, which
// follow on those before.
template <int kFrom = 0, int kTo = -1, class Mma, class A, class B, class C>
__device__ __forceinline__ void multiply(Mma& mma, const A& a, const B& b, C& c, bool accumulate) {
  constexpr int kEnd = kTo < 0 ? decltype(size<2>(a))::value : kTo;
  if constexpr (kFrom == 0) warpgroup_fence_operand(c);  // to touch it later would wait for the products before
  warpgroup_arrive();
  mma.accumulate_ = accumulate ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
#pragma unroll
  for (int k = kFrom; k < kEnd; ++k) {
    cute::gemm(mma, a(_, _, k), b(_, _, k), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
}

// A warpgroup's turn on the tensor cores: it waits for its own barrier, and arrives at the next warpgroup's.
template <class Config>
struct Turn {
  int warpgroup;

  __device__ explicit Turn(int warpgroup) : warpgroup(warpgroup) {
    if (warpgroup == Config::kConsumers - 1) pass();  // the first turn is warpgroup 0's
  }
  __device__ __forceinline__ void take() const {
    if constexpr (Config::kTakesTurns) cutlass::arch::NamedBarrier::sync(256, warpgroup);
  }
  __device__ __forceinline__ void pass() const {
    if constexpr (Config::kTakesTurns) {
      cutlass::arch::NamedBarrier::arrive(256, warpgroup + 1 == Config::kConsumers ? 0 : warpgroup + 1);
    }
  }
};

// The lowest `count` bits, all or none where it is out of [0, 32].
__device__ __forceinline__ uint32_t low_bits(int count) {
  uint32_t bits;
  asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(bits) : "r"(max(count, 0)));
  return bits;
}

// How many of a thread's columns 0, 1, 8, 9, 16, 17, ... come before `column`.
__device__ __forceinline__ int columns_before(int column) {
  return (column >> 3) * 2 + min(column & 7, 2);  // below 1 where column is
}

// Hides the scores that the mask or the end of the keys hide, for a thread whose columns begin at first_key. Rows past the
// last query see what that one sees.
template <class Config, class Scores>
__device__ __forceinline__ void hide(Scores& scores, const Tile& tile, const KeyBounds8 (&bounds)[Config::kQueries],
                                     const TileRow (&rows)[2], int first_key) {
  constexpr int kColumns = Config::kKeys / 4;  // a thread's
  const TileMask mask = tile.mask;
  int first[2], end[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = min(int{rows[r].query}, mask.last_row);
    first[r] = query + mask.first_diagonal;
    end[r] = min(query + mask.end_diagonal, mask.end_key);
  }
  if (rarely(tile.is_shared)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const KeyBounds8 keys = bounds[min(int{rows[r].query}, mask.last_row)];
      first[r] = keys.first;
      end[r] = keys.end;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int hidden = columns_before(first[r] - first_key), seen = columns_before(end[r] - first_key);
#pragma unroll
    for (int word = 0; word < kColumns; word += 32) {
      const uint32_t visible = low_bits(seen - word) & ~low_bits(hidden - word);
#pragma unroll
      for (int column = word; column < word + 32 && column < kColumns; ++column) {
        float& score = scores(column / 2 * 4 + 2 * r + column % 2);
        score = visible >> (column - word) & 1 ? score : -INFINITY;
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void consume(const ForwardArguments& arguments, ForwardShared<Config>& shared) {
  using Element = typename Config::Element;
  const ForwardParams& params = arguments.params;
  const int thread = consumer_thread<Config>();
  // This thread's rows and, of every 8 columns, the first of its two (softmax.cuh).
  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  const auto rows_of_thread = [&](TileRow (&rows)[2]) __attribute__((always_inline)) {
    rows[0] = shared.row[row];
    rows[1] = shared.row[row + 8];
  };
  // Whether a launch has no softcap, no running state and an output of boxes, so that there is less to look at. NOTE: opaque,
  // or it would be made anew wherever it is asked for, from constant memory that takes 30 cycles to answer.
  int is_usual = params.softcap == 0.f && params.out_acc == nullptr && params.out_dtype != DType::fp32 &&
                 (Config::kStagesO == 0 || arguments.box_queries != 0);
  asm volatile("" : "+r"(is_usual));
  const int warpgroup = cutlass::canonical_warp_group_idx() - 1 - consumer_team<Config>() * Config::kConsumers;
  const Turn<Config> turn(warpgroup);
  constexpr float kLog2E = 1.4426950408889634f;
  const float scale_log2 = (params.softcap == 0.f ? params.softmax_scale : params.softcap) * kLog2E;

  typename Config::MmaQK mma_qk;
  typename Config::MmaPV mma_pv;
  const auto thread_qk = mma_qk.get_slice(128 * warpgroup);
  const auto thread_pv = mma_pv.get_slice(128 * warpgroup);
  // Descriptors of all stages.
  const Tensor sQ = thread_qk.partition_fragment_A(make_tensor(make_smem_ptr(shared.q[0]), typename Config::LayoutQ{}));
  const Tensor sK = thread_qk.partition_fragment_B(make_tensor(make_smem_ptr(shared.k[0]), typename Config::LayoutK{}));
  const Tensor sVt = thread_pv.partition_fragment_B(make_tensor(make_smem_ptr(shared.v[0]), typename Config::LayoutVt{}));
  Tensor rS = partition_fragment_C(mma_qk, Shape<Int<Config::kQueries>, Int<Config::kKeys>>{});
  Tensor rO = partition_fragment_C(mma_pv, Shape<Int<Config::kQueries>, Int<Config::kHeadDimV>>{});
  // Rounded weights: those that the running product reads, and those of the block after it.
  Tensor rP = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Config::kKeys / 16>>>{});
  [[maybe_unused]] Tensor rNext = make_tensor_like(rP);
  static_assert(size(rS) == size(rP));
  const auto round_into = [&](auto& weights, int i) __attribute__((always_inline)) {
    reinterpret_cast<uint32_t&>(weights(i)) = round_pair<Element>(rS(i), rS(i + 1));
  };

  Ring<Config::kStagesQ, Config::kCounts> q_ring;  // of the scores' tile
  Ring<Config::kStages, Config::kCounts> k_ring, v_ring;
  Ring<kTileSlots, Config::kCounts> tile_ring;  // of the tile after the scores'
  int slot = 0;                   // of the scores' tile
  int block = 0;                  // to be multiplied next: the tile has those down to first_block
  int first_block = 1;
  bool running = false;           // rP holds the weights of a tile's last block
  bool has_output = false;        // rO holds what the blocks before it gave
  int left_behind = 0;            // blocks of a tile that come after the last one that this warpgroup's rows see
  OnlineSoftmax softmax;
  float rescale[2];

  const auto seen_by_rows = [&](const Tile& tile) -> const KeyBlocks& {
    if constexpr (Config::kSkipsBlocks) return tile.seen[warpgroup];
    else return tile.blocks;
  };

  const auto release_keys = [&]() __attribute__((always_inline)) {
    arrive_as_warp(shared.k_empty[k_ring.stage()]);
    k_ring.advance();
  };
  const auto release_scores = [&](bool last_of_tile) __attribute__((always_inline)) {
    release_keys();
    arrive_as_warp_if(last_of_tile, shared.q_empty[q_ring.stage()]);
    q_ring.advance_if(last_of_tile);
  };

  const auto rescale_output = [&]() __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < decltype(size(rO))::value; ++i) rO(i) *= rescale[i / 2 % 2];
  };

  // Waits for the product with V, and gives that back, if there was one.
  const auto finish_values = [&](bool has_values) __attribute__((always_inline)) {
    warpgroup_wait<0>();
    warpgroup_fence_operand(rO);
    if (!has_values) return;
    arrive_as_warp(shared.v_empty[v_ring.stage()]);
    v_ring.advance();
  };

  // When a plain step rounds its weights: beside the exponentials, into registers that the running product does not read;
  // once that product is done, in the middle of the exponentials; or after them.
  enum class Rounding { kBeside, kFromMiddle, kAfter };

  // A step between two blocks of a tile of which every query has seen a key and none of whose scores is hidden. `weights`
  // are those of the block before; the block's own go to `next_weights`.
  const auto plain_step = [&](auto& weights, auto& next_weights, auto when) __attribute__((always_inline)) {
    constexpr Rounding kRounding = decltype(when)::value;
    constexpr int kHalf = decltype(size(rS))::value / 2;
    const int q_stage = q_ring.uniform_stage(), k_stage = k_ring.uniform_stage(), v_stage = v_ring.uniform_stage();
    wait_for_both(shared.k_full[k_ring.stage()], k_ring.parity(), shared.v_full[v_ring.stage()], v_ring.parity());
    turn.take();
    multiply(mma_qk, sQ(_, _, _, q_stage), sK(_, _, _, k_stage), rS, false);
    multiply(mma_pv, weights, sVt(_, _, _, v_stage), rO, has_output);
    has_output = true;
    turn.pass();
    warpgroup_wait<Config::kOverlapsSoftmax ? 1 : 0>();
    warpgroup_fence_operand(rS);
    const bool last = block == first_block;
    if constexpr (kRounding == Rounding::kFromMiddle) release_keys();
    else release_scores(last);
    bool rounds = kRounding == Rounding::kBeside;  // NOTE: known to the compiler at every use
    const auto round = [&](int i) __attribute__((always_inline)) {
      if (rounds) round_into(next_weights, i);
    };
    const auto middle = [&](float (&shift)[2], float (&block_sum)[2][2]) __attribute__((always_inline)) {
      if constexpr (kRounding == Rounding::kFromMiddle) {
        // NOTE: the branch keeps ptxas from moving the wait in front of all exponentials, and the additions of 0 in it from
        // moving what stands before it behind it, and the other way round.
        if (rarely(last)) {
          const float zero = params.softcap;  // else there were no plain step
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            asm volatile("add.f32 %0, %0, %1;" : "+f"(shift[r]) : "f"(zero));
            asm volatile("add.f32 %0, %0, %1;" : "+f"(block_sum[r][0]) : "f"(zero));
            asm volatile("add.f32 %0, %0, %1;" : "+f"(block_sum[r][1]) : "f"(zero));
          }
          arrive_as_warp(shared.q_empty[q_ring.stage()]);
          q_ring.advance();
        }
        finish_values(true);
        warpgroup_fence_operand(rS);
#pragma unroll
        for (int i = 0; i < kHalf; i += 2) round_into(next_weights, i);
        rounds = true;
      }
    };
    const bool changes = softmax.step_unseen(rS, scale_log2, rescale, round, middle);
    // NOTE: what keeps ptxas from moving this wait in front of the softmax, which would then hide nothing, is that a
    // branch (on `changes`, inside) ends the basic block before it.
    if constexpr (kRounding != Rounding::kFromMiddle) finish_values(true);
    if constexpr (kRounding == Rounding::kAfter) {
#pragma unroll
      for (int i = 0; i < 2 * kHalf; i += 2) round_into(next_weights, i);
    }
    if (rarely(changes)) rescale_output();
    --block;
  };

  // Turns the scores of the tile's current block, whatever they are, into weights. True as OnlineSoftmax::step.
  const auto weigh = [&](OnlineSoftmax& state) __attribute__((always_inline)) -> bool {
    const Tile& tile = shared.tile[slot];
    if (rarely(!is_usual) && params.softcap != 0.f) {
      const float inner = params.softmax_scale / params.softcap;
#pragma unroll
      for (int i = 0; i < decltype(size(rS))::value; ++i) rS(i) = tanh_accurate(rS(i) * inner);
    }
    const int first_plain = seen_by_rows(tile).first_plain, end_open = seen_by_rows(tile).end_open;
    if ((block < first_plain) | (block >= end_open)) {
      TileRow rows[2];
      rows_of_thread(rows);
      hide<Config>(rS, tile, shared.bounds[slot], rows, block * Config::kKeys + column);
    }
    return state.step(rS, scale_log2, rescale);
  };

  const auto round_weights = [&]() __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < decltype(size(rS))::value; i += 2) round_into(rP, i);
  };

  // Gives back the keys, and the values, of so many blocks that this warpgroup leaves out.
  // NOTE: not without waiting for them: one that is still on its way would later pass for the next block of its stage.
  const auto skip_keys = [&](int blocks) __attribute__((always_inline)) {
#pragma unroll 1
    for (; blocks > 0; --blocks) {
      shared.k_full[k_ring.stage()].wait(k_ring.parity());
      turn.take();
      turn.pass();
      release_scores(false);
    }
  };
  const auto skip_values = [&](int blocks) __attribute__((always_inline)) {
#pragma unroll 1
    for (; blocks > 0; --blocks) {
      shared.v_full[v_ring.stage()].wait(v_ring.parity());
      arrive_as_warp(shared.v_empty[v_ring.stage()]);
      v_ring.advance();
    }
  };

  const auto skip_blocks = [&](int blocks) __attribute__((always_inline)) {
#pragma unroll 1
    for (; blocks > 0; --blocks) {
      skip_keys(1);
      skip_values(1);
    }
  };

  // Before a tile's last product is there: writes lse, and finds what the output is to be multiplied by. False if this warp's rows
  // are not to be written.
  const auto close_tile = [&](int of_slot, RowFactors& factors) __attribute__((always_inline)) -> bool {
    const Tile& tile = shared.tile[of_slot];
    const int warp = thread / 32;
    if (rarely(__any_sync(0xffffffffu, softmax.lost))) {
      if (thread % 32 == 0) shared.repeat[atomicAdd(&shared.repeats, 1)] = {tile.index, warp};
      return false;
    }
    const int only_warp = tile.only_warp;
    if (rarely((only_warp != kAllWarps) & (only_warp != warp))) return false;
    TileRow rows[2];
    rows_of_thread(rows);
    factors = close_rows(params, tile, rows, softmax, is_usual);
    return true;
  };

  // Hands a tile's output over to memory, and the tile back to who draws them; or, true, half of it: finish_output is to
  // follow.
  const auto write_output = [&](int of_slot, bool writes, const RowFactors& factors) __attribute__((always_inline)) -> bool {
    bool is_half = false;
    if (!rarely(!writes)) {
      TileRow rows[2];
      rows_of_thread(rows);
      is_half = write_rows<Config>(arguments, shared, shared.tile[of_slot], rows, factors, is_usual, rO);
    }
    if (!is_half) shared.tile_empty[of_slot].arrive();
    return is_half;
  };
  const auto finish_output = [&](int of_slot) __attribute__((always_inline)) {
    if constexpr (Config::kHalvesOutput) {
      store_boxes<Config, Config::kStagesO, Config::kPanelsO>(arguments, shared, shared.tile[of_slot], rO);
      shared.tile_empty[of_slot].arrive();
    }
  };

  // Takes the next tile from the ring if it has scores to compute. If not, it is dealt with here, unless an output is yet to
  // be finished.
  enum class Next { kScores, kNothing, kEnd };
  const auto next_tile = [&]() __attribute__((always_inline)) -> Next {
    const int next = tile_ring.stage();
    shared.tile_full[next].wait(tile_ring.parity());
    const Tile& tile = shared.tile[next];
    const int kind = tile.kind, first = tile.blocks.first, end = tile.blocks.end;
    if (!rarely((kind != Tile::kWork) | (first >= end))) {
      slot = next;
      tile_ring.advance();
      block = seen_by_rows(tile).end - 1;
      first_block = seen_by_rows(tile).first;
      shared.q_full[q_ring.stage()].wait(q_ring.parity());
      return Next::kScores;
    }
    if (kind == Tile::kEnd) return Next::kEnd;
    if (kind == Tile::kPause && running) return Next::kNothing;
    if (kind == Tile::kPause) arrive_as_warp(shared.drained);
    else if (tile.only_warp == kAllWarps) write_unseen_tile<Config>(params, shared, tile);
    shared.tile_empty[next].arrive();
    tile_ring.advance();
    return Next::kNothing;
  };

  clear(rP);
  while (true) {
    if constexpr (Config::kTilesOverlap) {
      // A step of any kind. The scores are those of the tile's next block, or of the next tile's first one.
      const bool same_tile = block >= first_block;
      const int output_slot = slot;
      bool more = true;  // there are scores to compute
      if (!same_tile) {
        const Next next = next_tile();
        more = next == Next::kScores;
        if (!more && !running) {
          if (next == Next::kEnd) break;
          continue;
        }
      }
      const int q_stage = q_ring.uniform_stage(), k_stage = k_ring.uniform_stage(), v_stage = v_ring.uniform_stage();
      if (more) shared.k_full[k_ring.stage()].wait(k_ring.parity());
      if (running) shared.v_full[v_ring.stage()].wait(v_ring.parity());
      // NOTE: at the start there is no P V, and at the end no Q K^T, yet both are multiplied, from whatever lies there, and
      // forgotten: a product that depends on a branch makes the compiler wait for each.
      turn.take();
      multiply(mma_qk, sQ(_, _, _, q_stage), sK(_, _, _, k_stage), rS, false);
      multiply(mma_pv, rP, sVt(_, _, _, v_stage), rO, has_output);
      turn.pass();
      RowFactors factors;
      bool writes = false;
      if (Config::kClosesEarly && !same_tile && running) writes = close_tile(output_slot, factors);
      warpgroup_wait<Config::kOverlapsSoftmax ? 1 : 0>();
      warpgroup_fence_operand(rS);
      OnlineSoftmax next_softmax;
      if (same_tile) next_softmax = softmax;
      bool changes = false;
      if (more) {
        release_scores(block == first_block);
        changes = weigh(next_softmax);
      }
      finish_values(running);
      round_weights();
      if (same_tile) {
        if (changes) rescale_output();
      } else if (running) {
        if (!Config::kClosesEarly) writes = close_tile(output_slot, factors);
        if (write_output(output_slot, writes, factors)) finish_output(output_slot);
      }
      softmax = next_softmax;
      running = more;
      has_output = same_tile;
      --block;
      if (!more) continue;
    } else if (block < first_block) {
      // A tile's last product and the next one's first scores, each for itself; under these the rest of the output.
      const int output_slot = slot;
      bool has_rest = false;
      if (running) {
        const int v_stage = v_ring.uniform_stage();
        shared.v_full[v_ring.stage()].wait(v_ring.parity());
        turn.take();
        multiply(mma_pv, rP, sVt(_, _, _, v_stage), rO, has_output);
        turn.pass();
        RowFactors factors;
        const bool writes = close_tile(slot, factors);
        finish_values(running);
        left_behind = first_block - shared.tile[slot].blocks.first;
        has_rest = write_output(slot, writes, factors);
        running = false;
        if constexpr (Config::kSkipsBlocks && !Config::kWalks) skip_blocks(left_behind);
      }
      const Next next = next_tile();
      if (rarely(next != Next::kScores)) {
        if (has_rest) finish_output(output_slot);
        if (next == Next::kEnd) break;
        continue;
      }
      int left_out = shared.tile[slot].blocks.end - 1 - block;
      if constexpr (Config::kWalks) {
        // The first blocks of this tile may be the last ones of the tile before.
        const int kept = shared.tile[slot].kept;
        if (kept == 0) skip_blocks(left_behind);
        else left_out += left_behind - kept;
      }
      if constexpr (Config::kSkipsBlocks) skip_keys(left_out);
      const int q_stage = q_ring.uniform_stage(), k_stage = k_ring.uniform_stage();
      shared.k_full[k_ring.stage()].wait(k_ring.parity());
      turn.take();
      multiply(mma_qk, sQ(_, _, _, q_stage), sK(_, _, _, k_stage), rS, false);
      turn.pass();
      if (has_rest) finish_output(output_slot);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rS);
      release_scores(block == first_block);
      if constexpr (Config::kSkipsBlocks) skip_values(left_out);
      softmax = OnlineSoftmax{};
      weigh(softmax);
      round_weights();
      running = true;
      has_output = false;
      --block;
    } else {
      const int q_stage = q_ring.uniform_stage(), k_stage = k_ring.uniform_stage(), v_stage = v_ring.uniform_stage();
      shared.k_full[k_ring.stage()].wait(k_ring.parity());
      shared.v_full[v_ring.stage()].wait(v_ring.parity());
      turn.take();
      multiply(mma_qk, sQ(_, _, _, q_stage), sK(_, _, _, k_stage), rS, false);
      multiply(mma_pv, rP, sVt(_, _, _, v_stage), rO, has_output);
      has_output = true;
      turn.pass();
      warpgroup_wait<Config::kOverlapsSoftmax ? 1 : 0>();
      warpgroup_fence_operand(rS);
      release_scores(block == first_block);
      const bool changes = weigh(softmax);
      finish_values(running);
      round_weights();
      if (changes) rescale_output();
      --block;
    }

    const KeyBlocks& seen = seen_by_rows(shared.tile[slot]);
    const int first_plain = max(first_block, seen.first_plain);
    if (block >= seen.end_plain) continue;
    if constexpr (Config::kTwoWeights) {
      // In pairs, so that the compiler knows which weights are whose.
      constexpr C<Rounding::kBeside> kBeside{};
#pragma unroll 1
      while (block > first_plain) {
        plain_step(rP, rNext, kBeside);
        plain_step(rNext, rP, kBeside);
      }
      if (block == first_plain) plain_step(rP, rP, C<Rounding::kAfter>{});
    } else {
      constexpr C<Config::kRoundsFromMiddle ? Rounding::kFromMiddle : Rounding::kAfter> kWhen{};
#pragma unroll 1
      while (block >= first_plain) plain_step(rP, rP, kWhen);
    }
  }
  if constexpr (Config::kStagesO > 0) tma_store_wait<0>();  // by every thread, since any may have stored
  write_uncovered_rows<Config>(arguments);
}

}  // namespace fa3
