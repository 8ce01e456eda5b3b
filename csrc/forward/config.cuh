// Every compile-time decision of the forward kernel on one screen.
#pragma once

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>

#include "params.h"

namespace fa3 {

using namespace cute;

// Rows of queries and of keys that a block works on at a time; 64 rows of queries a consumer warpgroup.
struct TileShape {
  int queries;
  int keys;
};

// Measured on an H200. A full mask has no diagonal blocks to waste, so it takes more keys at a time.
constexpr TileShape forward_tile(int head_dim, bool masked) {
  if (head_dim <= 64) return {192, 128};
  if (head_dim <= 128) return masked ? TileShape{128, 128} : TileShape{128, 160};
  return {128, 64};
}

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

template <DType kDType, int kHeadDim_, int kHeadDimV_, int kQueries_, int kKeys_>
struct ForwardConfig {
  using Element = typename MatrixElement<kDType>::type;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kQueries = kQueries_;
  static constexpr int kKeys = kKeys_;
  static constexpr int kStages = 2;  // of K and of V

  // One producer warpgroup and the consumers.
  static constexpr int kConsumers = kQueries / 64;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // NOTE: the consumers take exactly what the producer gives back; asking for more would wait for ever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static_assert(kLaunchRegisters - kProducerRegisters >= kConsumers * (kConsumerRegisters - kLaunchRegisters));

  // Shared memory holds a tile as panels of kPanel columns, which is what one bulk load brings and one swizzle spans.
  static constexpr int kPanel = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kPanelV = kHeadDimV % 64 == 0 ? 64 : 32;
  template <int kColumns>
  using RowMajorAtom = std::conditional_t<kColumns == 64, GMMA::Layout_K_SW128_Atom<Element>,
                                          GMMA::Layout_K_SW64_Atom<Element>>;
  template <int kColumns>
  using ColumnMajorAtom = std::conditional_t<kColumns == 64, GMMA::Layout_MN_SW128_Atom<Element>,
                                             GMMA::Layout_MN_SW64_Atom<Element>>;
  using LayoutQ = decltype(tile_to_shape(RowMajorAtom<kPanel>{}, Shape<Int<kQueries>, Int<kHeadDim>>{}));
  using LayoutK = decltype(tile_to_shape(RowMajorAtom<kPanel>{}, Shape<Int<kKeys>, Int<kHeadDim>>{}));
  // V seen as (head_dim, keys): the second product contracts over keys.
  using LayoutVt =
      decltype(tile_to_shape(ColumnMajorAtom<kPanelV>{}, Shape<Int<kHeadDimV>, Int<kKeys>>{}, Step<_2, _1>{}));

  using Warpgroups = Layout<Shape<Int<kConsumers>, _1, _1>>;
  using MmaQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<Int<kQueries>, Int<kKeys>, Int<kHeadDim>>>(), Warpgroups{}));
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<Int<kQueries>, Int<kHeadDimV>, Int<kKeys>>, GMMA::Major::K,
                           GMMA::Major::MN>(),
      Warpgroups{}));

  static constexpr int kBytesQ = kQueries * kHeadDim * sizeof(Element);
  static constexpr int kBytesK = kKeys * kHeadDim * sizeof(Element);
  static constexpr int kBytesV = kKeys * kHeadDimV * sizeof(Element);
};

template <DType kDType, int kHeadDim, int kHeadDimV, bool kMasked>
using ForwardConfigFor = ForwardConfig<kDType, kHeadDim, kHeadDimV, forward_tile(kHeadDim, kMasked).queries,
                                       forward_tile(kHeadDim, kMasked).keys>;

using Barrier = cutlass::arch::ClusterBarrier;
using LoadBarrier = cutlass::arch::ClusterTransactionBarrier;

// The plan of shared memory.
template <class Config>
struct alignas(1024) ForwardShared {
  alignas(1024) typename Config::Element q[Config::kQueries * Config::kHeadDim];
  alignas(1024) typename Config::Element k[Config::kStages][Config::kKeys * Config::kHeadDim];
  alignas(1024) typename Config::Element v[Config::kStages][Config::kKeys * Config::kHeadDimV];

  LoadBarrier q_full;
  Barrier q_empty;
  LoadBarrier k_full[Config::kStages];
  Barrier k_empty[Config::kStages];
  LoadBarrier v_full[Config::kStages];
  Barrier v_empty[Config::kStages];

  // Tiles on their way from the producer, which draws them, to the consumers.
  int tile[2];
  Barrier tile_full[2];
  Barrier tile_empty[2];
};


}  // namespace fa3
