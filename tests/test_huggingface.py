"""transformers' models with attn_implementation="fa3_dist" against their eager attention: logits, gradients, tokens."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed

transformers = pytest.importorskip("transformers")
from fa3_dist import flash_attn_func, ops  # noqa: E402
from fa3_dist.integrations import huggingface  # noqa: E402

with_2d_encoder_masks = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 gives encoders 4-D masks"
)
VOCABULARY, BATCH, SEQLEN, WINDOW = 67, 3, 20, 6


@pytest.fixture(autouse=True, scope="module")
def registered():
    huggingface.register()
    huggingface.register()  # twice does no harm
    transformers.logging.set_verbosity_error()


def make_model(name: str, **options) -> torch.nn.Module:
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "initializer_range": 0.4, "attn_implementation": "eager", "pad_token_id": 0, "eos_token_id": None,
    }
    special = {
        "Llama": {},
        "Mistral": {"sliding_window": WINDOW},
        "Gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 5},
        "GptOss": {"sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_scaling": None},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**shape | special[name] | options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:
                parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.fixture(params=["Llama", "Mistral", "Gemma2", "GptOss"])
def model(request):
    return make_model(request.param)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, VOCABULARY, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> Tensor | None:
    if side == "no mask":
        return None
    mask = torch.ones(BATCH, SEQLEN, dtype=torch.int64)
    for row, amount in enumerate((0, 5, SEQLEN - 3) if side in ("left", "right") else ()):
        mask[row, :amount] = 0
    return mask.flip(1) if side == "right" else mask


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """Whether each call of our forward operator was packed."""
    seen: list[bool] = []
    forward = ops.forward

    def counting(*args, **options):
        seen.append("q_start" in options)
        return forward(*args, **options)

    monkeypatch.setattr(ops, "forward", counting)
    return seen


def run(model, implementation: str, tokens: Tensor, weight: Tensor | None = None, **options) -> dict[str, Tensor]:
    """Logits, and gradients of a loss over the rows of `weight`."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    options.setdefault("use_cache", False)
    logits = model(tokens, **options).logits
    weight = torch.ones_like(tokens) if weight is None else weight
    kept = logits[weight.bool()]
    torch.nn.functional.cross_entropy(kept, tokens.roll(-1, 1)[weight.bool()]).backward()
    return {"logits": kept.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_runs(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        error = (ours[name] - want).norm() / want.norm().clamp(min=0.05)  # some are exactly 0
        assert error < tolerance, f"{name}: relative error {error:.2e}"
    assert theirs["logits"].std() > 0.1


# ---- logits and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["no mask", "all tokens", "left", "right"])
def test_matches_eager(model, tokens, side, calls):
    mask = padding(side)
    theirs = run(model, "eager", tokens, mask, attention_mask=mask)
    assert not calls
    ours = run(model, "fa3_dist", tokens, mask, attention_mask=mask)
    assert calls == [side in ("left", "right")] * 2
    assert_equal_runs(ours, theirs)


def test_padded_rows_get_zero_and_pass_no_gradient(tokens):
    model = make_model("Llama", num_hidden_layers=1)
    mask, outputs = padding("left"), []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model.set_attn_implementation("fa3_dist")
    embeddings = model.get_input_embeddings()(tokens).detach()
    embeddings[mask == 0] = 1e30  # garbage in padding
    embeddings.requires_grad_()
    logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
    logits[mask.bool()].square().mean().backward()
    assert torch.equal(outputs[0][mask == 0], torch.zeros_like(outputs[0][mask == 0]))
    assert embeddings.grad.isfinite().all() and not embeddings.grad[mask == 0].any()


@pytest.mark.parametrize("window", [1, 2, 5, SEQLEN - 1, SEQLEN, SEQLEN + 3])
def test_window_has_no_off_by_one(window, tokens):
    model = make_model("Mistral", sliding_window=window)
    assert_equal_runs(run(model, "fa3_dist", tokens), run(model, "eager", tokens))


def test_window_of_the_mask_counts_where_the_layer_does_not_pass_it(tokens):
    model = make_model("Mistral")
    attention = transformers.AttentionInterface()["fa3_dist"]

    def forgetful(*args, sliding_window=None, **options):
        return attention(*args, **options)

    transformers.AttentionInterface.register("forgetful", forgetful)
    transformers.AttentionMaskInterface.register("forgetful", huggingface.make_mask)
    expected = run(model, "eager", tokens)
    assert_equal_runs(run(model, "forgetful", tokens), expected)
    assert_equal_runs(run(model, "forgetful", tokens, attention=flash_attn_func), expected)
    with huggingface.attention(flash_attn_func):
        assert_equal_runs(run(model, "forgetful", tokens), expected)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_packed_documents(name, tokens, calls):
    model = make_model(name)
    positions = torch.cat([torch.arange(n) for n in (7, 1, 12)])[None].expand(BATCH, -1)
    theirs = run(model, "eager", tokens, position_ids=positions)
    ours = run(model, "fa3_dist", tokens, position_ids=positions)
    assert_equal_runs(ours, theirs)
    assert calls == [True] * 2
    given = run(model, "fa3_dist", tokens, position_ids=positions, use_cache=True,
                attention_mask=huggingface.document_mask(positions))
    assert_equal_runs(given, theirs)
    one_row = run(model, "fa3_dist", tokens[:1], position_ids=positions[:1])
    bounds = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    stated = run(model, "fa3_dist", tokens[:1], position_ids=positions[:1], attention_mask=torch.ones(1, SEQLEN).long(),
                 cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=12, max_length_k=12)
    assert_equal_runs(stated, one_row)


def test_documents_that_nobody_would_separate_are_refused(tokens):
    model = make_model("Llama")
    model.set_attn_implementation("fa3_dist")
    positions = torch.cat((torch.arange(7), torch.arange(13)))[None]
    for options in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(1, SEQLEN).long()}):
        with pytest.raises(ValueError, match="position_ids start again .*document_mask"):
            model(tokens[:1], position_ids=positions, **options)


def assert_equals_eager(model, tokens, atol):
    """The hidden states of an encoder's real tokens, without a mask and with padding on either side."""
    for side in ("no mask", "left", "right"):
        mask, outputs = padding(side), []
        for implementation in ("eager", "fa3_dist"):
            model.set_attn_implementation(implementation)
            hidden = model(tokens, attention_mask=mask).last_hidden_state
            outputs.append(hidden if mask is None else hidden[mask.bool()])
        torch.testing.assert_close(outputs[1], outputs[0], atol=atol, rtol=0)


@with_2d_encoder_masks
def test_bidirectional_encoder(tokens):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.4,
    ))
    assert_equals_eager(model, tokens, atol=2e-5)


@with_2d_encoder_masks
@pytest.mark.parametrize("window", [4, 8, 40])
def test_bidirectional_window(tokens, window):
    torch.manual_seed(0)
    model = transformers.ModernBertModel(transformers.ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        local_attention=window, global_attn_every_n_layers=3, initializer_range=0.4, pad_token_id=0,
    )).eval()
    assert_equals_eager(model, tokens, atol=5e-5)


@with_2d_encoder_masks
def test_encoder_and_decoder(tokens):
    torch.manual_seed(0)
    model = transformers.BartModel(transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0,
        init_std=0.4,
    ))
    for length in (SEQLEN, 7):  # the padding of equally long keys is not that of the queries
        for side in ("no mask", "left", "right"):
            outputs = []
            for implementation in ("eager", "fa3_dist"):
                model.set_attn_implementation(implementation)
                outputs.append(model(
                    tokens, attention_mask=padding(side), decoder_input_ids=tokens.flip(1)[:, :length], use_cache=False,
                ).last_hidden_state)
            torch.testing.assert_close(outputs[1], outputs[0], atol=2e-5, rtol=0)


def test_gradient_checkpointing(tokens, calls):
    model = make_model("Mistral")
    mask = padding("left")
    plain = run(model.train(), "fa3_dist", tokens, mask, attention_mask=mask)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = run(model, "fa3_dist", tokens, mask, attention_mask=mask)
    assert len(calls) == 3 * 2
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)


def test_autocast(tokens, monkeypatch):
    dtypes, forward = [], ops.forward
    monkeypatch.setattr(ops, "forward", lambda q, k, v, **o: (dtypes.append(v.dtype), forward(q, k, v, **o))[1])
    model = make_model("Llama", initializer_range=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (run(model, name, tokens) for name in ("fa3_dist", "eager"))
    assert dtypes == [torch.bfloat16] * 2
    assert_equal_runs({"logits": ours["logits"].float()}, {"logits": theirs["logits"].float()}, 0.05)


# ---- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("side", ["all tokens", "left"])
def test_generates_the_same_tokens(model, tokens, side, cache):
    options = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True},
               "none": {"use_cache": False}}[cache]
    generated = []
    for implementation in ("eager", "fa3_dist"):
        model.set_attn_implementation(implementation)
        generated.append(model.generate(
            tokens, attention_mask=padding(side), max_new_tokens=2 * WINDOW, do_sample=False, **options,
        ))
    assert torch.equal(*generated) and generated[0].shape == (BATCH, SEQLEN + 2 * WINDOW)


def test_continues_from_a_cache_with_several_tokens(model, tokens):
    mask = padding("left")
    model.set_attn_implementation("fa3_dist")
    whole = model(tokens, attention_mask=mask, use_cache=False).logits
    for cut in (1, WINDOW, SEQLEN - 4):
        past = model(tokens[:, :cut], attention_mask=mask[:, :cut], use_cache=True).past_key_values
        rest = model(tokens[:, cut:], attention_mask=mask, past_key_values=past, use_cache=True,
                     position_ids=torch.arange(cut, SEQLEN)[None]).logits
        kept = mask[:, cut:].bool()
        torch.testing.assert_close(rest[kept], whole[:, cut:][kept], atol=2e-4, rtol=0)


# ---- compilation -----------------------------------------------------------------------------------------------------


def test_compiles_into_one_graph(tokens):
    model = make_model("Mistral", num_hidden_layers=1)
    model.set_attn_implementation("fa3_dist")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    mask, one = padding("left"), torch.arange(SEQLEN)[None].expand(BATCH, -1)
    positions = torch.cat((torch.arange(7), torch.arange(13)))[None].expand(BATCH, -1)
    documents = {"position_ids": positions, "attention_mask": huggingface.document_mask(positions)}
    for options in ({"position_ids": one}, {"attention_mask": mask}, documents):
        expected, logits = (m(tokens, use_cache=False, **options).logits for m in (model, compiled))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    holes = mask.clone()
    holes[0, 4] = 0
    with pytest.raises(RuntimeError, match="padding between tokens"):
        compiled(tokens, use_cache=False, attention_mask=holes)
    with pytest.raises(RuntimeError, match="documents are packed"):
        compiled(tokens, use_cache=False, position_ids=positions)


# ---- an attention callable from outside ------------------------------------------------------------------------------


def test_attention_callable_by_keyword_and_by_block(model, tokens):
    expected, seen = run(model, "fa3_dist", tokens), []

    def attention(q, k, v, **options):
        seen.append((q.shape, options["window_size"]))
        return flash_attn_func(q, k, v, **options)

    assert_equal_runs(run(model, "fa3_dist", tokens, attention=attention), expected, 1e-7)
    assert len(seen) == 2 and seen[0][0] == (BATCH, SEQLEN, 4, 8)
    with huggingface.attention(attention):
        assert_equal_runs(run(model, "fa3_dist", tokens), expected, 1e-7)
        with pytest.raises(ValueError, match="expected no padding"):
            model(tokens, attention_mask=padding("left"))
    assert len(seen) == 4 and seen[:2] == seen[2:]
    with pytest.raises(ValueError, match="expected no padding"):
        model(tokens, attention_mask=padding("left"), attention=attention)
    assert_equal_runs(run(model, "fa3_dist", tokens), expected, 1e-7)


def test_recomputation_outside_of_the_block_raises(tokens):
    model = make_model("Llama").train()
    model.set_attn_implementation("fa3_dist")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with huggingface.attention(flash_attn_func):
        logits = model(tokens, use_cache=False).logits
    with pytest.raises(ValueError, match="runs outside of the attention"):
        logits.sum().backward()


def sharded_runs(rank: int, world: int, names: tuple[str, ...]) -> list[dict[str, Tensor]]:
    huggingface.register()
    return [sharded_run(world, name) for name in names]


def sharded_run(world: int, name: str) -> dict[str, Tensor]:
    import torch.distributed as dist

    from fa3_dist.parallel import ContextParallel

    model = make_model(name).train()
    model.set_attn_implementation("fa3_dist")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(1, VOCABULARY, (1, 37), generator=torch.Generator().manual_seed(2))
    cp = ContextParallel(dist.group.WORLD, layout="zigzag")
    with pytest.raises(ValueError, match=r"ranks \[\d\] of 2 have no tokens"):
        huggingface.inputs(cp.shard(tokens[:, :1]))
    batch = cp.shard(tokens, cu_seqlens=[0, 9, 37])
    with pytest.raises(ValueError, match="position_ids are not those of the shard"):
        model(batch.tokens, attention=batch.attention, use_cache=False)
    logits = model(**huggingface.inputs(batch)).logits
    cp.loss(logits, batch.labels).backward()
    results = {"logits": cp.unshard(logits, batch).detach()}
    for parameter_name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        results[parameter_name] = parameter.grad / world
    return results


def unsharded_run(name: str) -> dict[str, Tensor]:
    """The model's eager attention on each document alone."""
    model = make_model(name)
    tokens = torch.randint(1, VOCABULARY, (1, 37), generator=torch.Generator().manual_seed(2))
    logits = torch.cat([model(document, use_cache=False).logits for document in tokens.split([9, 28], dim=1)], dim=1)
    labels = tokens.roll(-1, 1)
    labels[0, [8, 36]] = -100
    torch.nn.functional.cross_entropy(logits[0], labels[0]).backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters()}


def test_context_parallel():
    names = ("Mistral", "GptOss")
    expected = [unsharded_run(name) for name in names]
    for results in run_distributed(2, sharded_runs, names):
        for ours, theirs in zip(results, expected, strict=True):
            assert_equal_runs(ours, theirs)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_refuses_what_it_cannot_do(tokens):
    model = make_model("Llama", attention_dropout=0.1)
    model.set_attn_implementation("fa3_dist")
    model(tokens)  # no dropout outside of training
    with pytest.raises(ValueError, match="LlamaAttention has attention dropout 0.1"):
        model.train()(tokens)
    model.eval()
    arbitrary = torch.zeros(BATCH, 1, SEQLEN, SEQLEN)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1, 20, 20\) and dtype torch.float32"):
        model(tokens, attention_mask=arbitrary)
    holes = padding("left")
    holes[0, 4] = 0
    with pytest.raises(ValueError, match="padding between tokens"):
        model(tokens, attention_mask=holes)
    with pytest.raises(ValueError, match="name is 'my_flash'"):
        huggingface.register("my_flash")
    layer, (q, k, v) = model.model.layers[0].self_attn, torch.randn(3, 1, 4, 5, 8)
    for name, value in (("position_bias", torch.zeros(1, 4, 5, 5)), ("output_attentions", True), ("head_mask", q)):
        with pytest.raises(ValueError, match=f"LlamaAttention passes {name}"):
            huggingface.attention_forward(layer, q, k, v, **{name: value})


def test_chunks_without_padding_are_documents():
    def chunks(batch, head, query, key):
        return (key <= query) & (key // 8 == query // 8)

    mask = huggingface.make_mask(2, 20, chunks, q_length=20, local_size=8)
    assert mask[0, 0].tolist() == [[0, 8], [8, 8], [16, 4], [20, 8], [28, 8], [36, 4]]
    with pytest.raises(ValueError, match="causal, sliding-window or bidirectional"):
        huggingface.make_mask(2, 20, chunks, torch.ones(2, 20, dtype=torch.bool), q_length=20, local_size=8)


@pytest.mark.parametrize(
    "change", ["prefix", "added", "dilated", "wider", "narrower", "sink in documents", "not causal"]
)
def test_refuses_other_patterns(change):
    """Mask functions as transformers makes them for image tokens (prefix), and by users."""
    function, options = {
        "prefix": (lambda batch, head, query, key: (key <= query) | ((key < 4) & (query < 4)), {}),
        "added": (lambda batch, head, query, key: key <= query, {"use_vmap": True}),
        "dilated": (lambda batch, head, query, key: (key <= query) & (query - key < 6) & (query - key != 5),
                    {"local_size": 6}),
        "wider": (lambda batch, head, query, key: (key <= query) & (query - key < 7), {"local_size": 6}),
        "narrower": (lambda batch, head, query, key: (key <= query) & (query - key < 5), {"local_size": 6}),
        "sink in documents": (
            lambda batch, head, query, key: (key <= query) & ((key // 8 == query // 8) | (key == 0)), {}),
        "not causal": (lambda batch, head, query, key: query - key < 6, {"local_size": 6}),
    }[change]
    for padded in (None, torch.ones(2, 20, dtype=torch.bool)):
        with pytest.raises(ValueError, match="causal, sliding-window or bidirectional"):
            huggingface.make_mask(2, 20, function, padded, q_length=20, **options)


def test_two_dimensional_mask_without_transformers_mask_functions(tokens):
    layer = make_model("Llama").model.layers[0].self_attn
    q, k, v = (torch.randn(BATCH, heads, SEQLEN, 8) for heads in (4, 2, 2))
    mask = padding("right")
    out, _ = huggingface.attention_forward(layer, q, k, v, mask, sliding_window=4)
    for row in range(BATCH):
        length = int(mask[row].sum())
        alone = [x[row : row + 1, :, :length].transpose(1, 2) for x in (q, k, v)]
        expected = flash_attn_func(*alone, causal=True, window_size=(3, 0))
        torch.testing.assert_close(out[row, :length], expected[0])
        assert not out[row, length:].any()


def test_is_optional():
    code = (
        "import sys, fa3_dist, fa3_dist.layers, fa3_dist.parallel, fa3_dist.integrations\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try:\n    import fa3_dist.integrations.huggingface\n"
        "except ImportError as error:\n    assert 'pip install' in str(error), error\n"
        "else:\n    raise AssertionError('imported without transformers')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_model_is_left_as_it_was(tokens):
    model = make_model("Llama")
    before, config = model(tokens).logits, copy.deepcopy(model.config.to_dict())
    model.set_attn_implementation("fa3_dist")
    model(tokens)
    model.set_attn_implementation("eager")
    assert torch.equal(model(tokens).logits, before) and model.config.to_dict() == config
