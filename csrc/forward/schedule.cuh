// Which tile comes when, and which keys it visits.
#pragma once

#include "forward/config.cuh"

namespace fa3 {

// What the kernel gets: the parameters, and what the host derives from them.
struct ForwardArguments {
  CUtensorMap q;  // (head_dim, seqlen, heads, batch), loaded in boxes of a panel
  CUtensorMap k;
  CUtensorMap v;
  ForwardParams params;
  int tiles_per_head;
  int heads_per_group;  // heads that are walked together, so that their K and V stay in the L2 cache
};

struct Tile {
  int first_query;
  int head;
  int batch;
};

// Tiles in the order in which they are drawn: group of heads after group of heads; inside a group the tiles with the
// most keys first, and the heads side by side.
template <class Config>
__device__ __forceinline__ Tile tile_at(const ForwardArguments& arguments, int index) {
  const int heads = arguments.params.heads;
  const int group_size = arguments.heads_per_group;
  const int group = index / (group_size * arguments.tiles_per_head);
  const int in_group = index - group * group_size * arguments.tiles_per_head;
  const int heads_here = min(group_size, heads * arguments.params.batch - group * group_size);
  const int rank = in_group / heads_here;
  const int head = group * group_size + in_group - rank * heads_here;
  return {(arguments.tiles_per_head - 1 - rank) * Config::kQueries, head % heads, head / heads};
}

// Blocks of keys [first, end) that a tile visits, and the part [first_plain, end_plain) of them that needs no mask.
struct KeyBlocks {
  int first;
  int end;
  int first_plain;
  int end_plain;

  __device__ bool plain(int block) const { return block >= first_plain && block < end_plain; }
};

template <class Config>
__device__ __forceinline__ KeyBlocks visible_blocks(const ForwardParams& params, int first_query) {
  constexpr int kKeys = Config::kKeys;
  const int last_query = min(first_query + Config::kQueries, params.seqlen_q) - 1;
  const int first_key = max(0, first_query + params.first_diagonal);
  const int end_key = min(params.seqlen_k, last_query + params.last_diagonal + 1);
  if (first_key >= end_key) return {0, 0, 0, 0};
  // Plain: between what the last query's left edge hides and what the first query does not see yet.
  const int first_common = max(0, last_query + params.first_diagonal);
  const int end_common = min(params.seqlen_k, first_query + params.last_diagonal + 1);
  return {first_key / kKeys, (end_key + kKeys - 1) / kKeys, (first_common + kKeys - 1) / kKeys,
          max(0, end_common) / kKeys};
}

// Position in a ring of stages, with the parity its barriers are waited for with.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace fa3
