"""Context parallelism: one sequence over many ranks, exact attention among all of its tokens."""

from fa3_dist.parallel.all_to_all import all_to_all_attention
from fa3_dist.parallel.context import ContextParallel, LocalAttention, LocalBatch
from fa3_dist.parallel.exchange import RingError
from fa3_dist.parallel.plan import Choice
from fa3_dist.parallel.ring import ring_attention
from fa3_dist.parallel.schedule import Layout, Shard, contiguous, imbalance, packed, ring_schedule, work, zigzag
from fa3_dist.parallel.sharding import positions, shard, unshard

__all__ = [
    "Choice",
    "ContextParallel",
    "Layout",
    "LocalAttention",
    "LocalBatch",
    "RingError",
    "Shard",
    "all_to_all_attention",
    "contiguous",
    "imbalance",
    "packed",
    "positions",
    "ring_attention",
    "ring_schedule",
    "shard",
    "unshard",
    "work",
    "zigzag",
]
