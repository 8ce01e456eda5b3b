"""Rotary embedding against complex fp64 arithmetic, against transformers' implementations, and at far positions."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from fa3_dist.layers import RotaryEmbedding, RotaryScaling


def frequencies(rotary: RotaryEmbedding) -> torch.Tensor:
    return torch.tensor(rotary.scaling.frequencies(rotary.rotary_dim, rotary.base), dtype=torch.float64)


def rotate_complex(x: torch.Tensor, positions: torch.Tensor, base: float, interleaved: bool) -> torch.Tensor:
    """The definition: pair i of features is a complex number, multiplied by exp(1j * position * base ** (-2 i / d))."""
    dim = x.shape[-1]
    angle = positions.double()[..., None] * base ** (-2.0 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None]
    x = x.double()
    if interleaved:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
    turned = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_matches_complex_arithmetic(interleaved, dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(2, 33, 3, 16, dtype=dtype)
    positions = torch.randint(0, 5000, (2, 33))
    out = RotaryEmbedding(16, base=500.0, interleaved=interleaved)(x, positions)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), rotate_complex(x, positions, 500.0, interleaved), atol=tolerance, rtol=0)


@pytest.mark.parametrize("position", [2**20 + 12345, 10_000_019, 2**31 - 5, -7])
def test_exact_at_far_positions(position):
    rotary = RotaryEmbedding(128, base=1e6)
    cos, sin = rotary.table(torch.tensor([[position]]))
    # exact reduction: Python integers, then one division
    exact = [math.fmod(position * round(f * 2**70) / 2**70, 2 * math.pi) for f in frequencies(rotary).tolist()]
    assert max(abs(c - math.cos(a)) for c, a in zip(cos.flatten().tolist(), exact, strict=True)) < 1e-6
    assert max(abs(s - math.sin(a)) for s, a in zip(sin.flatten().tolist(), exact, strict=True)) < 1e-6


def test_scores_depend_on_distance_only_even_far_out():
    torch.manual_seed(0)
    rotary = RotaryEmbedding(64)
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    scores = [
        (rotary(q, torch.tensor([[p + 100]])) * rotary(k, torch.tensor([[p]]))).sum() for p in (0, 2**20, 2**30 + 1)
    ]
    torch.testing.assert_close(scores[1], scores[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(scores[2], scores[0], atol=2e-5, rtol=0)


def test_packed_documents_and_shards_are_positions():
    torch.manual_seed(0)
    rotary = RotaryEmbedding(8)
    x = torch.randn(1, 8, 2, 8)
    whole = rotary(x, torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    torch.testing.assert_close(whole[:, 4:], rotary(x[:, 4:], torch.arange(4)[None]), atol=0, rtol=0)
    shard = [0, 3, 4, 7]  # what rank 0 of 2 holds of two documents of 4 tokens
    torch.testing.assert_close(rotary(x[:, shard], torch.tensor([[0, 3, 0, 3]])), whole[:, shard], atol=0, rtol=0)
    assert not torch.allclose(rotary(x[:, shard], torch.arange(4)[None]), whole[:, shard], atol=0.1)


def test_partial_rotation_leaves_the_rest():
    torch.manual_seed(0)
    x, positions = torch.randn(1, 5, 2, 24), torch.arange(5)[None]
    out = RotaryEmbedding(24, rotary_dim=8)(x, positions)
    assert torch.equal(out[..., 8:], x[..., 8:])
    torch.testing.assert_close(out[..., :8], RotaryEmbedding(8)(x[..., :8], positions), atol=0, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient(interleaved):
    rotary = RotaryEmbedding(8, interleaved=interleaved, scaling=RotaryScaling("yarn", 4.0, 16), rotary_dim=4)
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotary(x, torch.tensor([[5, 0, 9]])), (x,))


def test_autocast_computes_angles_in_fp32():
    x, positions = torch.randn(1, 4, 1, 32), torch.tensor([[0, 1, 1000, 2**20]])
    rotary = RotaryEmbedding(32)
    with torch.autocast("cpu", torch.bfloat16):
        out = rotary(x, positions)
    assert out.dtype == torch.float32
    assert torch.equal(out, rotary(x, positions))


def test_compiles_into_one_graph_with_dynamic_length():
    rotary = RotaryEmbedding(16, interleaved=True, scaling=RotaryScaling("llama3", 8.0, 64))
    compiled = torch.compile(rotary, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (7, 12):
        x, positions = torch.randn(2, seqlen, 2, 16), torch.randint(0, 2**31, (2, seqlen))
        torch.testing.assert_close(compiled(x, positions), rotary(x, positions), atol=1e-6, rtol=0)


def test_no_state_and_survives_every_move():
    rotary = RotaryEmbedding(16)
    x, positions = torch.randn(1, 3, 1, 16), torch.tensor([[0, 17, 2**20]])
    expected = rotary(x, positions)
    assert not rotary.state_dict() and not list(rotary.parameters())
    with torch.device("meta"):
        on_meta = RotaryEmbedding(16)
    moved = {
        "cast": copy.deepcopy(rotary).bfloat16(),
        "pickled": pickle.loads(pickle.dumps(rotary)),
        "materialised": on_meta.to_empty(device="cpu"),
    }
    for name, module in moved.items():
        assert torch.equal(module(x, positions), expected), name
    size = len(pickle.dumps(rotary))
    rotary(torch.randn(1, 4096, 1, 16), torch.arange(4096)[None])
    assert len(pickle.dumps(rotary)) == size, "a table was kept"


# ---- scaling ---------------------------------------------------------------------------------------------------------

HF_ROPE = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn without truncation": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "truncate": False,
        "beta_fast": 16.0, "beta_slow": 2.0,
    },
    "yarn with mscale": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.707,
        "mscale_all_dim": 1.3,
    },
    "yarn with attention factor": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.25,
    },
}


@pytest.mark.parametrize("case", HF_ROPE)
def test_matches_transformers(case):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    rope = dict(HF_ROPE[case])
    longest = int(rope.get("factor", 1.0) * rope.get("original_max_position_embeddings", 128))
    config = llama.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=longest, rope_theta=10000.0, rope_scaling=rope,
    )
    theirs = llama.LlamaRotaryEmbedding(config)
    ours = RotaryEmbedding.from_hf_config(config.to_dict())
    torch.testing.assert_close(frequencies(ours), theirs.inv_freq.double(), atol=0, rtol=1e-6)
    assert ours.table_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)

    x, positions = torch.randn(2, 50, 3, 64), torch.randint(0, 256, (2, 50))
    cos, sin = theirs(x, positions)
    expected, _ = llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(ours(x, positions), expected, atol=1e-4, rtol=0)


def test_reads_both_generations_of_configurations():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    shape = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 131072}
    new = RotaryEmbedding.from_hf_config({**shape, "rope_parameters": {**rope, "rope_theta": 5e5}})
    old = RotaryEmbedding.from_hf_config({**shape, "rope_scaling": rope, "rope_theta": 5e5})
    assert new.base == old.base == 5e5 and new.scaling == old.scaling == RotaryScaling("llama3", 8.0, 8192)
    assert RotaryScaling.from_hf_config(rope) == new.scaling
    plain = RotaryEmbedding.from_hf_config({**shape, "rope_scaling": None, "partial_rotary_factor": 0.5})
    assert plain.scaling == RotaryScaling() and plain.rotary_dim == 16 and plain.base == 10000.0


def test_ntk_keeps_the_fastest_and_slows_the_slowest():
    plain, ntk = RotaryScaling().frequencies(32, 1e4), RotaryScaling("ntk", 4.0).frequencies(32, 1e4)
    assert ntk[0] == plain[0] == 1.0
    assert ntk[-1] == pytest.approx(plain[-1] / 4, rel=1e-12)
    assert all(a / 4 < b < a for a, b in zip(plain[1:-1], ntk[1:-1], strict=True))


@pytest.mark.parametrize("make, message", [
    (lambda: RotaryEmbedding(15), "rotary_dim is 15"),
    (lambda: RotaryEmbedding(16, rotary_dim=32), "rotary_dim is 32"),
    (lambda: RotaryEmbedding(16, base=0.5), "base is 0.5"),
    (lambda: RotaryScaling("dynamic", 2.0), "kind is 'dynamic'"),
    (lambda: RotaryScaling("linear", 0.0), "factor is 0.0"),
    (lambda: RotaryScaling("yarn", 2.0), "original_max_positions is None"),
    (lambda: RotaryScaling("llama3", 2.0, 64, low_freq_factor=4.0), "low_freq_factor is 4.0"),
    (lambda: RotaryScaling.from_hf_config({"rope_type": "dynamic", "factor": 2.0}), "rope_type is 'dynamic'"),
    (lambda: RotaryScaling.from_hf_config({"rope_parameters": {"a": {}, "b": {}}}), "differ by layer type"),
    (lambda: RotaryEmbedding(16)(torch.zeros(1, 3, 1, 16), torch.zeros(1, 2, dtype=torch.int64)), "positions have"),
    (lambda: RotaryEmbedding(16)(torch.zeros(1, 3, 1, 16), torch.zeros(1, 1, dtype=torch.int64)), "positions have"),
    (lambda: RotaryEmbedding(16)(torch.zeros(1, 3, 1, 16), torch.zeros(3, dtype=torch.int64)), "positions have shape"),
    (lambda: RotaryEmbedding(16)(torch.zeros(1, 3, 1, 8), torch.zeros(1, 3, dtype=torch.int64)), "x has shape"),
])
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_positions_that_are_not_integers():
    with pytest.raises(TypeError, match="positions have dtype torch.float32"):
        RotaryEmbedding(16)(torch.zeros(1, 3, 1, 16), torch.zeros(1, 3))
