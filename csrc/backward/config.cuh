// Every compile-time decision of the backward kernel on one screen.
#pragma once

#include "backward/backward.h"
#include "forward/config.cuh"

namespace fa3 {

constexpr TileShape backward_tile(int head_dim) {
#ifdef FA3_BACKWARD_TILE
  return FA3_BACKWARD_TILE;
#endif
  if (head_dim <= 64) return {128, 128};
  if (head_dim <= 128) return {64, 128};
  return {64, 64};
}

// A tile is kKeys keys of a KV head; it meets blocks of kQueries queries.
template <DType kDType_, int kHeadDim_, int kHeadDimV_>
struct BackwardConfig {
  static constexpr DType kDType = kDType_;
  using Element = typename MatrixElement<kDType>::type;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr TileShape kTile = backward_tile(kHeadDim);
  static constexpr int kQueries = kTile.queries;
  static constexpr int kKeys = kTile.keys;
  static constexpr int kConsumers = 2;
  // Each consumer warpgroup has 64 keys, whose P and dS stay in its registers; or, where one's registers would not hold
  // dK and dV of 64 keys, both share them: each has half of the scores' queries, and half of the gradients' columns, and
  // P passes through shared memory as dS does.
  static constexpr bool kSharesKeys = kKeys == 64;
  static_assert(kQueries % 64 == 0 && kKeys == (kSharesKeys ? 64 : 64 * kConsumers));
  static_assert(!kSharesKeys || kQueries == 64);
  static constexpr int kQueriesOfWarpgroup = kSharesKeys ? kQueries / kConsumers : kQueries;

  static constexpr int kBytesK = kKeys * kHeadDim * sizeof(Element);
  static constexpr int kBytesV = kKeys * kHeadDimV * sizeof(Element);
  static constexpr int kBytesQ = kQueries * kHeadDim * sizeof(Element);
  static constexpr int kBytesDO = kQueries * kHeadDimV * sizeof(Element);
  // Of Q and dO; and of dS, of which one is written while the other warpgroup still reads the one before.
  static constexpr int kStages = 2;
  static constexpr int kStagesP = kSharesKeys ? kStages : 1;
  static constexpr int kElementsDS = kQueries * kKeys;
  static constexpr int kElementsP = kSharesKeys ? kQueries * kKeys : 8;
  static constexpr int kBytesSteps =
      kStages * (kBytesQ + kBytesDO) + (kStages * kElementsDS + kStagesP * kElementsP) * sizeof(Element);
  static constexpr int kBytesShared = 225 * 1024;  // without barriers and other small things
  // dQ leaves through shared memory, by bulk additions, in panels of 64 queries and 32 columns; where there is no room, by
  // additions from registers, which take the memory pipeline longer than the products take the tensor cores.
  static constexpr int kColumnsPanelDQ = 32;
  static constexpr int kElementsPanelDQ = 64 * kColumnsPanelDQ;
  static constexpr bool kBulkDQ = kBytesSteps + kBytesK + kBytesV + kQueries * kHeadDim * 4 <= kBytesShared;
  static constexpr int kElementsDQ = kBulkDQ ? kQueries * kHeadDim : 4;
  // The next tile's keys and values arrive under this tile's last blocks where there is room. A tile's values are done
  // with earlier than its keys.
  static constexpr int kBytesLeft = kBytesShared - kBytesSteps - kElementsDQ * 4 - kBytesK - kBytesV;
  static constexpr int kStagesK = kBytesLeft >= kBytesK ? 2 : 1;
  static constexpr int kStagesV = kBytesLeft >= kBytesK + kBytesV ? 2 : 1;

  // One producer warpgroup and the consumers.
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // NOTE: the consumers take exactly what the producer gives back; asking for more would wait for ever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static_assert(kLaunchRegisters - kProducerRegisters >= kConsumers * (kConsumerRegisters - kLaunchRegisters));

  // Whether dQ lags a step behind (lagging.cuh). Other head dims are to follow as they are measured.
  static constexpr bool kLagsDQ = true;
  static_assert(kSharesKeys || (kBulkDQ && kStagesK == 2));

  // Whether tiles can take turns at dQ (turns.cuh); and whether they then walk as is best for that.
  static constexpr bool kTakesTurns = kBulkDQ;
  static constexpr bool kWalksBackwards = !kSharesKeys;
  static_assert(kTakesTurns == takes_turns(kHeadDim));

  // Whether the scores of a step are under way while dQ of the step before is; for head_dim 256 registers are short.
  static constexpr bool kEarlyScores = kHeadDim <= 192;
  // Whether P is rounded, and multiplied, before dP is there; where registers are short, both wait for dP.
  static constexpr bool kEarlyWeights = kQueries == 64 && kHeadDim >= 96;

  // Shared memory holds a tile as panels of kPanel columns, which is what one bulk load brings and one swizzle spans.
  // Panels of 32 columns where 64 would not divide what a warpgroup takes of them.
  static constexpr int panel_of(int columns) { return (kSharesKeys ? columns / 2 : columns) % 64 == 0 ? 64 : 32; }
  static constexpr int kPanel = panel_of(kHeadDim);
  static constexpr int kPanelV = panel_of(kHeadDimV);
  template <int kColumns>
  using RowMajorAtom = std::conditional_t<kColumns == 64, GMMA::Layout_K_SW128_Atom<Element>,
                                          GMMA::Layout_K_SW64_Atom<Element>>;
  template <int kColumns>
  using ColumnMajorAtom = std::conditional_t<kColumns == 64, GMMA::Layout_MN_SW128_Atom<Element>,
                                             GMMA::Layout_MN_SW64_Atom<Element>>;
  // Rows of a tensor as an operand that is contracted over columns, and the same memory, transposed, as one that is
  // contracted over rows.
  template <int kRows, int kColumns, int kPanelColumns>
  using Rows = decltype(tile_to_shape(RowMajorAtom<kPanelColumns>{}, Shape<Int<kRows>, Int<kColumns>>{}));
  template <int kRows, int kColumns, int kPanelColumns>
  using Transposed =
      decltype(tile_to_shape(ColumnMajorAtom<kPanelColumns>{}, Shape<Int<kColumns>, Int<kRows>>{}, Step<_2, _1>{}));
  using LayoutK = Rows<kKeys, kHeadDim, kPanel>;
  using LayoutV = Rows<kKeys, kHeadDimV, kPanelV>;
  using LayoutQ = Rows<kQueries, kHeadDim, kPanel>;
  using LayoutDO = Rows<kQueries, kHeadDimV, kPanelV>;
  using LayoutP = Rows<kKeys, kQueries, 64>;
  using LayoutDS = Transposed<kKeys, kQueries, 64>;  // (queries, keys), of which a key's queries are neighbours

  // S^T = K Q^T and dP^T = V dO^T: transposed, so that P^T and dS^T come out as dV and dK need them.
  using ByKeys = Layout<Shape<Int<kConsumers>, _1, _1>>;
  using ByQueries = Layout<Shape<_1, Int<kConsumers>, _1>>;
  using Alone = Layout<Shape<_1, _1, _1>>;
  using MmaS = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<Int<kKeys>, Int<kQueriesOfWarpgroup>, Int<kHeadDim>>>(),
      std::conditional_t<kSharesKeys, ByQueries, ByKeys>{}));
  // dV += P^T dO, dK += dS^T Q. Weights come from registers, or, where keys are shared, from shared memory.
  static constexpr int kColumnsDK = kSharesKeys ? kHeadDim / kConsumers : kHeadDim;  // of a warpgroup
  static constexpr int kColumnsDV = kSharesKeys ? kHeadDimV / kConsumers : kHeadDimV;
  template <int kColumns, bool kFromRegisters>
  static constexpr auto mma_gradient() {
    using Tile = Shape<Int<kKeys>, Int<kColumns>, Int<kQueries>>;
    using Warpgroups = std::conditional_t<kSharesKeys, Alone, ByKeys>;
    if constexpr (kFromRegisters) {
      return make_tiled_mma(GMMA::rs_op_selector<Element, Element, float, Tile, GMMA::Major::K, GMMA::Major::MN>(),
                            Warpgroups{});
    } else {
      return make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Tile, GMMA::Major::K, GMMA::Major::MN>(),
                            Warpgroups{});
    }
  }
  using MmaDK = decltype(mma_gradient<kColumnsDK, !kSharesKeys>());
  using MmaDV = decltype(mma_gradient<kColumnsDV, !kSharesKeys>());
  using LayoutQt = Transposed<kQueries, kColumnsDK, kPanel>;
  using LayoutDOt = Transposed<kQueries, kColumnsDV, kPanelV>;
  // dQ = dS K: warpgroups have 64 queries each, or, where there are no more, half of the columns, in whole panels: if these
  // are odd in number, both compute the one in the middle.
  static constexpr bool kSplitsColumns = kQueries == 64;
  static constexpr int kColumnsDQ = !kSplitsColumns ? kHeadDim : (kHeadDim / 2 + kPanel - 1) / kPanel * kPanel;
  static constexpr int kPartsDQ = kSharesKeys && !kBulkDQ ? 2 : 1;
  static constexpr int kColumnsPartDQ = kColumnsDQ / kPartsDQ;
  using LayoutKt = Transposed<kKeys, kColumnsPartDQ, kPanel>;
  using MmaDQ = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<Int<kQueries>, Int<kColumnsPartDQ>, Int<kKeys>>, GMMA::Major::MN,
                           GMMA::Major::MN>(),
      std::conditional_t<kSplitsColumns, Alone, ByKeys>{}));
};

}  // namespace fa3
