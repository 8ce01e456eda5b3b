// Every compile-time decision of the backward kernel on one screen.
#pragma once

#include "backward/backward.h"
#include "forward/config.cuh"

namespace fa3 {

constexpr TileShape backward_tile(int head_dim, bool long_blocks) {
  const int queries = head_dim <= 64 ? 128 : long_blocks ? 80 : 64;
  return {queries, keys_of_tile(head_dim)};
}

// Whether two warpgroups, which share the columns of dQ, have 64 each, and so compute dQ^T, of any number of queries.
constexpr bool transposes_dq(int head_dim) { return head_dim == 128; }

// How operands of products lie in shared memory: as panels of kPanel columns.
template <class Element>
struct OperandLayouts {
  // Panels of 32 columns where 64 would not divide what there is.
  static constexpr int panel_of(int columns) { return columns % 64 == 0 ? 64 : 32; }
  template <int kPanel>
  using RowMajorAtom =
      std::conditional_t<kPanel == 64, GMMA::Layout_K_SW128_Atom<Element>, GMMA::Layout_K_SW64_Atom<Element>>;
  template <int kPanel>
  using ColumnMajorAtom =
      std::conditional_t<kPanel == 64, GMMA::Layout_MN_SW128_Atom<Element>, GMMA::Layout_MN_SW64_Atom<Element>>;
  // Rows of a tensor as an operand that is contracted over columns, and the same memory, transposed, as one that is
  // contracted over rows.
  template <int kRows, int kColumns, int kPanel>
  using Rows = decltype(tile_to_shape(RowMajorAtom<kPanel>{}, Shape<Int<kRows>, Int<kColumns>>{}));
  template <int kRows, int kColumns, int kPanel>
  using Transposed =
      decltype(tile_to_shape(ColumnMajorAtom<kPanel>{}, Shape<Int<kColumns>, Int<kRows>>{}, Step<_2, _1>{}));
};

// Of how many queries blocks are: more than usual (takes_long_blocks), in tiles that never take turns (turns.cuh), or always. A
// product of 64 rows with 64 others reads shared memory all of its time, and one with 80 nine tenths of it.
enum class QueryBlocks { kUsual, kLong, kLongInTurns };

// A tile is kKeys keys of a KV head; it meets blocks of kQueries queries.
template <DType kDType_, int kHeadDim_, int kHeadDimV_, QueryBlocks kBlocks = QueryBlocks::kUsual>
struct BackwardConfig {
  static constexpr DType kDType = kDType_;
  using Element = typename MatrixElement<kDType>::type;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr bool kLongBlocks = kBlocks != QueryBlocks::kUsual;
  static constexpr TileShape kTile = backward_tile(kHeadDim, kLongBlocks);
  static constexpr int kQueries = kTile.queries;
  static constexpr int kKeys = kTile.keys;
  static constexpr int kConsumers = 2;
  // Each consumer warpgroup has 64 keys of its own, and both add up dQ (consumer.cuh); or, where one's registers would not
  // hold dK and dV of 64 keys, both share them, one has dV, the other dK (paired_consumers.cuh), and dQ has a kernel of its own.
  static constexpr bool kSharesKeys = kKeys == 64;
  static_assert(kQueries % (kLongBlocks ? 16 : 64) == 0 && kKeys == (kSharesKeys ? 64 : 64 * kConsumers));
  static_assert(!kSharesKeys || kQueries == 64);
  static_assert(kSharesKeys == separates_dq(kHeadDim));

  static constexpr int kBytesK = kKeys * kHeadDim * sizeof(Element);
  static constexpr int kBytesV = kKeys * kHeadDimV * sizeof(Element);
  static constexpr int kBytesQ = kQueries * kHeadDim * sizeof(Element);
  static constexpr int kBytesDO = kQueries * kHeadDimV * sizeof(Element);
  // Of Q and dO; and of dS, of which one is written while the other warpgroup still reads the one before; or of P.
  static constexpr int kStages = 2;
  static constexpr int kElementsDS = kSharesKeys ? 8 : kQueries * kKeys;
  static constexpr int kElementsP = kSharesKeys ? kQueries * kKeys : 8;
  static constexpr int kBytesSteps = kStages * (kBytesQ + kBytesDO + kQueries * kKeys * sizeof(Element));
  static constexpr int kBytesShared = 225 * 1024;  // without barriers and other small things
  // Whether each warpgroup has a turn of its own; else the first one's begins that of both, and the second one's ends it, half a
  // step later. Of shorter blocks the thread that adds would not keep up with twice as many.
  static constexpr bool kTurnsOfWarpgroups = kBlocks == QueryBlocks::kLongInTurns;
  // A counter of turns: its place among all, or, where registers allow, its address.
  using TurnCounter = std::conditional_t<kTurnsOfWarpgroups, uint32_t, int32_t*>;
  static constexpr TurnCounter kNoTurn = kTurnsOfWarpgroups ? TurnCounter(-1) : TurnCounter{};
  static constexpr bool kTransposesDQ = transposes_dq(kHeadDim);
  static_assert(kTransposesDQ || !kLongBlocks);
  // dQ leaves through shared memory, by bulk additions, in panels of 32 columns.
  static constexpr int kColumnsPanelDQ = 32;
  static constexpr int kRowsPanelDQ = kTransposesDQ ? kQueries : 64;
  static constexpr int kElementsPanelDQ = kRowsPanelDQ * kColumnsPanelDQ;
  static constexpr int kElementsDQ = kSharesKeys ? 4 : kQueries * kHeadDim;
  // The next tile's keys and values arrive under this tile's last blocks where there is room, else while its gradients are
  // written. A tile's values are done with earlier than its keys.
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

  static_assert(kSharesKeys ? kStagesK == kStagesV : kStagesK == (kLongBlocks ? 1 : 2));

  // What a step needs comes at once, or, where one warpgroup begins with Q and the other with dO, as Q with lse and dO
  // with delta.
  static constexpr int kLoads = kSharesKeys ? 2 : 1;
  // Whether P is rounded, and multiplied, before dP is there; where registers are short, both wait for dP.
  static constexpr bool kEarlyWeights = kQueries < 128 && kHeadDim >= 96;
  // Of the kQueries / 16 products of a warpgroup that dV is the sum of, those that run under the exponentials of the others'
  // weights (benchmarks/LOG.md, backward, 62).
  static constexpr int kFirstProducts = kLongBlocks ? 3 : 0;
  static_assert(kFirstProducts == 0 || kEarlyWeights);
  // Whether dS is computed from P as it is rounded, since registers do not hold both.
  static constexpr bool kRoundsWeights = kLongBlocks;
  // Of a thread's kQueries / 8 pairs of lse and of delta, those that are read before what they go with is waited for. With more of
  // them registers run out (benchmarks/LOG.md, backward, 55 and 58).
  static constexpr int kEarlyLse = !kEarlyWeights ? 1 : kLongBlocks ? 2 : kTransposesDQ ? 4 : 8;
  static constexpr int kEarlyDeltas = !kEarlyWeights ? 1 : kLongBlocks ? 8 : 4;
  // Whether products are issued before what the step has stored of dS is fenced, which none of them reads.
  static constexpr bool kFencesLate = kLongBlocks;

  // Shared memory holds a tile as panels of kPanel columns, which is what one bulk load brings and one swizzle spans.
  using Operand = OperandLayouts<Element>;
  static constexpr int kPanel = Operand::panel_of(kHeadDim);
  static constexpr int kPanelV = Operand::panel_of(kHeadDimV);
  using LayoutK = typename Operand::template Rows<kKeys, kHeadDim, kPanel>;
  using LayoutV = typename Operand::template Rows<kKeys, kHeadDimV, kPanelV>;
  using LayoutQ = typename Operand::template Rows<kQueries, kHeadDim, kPanel>;
  using LayoutDO = typename Operand::template Rows<kQueries, kHeadDimV, kPanelV>;
  // (queries, keys), of which a query's keys are neighbours where dQ^T is computed, else a key's queries.
  // NOTE: both are made, the second one of a number of queries that it can have.
  using LayoutDS = std::conditional_t<kTransposesDQ, typename Operand::template Rows<kQueries, kKeys, 64>,
                                      typename Operand::template Transposed<kKeys, kTransposesDQ ? 64 : kQueries, 64>>;

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
  using LayoutQt = typename Operand::template Transposed<kQueries, kHeadDim, kPanel>;
  using LayoutDOt = typename Operand::template Transposed<kQueries, kHeadDimV, kPanelV>;
  // Where it is added up here, dQ = dS K, or dQ^T = K^T dS^T: warpgroups have 64 queries each, or, where there are fewer than two
  // times 64, half of the columns, in whole panels: if these are odd in number, both compute the one in the middle.
  static constexpr bool kSplitsColumns = kQueries < 128;
  static constexpr int kColumnsDQ = !kSplitsColumns ? kHeadDim : (kHeadDim / 2 + kPanel - 1) / kPanel * kPanel;
  using LayoutKt = typename Operand::template Transposed<kKeys, kColumnsDQ, kPanel>;
  using ShapeDQ = std::conditional_t<kTransposesDQ, Shape<Int<kColumnsDQ>, Int<kQueries>>,
                                     Shape<Int<kQueries>, Int<kColumnsDQ>>>;
  using MmaDQ = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, decltype(append(ShapeDQ{}, Int<kKeys>{})), GMMA::Major::MN,
                           kTransposesDQ ? GMMA::Major::K : GMMA::Major::MN>(),
      std::conditional_t<kSplitsColumns, Alone, Layout<Shape<Int<kConsumers>, _1, _1>>>{}));
};

}  // namespace fa3
