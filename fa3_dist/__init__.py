"""fa3_dist: attention for training transformers on long contexts, on Hopper GPUs, sharded over as many as it takes."""

from fa3_dist._version import __version__
from fa3_dist.interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from fa3_dist.layers import FA3Attention
from fa3_dist.parallel import ContextParallel

__all__ = [
    "ContextParallel",
    "FA3Attention",
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
]
