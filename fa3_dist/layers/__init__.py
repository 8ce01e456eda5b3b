"""Layers: attention, rotary embedding, and a transformer made of them."""

from fa3_dist.layers.attention import FA3Attention
from fa3_dist.layers.rotary import RotaryEmbedding, RotaryScaling
from fa3_dist.layers.transformer import SwiGLU, Transformer, TransformerBlock, TransformerConfig

__all__ = [
    "FA3Attention",
    "RotaryEmbedding",
    "RotaryScaling",
    "SwiGLU",
    "Transformer",
    "TransformerBlock",
    "TransformerConfig",
]
