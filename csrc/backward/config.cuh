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
  // Each consumer warpgroup has 64 keys of its own (consumer.cuh); or, where one's registers would not hold dK and dV of
  // 64 keys, both share them, and one has dV, the other dK (paired_consumers.cuh).
  static constexpr bool kSharesKeys = kKeys == 64;
  static_assert(kQueries % 64 == 0 && kKeys == (kSharesKeys ? 64 : 64 * kConsumers));
  static_assert(!kSharesKeys || kQueries == 64);

  static constexpr int kBytesK = kKeys * kHeadDim * sizeof(Element);
  static constexpr int kBytesV = kKeys * kHeadDimV * sizeof(Element);
  static constexpr int kBytesQ = kQueries * kHeadDim * sizeof(Element);
  static constexpr int kBytesDO = kQueries * kHeadDimV * sizeof(Element);
  // Of Q and dO; and of dS, of which one is written while the other warpgroup still reads the one before.
  static constexpr int kStages = 2;
  static constexpr int kElementsDS = kQueries * kKeys;
  static constexpr int kElementsP = kSharesKeys ? kQueries * kKeys : 8;
  static constexpr int kBytesSteps =
      kStages * (kBytesQ + kBytesDO + (kElementsDS + (kSharesKeys ? kElementsP : 0)) * sizeof(Element));
  static constexpr int kBytesShared = 225 * 1024;  // without barriers and other small things
  // dQ leaves through shared memory, by bulk additions, in panels of 64 queries and 32 columns; where there is no room, by
  // additions from registers.
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

  static_assert(kSharesKeys || (kBulkDQ && kStagesK == 2));

  // Whether tiles can take turns at dQ (turns.cuh); and whether they then walk as is best for that.
  static constexpr bool kTakesTurns = kBulkDQ;
  static constexpr bool kWalksBackwards = !kSharesKeys;
  static_assert(kTakesTurns == takes_turns(kHeadDim));

  // What a step needs comes at once, or, where one warpgroup begins with Q and the other with dO, as Q with lse and dO
  // with delta.
  static constexpr int kLoads = kSharesKeys ? 2 : 1;
  // Whether P is rounded, and multiplied, before dP is there; where registers are short, both wait for dP.
  static constexpr bool kEarlyWeights = kQueries == 64 && kHeadDim >= 96;

  // Shared memory holds a tile as panels of kPanel columns, which is what one bulk load brings and one swizzle spans.
  // Panels of 32 columns where 64 would not divide what a warpgroup takes of them.
  static constexpr int panel_of(int columns) { return columns % 64 == 0 ? 64 : 32; }
  static constexpr int kPanel = panel_of(kSharesKeys ? kHeadDim / 2 : kHeadDim);
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
  using LayoutDS = Transposed<kKeys, kQueries, 64>;  // (queries, keys), of which a key's queries are neighbours

  // S^T = K Q^T and dP^T = V dO^T: transposed, so that P^T and dS^T come out in the registers that dV += P^T dO and
  // dK += dS^T Q read them from.
  using Alone = Layout<Shape<_1, _1, _1>>;
  using ByKeys = std::conditional_t<kSharesKeys, Alone, Layout<Shape<Int<kConsumers>, _1, _1>>>;
  using MmaS = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<Int<kKeys>, Int<kQueries>, Int<kHeadDim>>>(), ByKeys{}));
  template <int kColumns>
  using MmaGradient = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<Int<kKeys>, Int<kColumns>, Int<kQueries>>, GMMA::Major::K,
                           GMMA::Major::MN>(),
      ByKeys{}));
  using MmaDK = MmaGradient<kHeadDim>;
  using MmaDV = MmaGradient<kHeadDimV>;
  using LayoutQt = Transposed<kQueries, kHeadDim, kPanel>;
  using LayoutDOt = Transposed<kQueries, kHeadDimV, kPanelV>;
  // dQ = dS K: warpgroups have 64 queries each, or, where there are no more, half of the columns, in whole panels: if these
  // are odd in number, both compute the one in the middle.
  static constexpr bool kSplitsColumns = kQueries == 64;
  static constexpr int kColumnsDQ = !kSplitsColumns ? kHeadDim : (kHeadDim / 2 + kPanel - 1) / kPanel * kPanel;
  using LayoutKt = Transposed<kKeys, kColumnsDQ, kPanel>;
  using MmaDQ = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<Int<kQueries>, Int<kColumnsDQ>, Int<kKeys>>, GMMA::Major::MN,
                           GMMA::Major::MN>(),
      std::conditional_t<kSplitsColumns, Alone, Layout<Shape<Int<kConsumers>, _1, _1>>>{}));
};

}  // namespace fa3
