// Every compile-time decision of the forward kernel on one screen.
#pragma once

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>

#include "forward/forward.h"
#include "forward/schedule.h"
#include "params.h"

namespace fa3 {

using namespace cute;

// Chosen by timing candidates on an H200: benchmarks/LOG.md, 14, 19, 46, 54 and 62. benchmarks/tune.py times others.
constexpr TileShape forward_tile(int head_dim, int head_dim_v, Sequences sequences) {
#ifdef FA3_FORWARD_TILE
  return FA3_FORWARD_TILE;
#endif
  const bool is_short = sequences == Sequences::kShort;
  if (head_dim <= 64) return is_short ? TileShape{128, 64} : TileShape{192, 128};
  if (sequences == Sequences::kNarrow) return {192, 64};
  if (head_dim <= 128 || head_dim_v <= 128) return {128, 128};
  if (head_dim <= 192) return {128, 112};
  return {128, is_short ? 64 : 80};
}

// Which kernels there are for kNarrow.
constexpr bool distinguishes_narrow(int head_dim, int head_dim_v) {
#ifdef FA3_FORWARD_TILE
  return false;
#endif
  return head_dim == 128 && head_dim_v == 128;
}

// Teams of consumer warpgroups in a block, each on tiles of its own and with producers of its own: what one of them waits
// for, the other hides (benchmarks/LOG.md, 54).
constexpr int forward_teams(int head_dim, Sequences sequences) {
#ifdef FA3_FORWARD_TILE
  return 1;
#endif
  return head_dim <= 64 && sequences == Sequences::kShort ? 2 : 1;
}

// Whether the warpgroups of a team take turns on the tensor cores: benchmarks/LOG.md, 41.
constexpr bool takes_turns(int head_dim, Sequences sequences) {
#ifdef FA3_FORWARD_TURNS  // by the ablation of benchmarks/tune.py
  return FA3_FORWARD_TURNS;
#endif
  return head_dim != 128 || sequences == Sequences::kShort;
}

// Whether softmax runs under the product of the block before. The ablation says what that is worth.
#ifndef FA3_FORWARD_OVERLAP
#define FA3_FORWARD_OVERLAP true
#endif

template <DType>
struct MatrixElement;
template <>
struct MatrixElement<DType::bf16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct MatrixElement<DType::fp16> {
  using type = cutlass::half_t;
};

template <DType kDType_, int kHeadDim_, int kHeadDimV_, Sequences kSequences>
struct ForwardConfig {
  static constexpr DType kDType = kDType_;
  using Element = typename MatrixElement<kDType>::type;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr TileShape kTile = forward_tile(kHeadDim, kHeadDimV, kSequences);
  static constexpr int kQueries = kTile.queries;
  static constexpr int kKeys = kTile.keys;

  static constexpr int kTeams = forward_teams(kHeadDim, kSequences);
  static constexpr bool kIsNarrow = kSequences == Sequences::kNarrow;

  static constexpr int kBytesQ = kQueries * kHeadDim * sizeof(Element);
  static constexpr int kBytesK = kKeys * kHeadDim * sizeof(Element);
  static constexpr int kBytesV = kKeys * kHeadDimV * sizeof(Element);
  static constexpr int kStages = kIsNarrow ? 4 : kTeams > 1 ? 3 : kKeys * kHeadDim <= 64 * 64 ? 4 : 2;  // of K and of V
  static constexpr bool kCounts = kHeadDim == 256 || kTeams > 1;  // rings' positions (Ring): measured, benchmarks/LOG.md, 92
  // Shared memory for the operands and results of a team.
  static constexpr int kRoom = (kTeams > 1 ? 108 : kQueries == 64 ? 112 : 224) * 1024;
  // The next tile's queries arrive under this tile's last blocks where there is room and no other team to hide the wait;
  // narrow sequences need the room for the output.
  static constexpr int kStagesQ =
      kTeams == 1 && !kIsNarrow && 2 * kBytesQ + kStages * (kBytesK + kBytesV) <= kRoom ? 2 : 1;

  // Where the next tile's queries are there in time, its first scores are computed beside this tile's last output.
  static constexpr bool kTilesOverlap = kStagesQ == 2;

  // Whether a consumer warpgroup leaves out the first and the last blocks of a tile if its own rows see none of their keys.
  // It costs more than it gains where a block has as many keys as a tile has queries; head_dim 192 has not been timed.
  static constexpr bool kSkipsBlocks =
      !kTilesOverlap && kKeys < kQueries && (kHeadDim == 256 || kTeams > 1 || kIsNarrow);
  static_assert(!kSkipsBlocks || (kQueries - 64) / kKeys + 1 <= kStages);  // keys that are given back before any values

  // Whether a block of threads may walk along the tiles of a unit, from the last queries to the first, and bring every block of
  // keys once: each warpgroup passes from tile to tile at its own place in their stream (can_walk).
  static constexpr bool kWalks = kIsNarrow && kSkipsBlocks && kKeys == 64;
  static_assert(!kWalks || kQueries / kKeys <= kStages);

  // Whether Q, K and V have a loading thread each: a team of several has only one.
  static constexpr bool kLoadsApart = kTeams == 1;

  // One producer warpgroup and the consumers.
  static constexpr int kConsumers = kQueries / 64;  // of a team
  static constexpr int kAllConsumers = kTeams * kConsumers;
  static constexpr int kThreads = 128 * (kAllConsumers + 1);
  // Blocks of a single consumer come in pairs, which hide each other's pauses.
  static constexpr int kBlocksPerProcessor = kAllConsumers == 1 ? 2 : 1;
  // NOTE: the consumers take exactly what the producer gives back; asking for more would wait for ever.
  static constexpr int kLaunchRegisters = 65536 / (kThreads * kBlocksPerProcessor) / 8 * 8;
  static constexpr int kProducerRegisters = kAllConsumers >= 3 ? 32 : kAllConsumers == 1 || kHeadDim > 128 ? 24 : 40;
  static constexpr int kConsumerRegisters = kAllConsumers == 4 ? 112 : kAllConsumers == 3 ? 160 : kHeadDim > 128 ? 240 : 232;
  static_assert(kLaunchRegisters - kProducerRegisters >= kAllConsumers * (kConsumerRegisters - kLaunchRegisters));

  static constexpr bool kTakesTurns = kTeams == 1 && kConsumers > 1 && takes_turns(kHeadDim, kSequences);
  static constexpr bool kOverlapsSoftmax = FA3_FORWARD_OVERLAP;

  // Whether what a tile's sums make of its output is computed before that is there, where registers suffice (benchmarks/LOG.md,
  // 85).
  static constexpr bool kClosesEarly = !kTilesOverlap || kConsumerRegisters > 160;

  // Registers of a consumer's output, scores and weights. Two copies of the weights let a block's be rounded while the
  // product before still reads the other's; where that does not fit, rounding waits for the product. Of short sequences the
  // first tiles count, whose code comes from memory: the steps for two copies are three times as much code.
  static constexpr int kTileRegisters = kHeadDimV / 2 + kKeys / 2 + kKeys / 4;
  static constexpr bool kTwoWeights = kTileRegisters + kKeys / 4 + 40 <= kConsumerRegisters && kHeadDim <= 128 &&
                                      kSequences != Sequences::kShort;

  // With one copy, rounding may begin in the middle of a block's exponentials: by then a product of a small head_dim is done.
  static constexpr bool kRoundsFromMiddle = !kTwoWeights && kOverlapsSoftmax && kHeadDimV <= 64;

  // Shared memory holds a tile as panels of kPanel columns, which is what one bulk load brings and one swizzle spans.
  static constexpr int kPanel = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kPanelV = kHeadDimV % 64 == 0 ? 64 : 32;

  // A tile's output leaves through shared memory of its own where there is room for it, or for half of it: the other half
  // follows under the next tile's first scores.
  static constexpr int kPanelsO = kHeadDimV / kPanelV;
  static constexpr int kBytesPanelO = kQueries * kPanelV * sizeof(Element);
  static constexpr int kFreeBytes = kRoom - kStagesQ * kBytesQ - kStages * (kBytesK + kBytesV);
  static constexpr int kStagesO = kPanelsO * kBytesPanelO <= kFreeBytes ? kPanelsO
                                  : kPanelsO % 4 == 0 && kPanelsO / 2 * kBytesPanelO <= kFreeBytes ? kPanelsO / 2 : 0;
  static constexpr bool kHalvesOutput = kStagesO > 0 && kStagesO < kPanelsO;

  // Pairs of a row's running state that a thread asks for together: used one by one, they would be waited for one by one. But the
  // registers for many have to come from somewhere, and then every tile gives and takes some back (85).
  static constexpr int kPairsTogether = kConsumerRegisters > 160 && kHeadDimV <= 128 ? kHeadDimV / 8 : 4;

  template <int kColumns>
  using RowMajorAtom = std::conditional_t<kColumns == 64, GMMA::Layout_K_SW128_Atom<Element>,
                                          GMMA::Layout_K_SW64_Atom<Element>>;
  template <int kColumns>
  using ColumnMajorAtom = std::conditional_t<kColumns == 64, GMMA::Layout_MN_SW128_Atom<Element>,
                                             GMMA::Layout_MN_SW64_Atom<Element>>;
  // NOTE: Q with a stride from stage to stage even if there is one, for Ring::uniform_stage to be part of the descriptors.
  using LayoutQ = decltype(tile_to_shape(RowMajorAtom<kPanel>{}, Shape<Int<kQueries>, Int<kHeadDim>, _2>{}));
  using LayoutK = decltype(tile_to_shape(RowMajorAtom<kPanel>{}, Shape<Int<kKeys>, Int<kHeadDim>, Int<kStages>>{}));
  // V seen as (head_dim, keys): the second product contracts over keys.
  using LayoutVt = decltype(tile_to_shape(ColumnMajorAtom<kPanelV>{},
                                          Shape<Int<kHeadDimV>, Int<kKeys>, Int<kStages>>{}, Step<_2, _1, _3>{}));

  using Warpgroups = Layout<Shape<Int<kConsumers>, _1, _1>>;
  using MmaQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<Int<kQueries>, Int<kKeys>, Int<kHeadDim>>>(), Warpgroups{}));
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<Int<kQueries>, Int<kHeadDimV>, Int<kKeys>>, GMMA::Major::K,
                           GMMA::Major::MN>(),
      Warpgroups{}));
};

using Barrier = cutlass::arch::ClusterBarrier;
using LoadBarrier = cutlass::arch::ClusterTransactionBarrier;

}  // namespace fa3
