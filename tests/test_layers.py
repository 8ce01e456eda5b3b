"""FA3Attention and the transformer against the oracle, torch.nn.MultiheadAttention and transformers' Llama; and what
users do to modules: autocast, compile, checkpoint, copy, shard, start on the meta device."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from fa3_dist import flash_attn_func
from fa3_dist.layers import (
    FA3Attention,
    RotaryEmbedding,
    RotaryScaling,
    Transformer,
    TransformerBlock,
    TransformerConfig,
)
from tests import oracle
from tests.distributed import run_distributed

SMALL = TransformerConfig(vocab_size=61, dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=48)
RICH = TransformerConfig(
    vocab_size=61, dim=32, layers=3, heads=4, kv_heads=2, head_dim=12, qk_norm=True, softcap=20.0, sink=True,
    window_size=((5, 0), (-1, -1)), rope_scaling=RotaryScaling("yarn", 4.0, 64), tie_embeddings=True,
)


def make_transformer(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A model whose sinks and norms are not at their neutral initial values."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def grads(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative L2 error of every tensor."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        error = (actual[name].double() - want.double()).norm() / want.double().norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
        assert want.abs().max() > 0, f"{name} is zero: nothing was compared"


# ---- FA3Attention ----------------------------------------------------------------------------------------------------


def attention_by_hand(layer: FA3Attention, x: Tensor, positions: Tensor) -> Tensor:
    """The layer's definition written out in fp64: projections, RMS norm, rotation by complex numbers, the oracle."""
    parameters = {name: p.double() for name, p in layer.named_parameters()}

    def heads(name: str, norm: str | None) -> Tensor:
        y = x.double() @ parameters[f"{name}.weight"].T
        if f"{name}.bias" in parameters:
            y = y + parameters[f"{name}.bias"]
        y = y.reshape(*x.shape[:2], -1, layer.head_dim)
        if norm is not None and f"{norm}.weight" in parameters:
            y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * parameters[f"{norm}.weight"]
        if norm is not None and layer.rotary is not None:
            half = layer.head_dim // 2
            angle = positions[..., None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
            turned = torch.complex(y[..., :half], y[..., half:]) * torch.exp(1j * angle)[:, :, None]
            y = torch.cat((turned.real, turned.imag), dim=-1)
        return y

    left, right = (None if bound < 0 else bound for bound in layer.window_size)
    out, _ = oracle.attention(
        heads("q_proj", "q_norm"), heads("k_proj", "k_norm"), heads("v_proj", None), window_left=left,
        window_right=0 if layer.causal else right, softcap=layer.softcap, softmax_scale=layer.softmax_scale,
        sink=parameters.get("sink"),
    )
    y = out.flatten(2) @ parameters["o_proj.weight"].T
    return y + parameters["o_proj.bias"] if "o_proj.bias" in parameters else y


VARIANTS = {
    "plain": {},
    "full, biased": {"causal": False, "bias": True},
    "biased, o_proj not": {"bias": True, "out_bias": False},
    "gqa": {"kv_heads": 2},
    "mqa, wide heads": {"kv_heads": 1, "head_dim": 24},
    "qk_norm, rotary": {"qk_norm": True, "rotary": RotaryEmbedding(8)},
    "window": {"window_size": (3, 0)},
    "two-sided window": {"causal": False, "window_size": (2, 1)},
    "softcap, scale": {"softcap": 1.5, "softmax_scale": 0.9},
    "sink": {"sink": True, "kv_heads": 2, "rotary": RotaryEmbedding(8)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_its_definition(variant):
    torch.manual_seed(0)
    layer = FA3Attention(32, 4, **VARIANTS[variant])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 13, 32, requires_grad=True)
    positions = torch.stack((torch.arange(13), torch.arange(13) % 7 + 1000))
    results = []
    for function in (lambda: layer(x, positions=positions), lambda: attention_by_hand(layer, x, positions)):
        out = function()
        (out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)).sum().backward()
        results.append({"out": out.detach(), "x": x.grad.clone(), **grads(layer)})
        x.grad = None
    ours, theirs = results
    if "k_proj.bias" in ours:  # a constant added to all keys changes nothing, the gradient is rounding
        assert ours.pop("k_proj.bias").norm() < 1e-4 * ours["q_proj.bias"].norm()
        theirs.pop("k_proj.bias")
    assert_close(ours, theirs, 1e-5 if layer.rotary is None else 5e-5)


def test_positions_default_to_the_index():
    torch.manual_seed(0)
    layer, x = FA3Attention(32, 4, rotary=RotaryEmbedding(8)), torch.randn(2, 9, 32)
    assert torch.equal(layer(x), layer(x, positions=torch.arange(9).expand(2, 9)))
    assert not torch.allclose(layer(x), layer(x, positions=torch.arange(9).flip(0).expand(2, 9)), atol=1e-3)


def test_attends_to_another_sequence():
    torch.manual_seed(0)
    layer = FA3Attention(32, 4, kv_heads=2, causal=False, bias=True)
    mha = nn.MultiheadAttention(32, 4, batch_first=True)
    x, kv = torch.randn(2, 5, 32), torch.randn(2, 8, 32)

    def repeat(heads: Tensor) -> Tensor:
        return heads.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)

    with torch.no_grad():
        for name in ("weight", "bias"):
            q, k, v = (getattr(proj, name) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
            getattr(mha, f"in_proj_{name}").copy_(torch.cat((q, repeat(k), repeat(v))))
            getattr(mha.out_proj, name).copy_(getattr(layer.o_proj, name))
    torch.testing.assert_close(layer(x, kv=kv), mha(x, kv, kv, need_weights=False)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_from_torch_gives_equal_outputs_and_gradients(bias, batch_first, causal):
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(24, 3, bias=bias, batch_first=batch_first).eval()
    if bias:
        nn.init.normal_(mha.in_proj_bias)
        nn.init.normal_(mha.out_proj.bias)
    layer = FA3Attention.from_torch(mha, causal=causal)
    assert not layer.training and layer.q_proj.weight.data_ptr() != mha.in_proj_weight.data_ptr()
    x = torch.randn(2, 11, 24)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    mask = torch.ones(11, 11, dtype=torch.bool).triu(1) if causal else None
    given = theirs if batch_first else theirs.transpose(0, 1)
    expected, _ = mha(given, given, given, attn_mask=mask, need_weights=False)
    expected = expected if batch_first else expected.transpose(0, 1)
    out = layer(mine)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()

    ours = {"out": out.detach(), "x": mine.grad, "o": layer.o_proj.weight.grad}
    want = {"out": expected.detach(), "x": theirs.grad, "o": mha.out_proj.weight.grad}
    for name, part in zip("qkv", mha.in_proj_weight.grad.chunk(3), strict=True):
        ours[name], want[name] = getattr(layer, f"{name}_proj").weight.grad, part
    if bias:
        ours |= {"bq": layer.q_proj.bias.grad, "bv": layer.v_proj.bias.grad, "bo": layer.o_proj.bias.grad}
        bq, _, bv = mha.in_proj_bias.grad.chunk(3)
        want |= {"bq": bq, "bv": bv, "bo": mha.out_proj.bias.grad}
    assert_close(ours, want, 5e-6)


@pytest.mark.parametrize("options, message", [
    ({"dropout": 0.1}, "dropout 0.1"),
    ({"kdim": 8}, "kdim 8"),
    ({"vdim": 8}, "vdim 8"),
    ({"add_bias_kv": True}, "add_bias_kv"),
    ({"add_zero_attn": True}, "add_zero_attn"),
])
def test_from_torch_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        FA3Attention.from_torch(nn.MultiheadAttention(24, 3, **options))


def test_state_dict_names():
    layer = FA3Attention(32, 4, 2, bias=True, qk_norm=True, sink=True, rotary=RotaryEmbedding(8), device="meta")
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "q_proj.weight": (32, 32), "q_proj.bias": (32,), "k_proj.weight": (16, 32), "k_proj.bias": (16,),
        "v_proj.weight": (16, 32), "v_proj.bias": (16,), "o_proj.weight": (32, 32), "o_proj.bias": (32,),
        "q_norm.weight": (8,), "k_norm.weight": (8,), "sink": (4,),
    }
    with torch.device("meta"):
        names = set(Transformer(SMALL).state_dict())
    assert {name for name in names if not name.startswith("blocks.1")} == {
        "embed.weight", "norm.weight", "head.weight", "blocks.0.attention_norm.weight", "blocks.0.mlp_norm.weight",
        *(f"blocks.0.attention.{n}_proj.weight" for n in "qkvo"),
        *(f"blocks.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }


class Sharded:
    """An attention callable that works on a shard: it says that positions are needed."""

    needs_positions = True

    def __call__(self, q, k, v, **options):
        return flash_attn_func(q, k, v, **options)


@pytest.mark.parametrize("call, message", [
    (lambda: FA3Attention(32, 5), "dim is 32 with 5 heads"),
    (lambda: FA3Attention(32, 4, 3), "kv_heads 3"),
    (lambda: FA3Attention(32, 4, precision="fp8"), "precision is 'fp8'"),
    (lambda: FA3Attention(32, 4, rotary=RotaryEmbedding(16)), "rotary has head_dim 16"),
    (lambda: FA3Attention(32, 4, rotary=RotaryEmbedding(8), name="lay.7")(torch.zeros(1, 3, 32), attention=Sharded()),
     "lay.7 has a rotary embedding and runs on a shard .* index in the shard is not a position"),
    (lambda: FA3Attention(32, 4, rotary=RotaryEmbedding(8), attention=Sharded())(torch.zeros(1, 3, 32)), "shard"),
    (lambda: make_transformer(SMALL)(torch.zeros(1, 3, dtype=torch.int64), attention=Sharded()), "blocks.0.attention"),
    (lambda: FA3Attention(32, 4, rotary=RotaryEmbedding(8))(torch.zeros(1, 3, 32), kv=torch.zeros(1, 3, 32)), "kv"),
    (lambda: FA3Attention(32, 4)(torch.zeros(1, 3, 32), kv=torch.zeros(1, 3, 32), attention=Sharded()), "kv with"),
    (lambda: FA3Attention(32, 4, rotary=RotaryEmbedding(8))(torch.zeros(1, 3, 32), positions=torch.arange(2)[None]),
     "positions have shape"),
    (lambda: TransformerConfig(vocab_size=0, dim=32, layers=1, heads=4), "vocab_size is 0"),
    (lambda: TransformerConfig(vocab_size=8, dim=32, layers=1, heads=4, window_size=(1, 2, 3)), "window_size is"),
    (lambda: TransformerConfig(vocab_size=8, dim=32, layers=1, heads=4, embed_std=0.0), "embed_std is 0.0"),
])
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_injected_attention_gets_every_option():
    calls = []

    def attention(q, k, v, **options):
        calls.append((tuple(q.shape), tuple(k.shape), options))
        return flash_attn_func(q, k, v, **options)

    layer = FA3Attention(32, 4, 2, window_size=(4, 0), softcap=9.0, softmax_scale=0.2, sink=True)
    x = torch.randn(2, 6, 32)
    assert torch.equal(layer(x, attention=attention), layer(x))
    layer.attention = attention
    layer(x)
    assert len(calls) == 2 and calls[0] == calls[1]
    expected = {"softmax_scale": 0.2, "causal": True, "window_size": (4, 0), "softcap": 9.0, "sink": layer.sink}
    assert calls[0] == ((2, 6, 4, 8), (2, 6, 2, 8), expected)


# ---- transformer -----------------------------------------------------------------------------------------------------

FROM_LLAMA = {
    "model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head", "model.layers": "blocks",
    "self_attn": "attention", "post_attention_layernorm": "mlp_norm", "input_layernorm": "attention_norm",
}


def test_is_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=500.0, rope_scaling=rope, initializer_range=0.3,
        attn_implementation="eager",
    )
    llama = transformers.LlamaForCausalLM(config)
    model = Transformer(TransformerConfig(
        vocab_size=61, dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=48, rope_base=500.0,
        rope_scaling=RotaryScaling.from_hf_config(config.to_dict()),
    ))

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for theirs, ours in FROM_LLAMA.items():
            tensors = {name.replace(theirs, ours): tensor for name, tensor in tensors.items()}
        return tensors

    model.load_state_dict(renamed(llama.state_dict()))
    tokens, positions = torch.randint(0, 61, (2, 24)), torch.randint(0, 200, (2, 24))
    logits = model(tokens, positions)
    expected = llama(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
    assert_close({"logits": logits.detach()}, {"logits": expected.detach()}, 2e-5)
    for out in (logits, expected):
        nn.functional.cross_entropy(out.flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    assert_close(grads(model), renamed(grads(llama)), 1e-4)


def test_windows_repeat_over_the_layers():
    model = Transformer(TransformerConfig(vocab_size=8, dim=16, layers=5, heads=2, window_size=[[4, 0], [-1, -1]]))
    assert [block.attention.window_size for block in model.blocks] == [(4, 0), (-1, -1), (4, 0), (-1, -1), (4, 0)]


@pytest.mark.parametrize("config", [SMALL, RICH], ids=["small", "rich"])
def test_future_tokens_change_nothing(config):
    model = make_transformer(config)
    tokens = torch.randint(0, 61, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


def test_checkpointing_changes_no_bit():
    model = make_transformer(RICH)
    recomputing = Transformer(TransformerConfig(**{**vars(RICH), "checkpoint_activations": True}))
    recomputing.load_state_dict(model.state_dict())
    tokens, forwards = torch.randint(0, 61, (2, 20)), []

    def counting(*args, **options):
        forwards.append(torch.is_grad_enabled())
        return flash_attn_func(*args, **options)

    results = []
    for m in (model, recomputing):
        logits = m(tokens, attention=counting)
        logits.square().mean().backward()
        results.append({"logits": logits.detach(), **grads(m)})
    assert len(forwards) == 3 * RICH.layers, "expected one forward and one forward with recomputation"
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_autocast_runs_attention_in_bf16():
    model = make_transformer(RICH)
    tokens, dtypes = torch.randint(0, 61, (2, 20)), []

    def recording(q, k, v, **options):
        dtypes.append((q.dtype, k.dtype, v.dtype))
        return flash_attn_func(q, k, v, **options)

    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, attention=recording)
    logits.float().square().mean().backward()
    assert dtypes == [(torch.bfloat16,) * 3] * RICH.layers and logits.dtype == torch.bfloat16
    assert (logits - exact).norm() < 0.02 * exact.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiles_into_one_graph_with_dynamic_shapes():
    model = make_transformer(TransformerConfig(**{**vars(RICH), "layers": 1}))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, seqlen in ((2, 16), (3, 21)):
        tokens = torch.randint(0, 61, (batch, seqlen))
        positions = torch.randint(0, 2**31, (batch, seqlen))
        results = []
        for m in (compiled, model):
            logits = m(tokens, positions)
            logits.square().mean().backward()
            results.append({"logits": logits.detach(), **grads(model)})
        assert_close(*results, 1e-5)


def test_copies_and_pickles():
    model, tokens = make_transformer(RICH), torch.randint(0, 61, (1, 9))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens), model(tokens))


def test_meta_device_start_equals_plain_start():
    plain = Transformer(RICH)
    torch.manual_seed(3)
    plain.reset_parameters()
    with torch.device("meta"):
        model = Transformer(RICH)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.reset_parameters()
    tokens = torch.randint(0, 61, (1, 40))
    assert torch.equal(model(tokens), plain(tokens))


def test_initial_scales():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=256, dim=128, layers=8, heads=4))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            std = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert abs(parameter.std().item() / std - 1) < 0.05, name
    loss = nn.functional.cross_entropy(model(torch.randint(0, 256, (1, 64)))[0], torch.randint(0, 256, (64,)))
    assert abs(loss.item() - math.log(256)) < 0.1
    model = Transformer(TransformerConfig(vocab_size=256, dim=128, layers=1, heads=4, embed_std=0.3))
    assert model.embed.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert model.head is not None and model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_counts():
    tied, untied = (Transformer(TransformerConfig(**{**vars(RICH), "tie_embeddings": tie})) for tie in (True, False))
    assert tied.number_of_parameters() == untied.number_of_parameters() - 61 * 32
    assert tied.flops_per_token(9) == untied.flops_per_token(9)
    windows = ((7, 0), (-1, -1))
    model = Transformer(TransformerConfig(vocab_size=100, dim=64, layers=2, heads=4, mlp_dim=96, window_size=windows))
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 100
    assert model.number_of_parameters() == weights + 100 * 64 + 5 * 64
    seqlen = 30
    visible = sum(min(i + 1, 8) + (i + 1) for i in range(seqlen)) / seqlen
    assert model.flops_per_token(seqlen) == pytest.approx(6 * weights + 12 * 64 * visible)


def sharded_step(rank: int, world: int, checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    config = TransformerConfig(**{**vars(RICH), "checkpoint_activations": checkpointing})
    model = make_transformer(config)
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.manual_seed(5)
    logits = model(torch.randint(0, 61, (1, 12)))
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def test_fsdp2():
    model = make_transformer(RICH)
    torch.manual_seed(5)
    logits = model(torch.randint(0, 61, (1, 12)))
    logits.square().mean().backward()
    expected = grads(model)
    for sharded_logits, sharded_grads in run_distributed(2, sharded_step, True):
        torch.testing.assert_close(sharded_logits, logits.detach(), atol=1e-5, rtol=1e-5)
        assert_close(sharded_grads, expected, 1e-5)


def test_block_alone():
    torch.manual_seed(0)
    block, x = TransformerBlock(SMALL), torch.randn(1, 6, 32)
    expected = x + block.attention(block.attention_norm(x))
    torch.testing.assert_close(block(x), expected + block.mlp(block.mlp_norm(expected)))
