"""benchmarks/scaling_model.py: limits that can be computed by hand, its sources, and what it prints."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling_model  # noqa: E402
from scaling_model import Machine, Problem, predict  # noqa: E402

from fa3_dist.parallel.plan import RATES, Call, Copies, Links, Rates  # noqa: E402
from fa3_dist.parallel.schedule import imbalance, zigzag  # noqa: E402

FLOPS = 5e14
FREE = Rates(((1, FLOPS),), ((1, FLOPS),), memory=1e30, step_seconds=0.0, part_seconds=0.0, latency=0.0, least_half=0,
             least_opening=0, least_part=1 << 40)
USUAL = FREE._replace(memory=3e12, step_seconds=20e-6, part_seconds=80e-6, latency=10e-6)
HOSTS = Links.given({8: 400e9, 512: 45e9})


def problem(seqlen: int, heads: int = 16, kv_heads: int = 4, window_right: int | None = 0) -> Problem:
    return Problem(Call(heads, kv_heads, 128, 128, torch.bfloat16, None, window_right), seqlen)


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_one_gpu_is_its_own_measure():
    assert {mode: each.efficiency(which) for mode, each in predict(problem(5000), Machine(USUAL, HOSTS), 1).items()
            for which in scaling_model.PASSES} == {"ring": 1.0}


@pytest.mark.parametrize("seqlen, gpus", [(4096, 8), (4099, 8), (1001, 16)])
def test_where_all_else_is_free_only_imbalance_is_left(seqlen: int, gpus: int):
    by_mode = predict(problem(seqlen), Machine(FREE, Links.given(1e30)), gpus)
    balanced = 1 / imbalance(zigzag((seqlen,), gpus), window_right=0)
    assert by_mode["ring"].efficiency("forward") == pytest.approx(balanced, rel=1e-9)
    assert by_mode["ring"].efficiency("forward_backward") == pytest.approx(balanced, rel=1e-9)
    assert by_mode["all_to_all"].efficiency("forward_backward") == pytest.approx(1, rel=1e-9)
    assert balanced == pytest.approx(1, abs=1e-3) or seqlen % (2 * gpus)


def test_slow_links_decide_alone():
    """Full mask on 4 GPUs: 3 messages of a quarter of K and V one behind the other; 3 quarters of the all-to-all's."""
    seqlen, bandwidth = 8192, 1e3
    by_mode = predict(problem(seqlen, window_right=None), Machine(FREE, Links.given(bandwidth)), 4)
    alone = 4 * seqlen**2 * 16 * 128 / FLOPS
    rows = seqlen // 4
    ring_bytes = 3 * rows * 4 * 256 * 2
    assert by_mode["ring"].efficiency("forward") == pytest.approx(alone / 4 / (ring_bytes / bandwidth), rel=1e-3)
    head_bytes = 4 * 128 * 2 + 256 * 2 + 4 * (128 * 2 + 4)  # 4 heads of q, one of k and v, 4 of out and lse
    swapped = 3 * rows * head_bytes
    assert by_mode["all_to_all"].efficiency("forward") == pytest.approx(alone / 4 / (swapped / bandwidth), rel=1e-3)


def test_a_fixed_sequence_scales_ever_worse_and_faster_links_never_harm():
    machine = Machine(USUAL, HOSTS)
    by_gpus = [predict(problem(65536), machine, gpus) for gpus in (1, 2, 4, 8, 16, 32, 64)]
    for mode in scaling_model.MODES:
        efficiencies = [by_mode[mode].efficiency("forward_backward") for by_mode in by_gpus if mode in by_mode]
        assert efficiencies == sorted(efficiencies, reverse=True) and 0 < efficiencies[-1] < efficiencies[0] <= 1
    faster = Machine(USUAL, Links.given({8: 800e9, 512: 90e9}))
    for mode, each in predict(problem(65536), faster, 16).items():
        assert each.efficiency("forward") >= by_gpus[4][mode].efficiency("forward")


def test_copies_carry_rings_within_a_host():
    machine, copied = (Machine(USUAL, links) for links in (HOSTS, replace(HOSTS, copies=Copies(40e9, 1e-4))))
    for gpus in (2, 8, 16):
        by_mode, others = (predict(problem(8192), each, gpus) for each in (machine, copied))
        assert [mode for mode in by_mode if by_mode[mode] != others[mode]] == (["ring"] if gpus <= 8 else [])
        assert others["ring"].efficiency("forward") <= by_mode["ring"].efficiency("forward")
    assert predict(problem(8192), copied._replace(gpus_per_host=4), 8) == predict(problem(8192), machine, 8)


def test_modes_that_heads_do_not_allow_are_left_out():
    machine = Machine(USUAL, HOSTS)
    assert list(predict(problem(4096, heads=4), machine, 2)) == ["ring", "all_to_all"]
    assert list(predict(problem(4096, heads=5, kv_heads=1), machine, 8)) == ["ring"]
    split = predict(problem(4096, heads=16), machine, 32)["product"]
    assert split.estimate.head_ranks in (2, 4, 8, 16) and split.name.startswith("ring ")
    assert "all_to_all" not in predict(problem(4096, heads=16), machine, 32)


# ---- sources ---------------------------------------------------------------------------------------------------------


def cell(seqlen: int, causal: bool, tflops: float | None, **changes: Any) -> dict[str, Any]:
    fields = {"seqlen": seqlen, "causal": causal, "heads": 16, "kv_heads": 16, "head_dim": 128, "head_dim_v": 128,
              "window_left": None, "errors": []}  # fmt: skip
    ours = {"tflops": {"median": tflops}} if tflops else {"reason": "none"}
    return {**fields, "dtype": "bfloat16", "peers": {"ours": ours, "cudnn": {"tflops": {"median": 1.0}}}, **changes}


def test_speeds_are_read_by_the_keys_of_a_query(tmp_path: Path):
    cells = [
        cell(2048, True, 500), cell(1024, False, 520), cell(8192, True, 700), cell(512, True, None),
        cell(4096, True, 1, head_dim=64), cell(4096, True, 1, window_left=128), cell(4096, True, 1, errors=["wrong"]),
        cell(4096, True, 1, dtype="float16"), {**cell(4096, True, 1), "seqlen": None},
    ]  # fmt: skip
    path = tmp_path / "speeds.json"
    path.write_text(json.dumps({"device": "GPU 7", "commit": "abc", "cells": cells}))
    assert scaling_model.read_speed(path, 128, 128) == ((1024.0, 510e12), (4096.0, 700e12))
    forward, backward, origins = scaling_model.kernel_speeds(str(path), "480.5", 128, 128)
    assert forward[-1] == (4096.0, 700e12) and backward == ((1.0, 480.5e12),)
    assert "measured on one GPU 7 at commit abc: 510 TFLOP/s where a query sees 1024 keys to 700 at 4096" in origins[0]
    assert origins[1] == "backward kernel, given: 480.5 TFLOP/s"
    with pytest.raises(ValueError, match="no dense bf16 cell of head_dim 96"):
        scaling_model.read_speed(path, 96, 96)
    # A tile of the backward goes over the queries of all heads that share its keys.
    shared = [cell(2048, True, 500), {**cell(2048, True, 600), "heads": 32, "kv_heads": 8}]
    for suite, expected in (("forward", ((1024.0, 550e12),)), ("backward", ((1024.0, 500e12), (4096.0, 600e12)))):
        path.write_text(json.dumps({"device": "GPU 7", "suite": suite, "cells": shared}))
        assert scaling_model.read_speed(path, 128, 128) == expected
    *_, origins = scaling_model.kernel_speeds("500", str(path), 128, 128)
    assert "500 TFLOP/s where 1024 queries of all heads see a key to 600 at 4096" in origins[1]


def test_the_committed_result_is_read():
    speed = scaling_model.read_speed(scaling_model.FORWARD, 128, 128)
    assert [keys for keys, _ in speed] == sorted(keys for keys, _ in speed) and len(speed) >= 5
    assert all(1e14 < rate < 1e15 for _, rate in speed)


def test_without_a_result_the_backward_is_an_assumption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(scaling_model, "BACKWARD", tmp_path / "none.json")
    forward, backward, origins = scaling_model.kernel_speeds("600", None, 128, 128)
    assert backward == ((1.0, 450e12),) and "assumed" in origins[1]


# ---- measurements beside it, output ----------------------------------------------------------------------------------


MEASURED: dict[str, Any] = {
    "device": "NVIDIA H200", "ranks": 2, "bandwidth": {"2": 3e11}, "latency": 1e-5,
    "cells": [
        {
            "name": "gqa_32k", "batch": 1, "seqlen": 32768, "heads": 32, "kv_heads": 8, "head_dim": 128,
            "head_dim_v": 128, "causal": True, "window_left": None,
            "passes": {
                "forward": {"entries": {
                    "alone": {"ms": {"median": 9.0}}, "ring": {"efficiency": 0.9, "ms": {"median": 5.0}},
                    "all_to_all": {"ms": None, "reason": "none"},
                }},
                "forward_backward": {"entries": {"all_to_all": {"efficiency": 0.5}, "torch": {"efficiency": 0.1}}},
            },
        },
        {"name": "packed", "documents": 9, "tokens": 4096, "passes": {}},
    ],
}  # fmt: skip


COPIES = {"copies": {"bandwidth": 3.5e11, "latency": 2e-6}}


def test_measurements_stand_beside_predictions():
    machine = Machine(USUAL, HOSTS)
    assert scaling_model.compare(MEASURED, machine, (64, 64)) == []
    found = scaling_model.compare(MEASURED, machine, (128, 128))
    predictions = predict(problem(32768, 32, 8), machine, 2)
    ring, swapped = predictions["ring"], predictions["all_to_all"]
    what = "2 GPUs, {}, 32768 tokens, 32:8 heads"
    assert found == [
        (what.format("ring"), "forward", ring.efficiency("forward"), 0.9, 1e3 * ring.seconds("forward"), 5.0),
        (what.format("all_to_all"), "forward_backward", swapped.efficiency("forward_backward"), 0.5,
         1e3 * swapped.seconds("forward_backward"), None),
    ]  # fmt: skip
    predicted = ring.efficiency("forward")
    table = scaling_model.comparison_table(found)
    assert f"| {predicted:.2f} | 0.90 | {predicted - 0.9:+.2f} | {1e3 * ring.seconds('forward'):.3g} | 5 |" in table[2]
    assert table[3].endswith("| - |")


def test_measured_links_take_the_place_of_given_ones():
    parsed = scaling_model.parse_arguments(["--gpus", "2,64", "--within", "4e11", "--between", "5e10"])
    links, origin = scaling_model.make_links(parsed, {})
    assert links == Links(((8, 4e11), (64, 5e10)), parsed.latency) and origin == "given"
    links, origin = scaling_model.make_links(parsed, MEASURED)
    assert links == Links(((2, 3e11), (8, 4e11), (64, 5e10)), 1e-5) and "among 2 GPUs measured" in origin
    assert scaling_model.make_links(parsed, MEASURED | {"copies": None}) == (links, origin)
    copied, _ = scaling_model.make_links(parsed, MEASURED | COPIES)
    assert copied == replace(links, copies=Copies(3.5e11, 2e-6))


@pytest.mark.parametrize("name", ["context_parallel_2xh200", "context_parallel_1m_2xh200"])
def test_committed_results_are_compared_with(name: str):
    """Whether they tell of copies or not."""
    result = json.loads((scaling_model.timing.RESULTS / f"{name}.json").read_text())
    links, _ = scaling_model.make_links(scaling_model.parse_arguments([]), result)
    assert (links.copies is not None) is bool(result.get("copies"))
    found = scaling_model.compare(result, Machine(USUAL, links), (128, 128))
    assert all(each.predicted > 0 for each in found) and (found or "1m" in name)


def test_predictions_are_what_was_measured_within_the_bar():
    result = json.loads((scaling_model.timing.RESULTS / "context_parallel_2xh200.json").read_text())
    links, _ = scaling_model.make_links(scaling_model.parse_arguments([]), result)
    forward, backward, _ = scaling_model.kernel_speeds(str(scaling_model.FORWARD), None, 128, 128)
    machine = Machine(RATES["cuda"]._replace(forward=forward, backward=backward), links)
    found = scaling_model.compare(result, machine, (128, 128))
    assert {each.what.split(", ")[1] for each in found} == {"ring", "ring_again", "all_to_all"} and len(found) >= 30
    for each in found:
        assert each.predicted == pytest.approx(each.measured, abs=scaling_model.LARGEST_DIFFERENCE), each
    assert scaling_model.comparison_table(found)[-1].endswith("(at most 0.05): pass")
    missed = [found[0]._replace(measured=found[0].predicted + 0.06)]
    assert scaling_model.comparison_table(missed)[-1] == "largest difference 0.060 (at most 0.05): MISSED"


def test_a_run_prints_its_assumptions_and_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "runs" / "model.json"
    arguments = ["--seqlen", "16384", "--gpus", "2,16,64", "--backward", "500", "--output", str(output)]
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps(MEASURED | COPIES))
    assert scaling_model.main([*arguments, "--measured", str(measured)]) == 0
    printed = capsys.readouterr().out
    assert "predicted: 16384 tokens, batch 1, 32:8 heads of 128, bfloat16, causal" in printed
    for phrase in ("these are predictions", "measured on one NVIDIA H200", "given: 500 TFLOP/s", "300 GB/s among 2",
                   "up to 8 GPUs, by copy engines as measured: 350 GB/s, latency 2 us",
                   "Beside measured.json, measured on 2 x NVIDIA H200"):
        assert phrase in printed
    result = json.loads(output.read_text())
    assert result["links"]["copies"] == COPIES["copies"]
    assert [(each["gpus"], each["mode"]) for each in result["predictions"]] == [
        (2, "ring"), (2, "all_to_all"), (16, "ring"), (16, "all_to_all"), (16, "product"),
        (64, "ring"), (64, "product"),
    ]  # fmt: skip
    first = result["predictions"][0]["forward"]
    assert f"| 2 | {first['efficiency']:.2f} in {scaling_model.milliseconds(first['seconds'])};" in printed
    assert [scaling_model.milliseconds(seconds) for seconds in (0.0012345, 0.12, 12.3456)] == ["1.23", "120", "12346"]
    assert len(result["compared"]) == 2 and len(result["assumptions"]) >= 8
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_a_sequence_that_grows_with_the_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "model.json"
    assert scaling_model.main(["--tokens-per-gpu", "8192", "--gpus", "4,2", "--output", str(output)]) == 0
    assert [each["seqlen"] for each in json.loads(output.read_text())["predictions"]] == [16384] * 2 + [32768] * 3
    assert "8192 tokens a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--heads", "6", "--kv-heads", "4"], "a multiple of --kv-heads"), (["--seqlen", "0"], "sizes above 0"),
    (["--between", "0"], "rates above 0"), (["--full", "--window", "9"], "--window is causal"),
])  # fmt: skip
def test_useless_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        scaling_model.main(arguments)
    assert message in capsys.readouterr().err


def test_a_missing_kernel_is_said(capsys: pytest.CaptureFixture[str]):
    assert scaling_model.main(["--head-dim", "72"]) == 2
    assert "no dense bf16 cell of head_dim 72" in capsys.readouterr().err


def test_a_result_of_cpus_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps(MEASURED | {"device": "CPU"}))
    assert scaling_model.main(["--measured", str(measured)]) == 2
    assert "was measured on CPUs" in capsys.readouterr().err
