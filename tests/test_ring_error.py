"""The benchmark of errors from 2 ranks to 8: its truth against the oracle, its judgement, and that it sees faults."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from fa3_dist.parallel import ring
from tests import oracle
from tests.test_ring_faults import dkv_travels_in_bf16

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ring_error as benchmark  # noqa: E402

SMALL = [benchmark.scaled(case, 64) for case in benchmark.CASES]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_truth_is_the_oracles(case: benchmark.Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "QUERIES", 50)
    x = benchmark.make_inputs(case, torch.bfloat16, "cpu")
    found = benchmark.textbook(case, x, torch.float64)
    starts = [sum(case.lengths[:i]) for i in range(len(case.lengths))]
    lengths = list(case.lengths)
    expected = oracle.packed_attention_grads(
        x.q, x.k, x.v, x.dout, x.dlse, q_start=starts, q_len=lengths, k_start=starts, k_len=lengths,
        window_left=case.left, window_right=case.right,
    )  # fmt: skip
    for name in benchmark.NAMES:
        torch.testing.assert_close(found[name], getattr(expected, name), rtol=1e-9, atol=1e-11)


def test_a_small_run_has_all_modes_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "error.json"
    status = benchmark.main(["--device", "cpu", "--scale", "64", "--cells", "packed", "--output", str(output)])
    result = json.loads(output.read_text())
    assert status == 0 and result["summary"]["complaints"] == [] and result["device"] == "CPU" and result["commit"]
    assert [cell["name"] for cell in result["cells"]] == ["packed, GQA 32:8, bf16", "packed, GQA 32:8, fp16"]
    for cell in result["cells"]:
        assert len(cell["modes"]) == len(benchmark.MODES) == 11
        assert all(0 < error < 5e-3 for found in cell["modes"].values() for error in found.values())
    assert "ring 4 x all_to_all 2" in capsys.readouterr().out


def cell_of(case: benchmark.Case) -> dict:
    return benchmark.measure(case, "bf16", "cpu")


def test_sums_in_bf16_are_seen():
    """Travelling gradients in 16 bits: the error grows with the ranks, and only a comparison over them tells."""
    causal = SMALL[0]._replace(heads=8, kv_heads=8, head_dim=32)
    with dkv_travels_in_bf16():
        complaints = benchmark.complain([cell_of(causal)])
    assert any("ring 8: dk is off" in complaint or "ring 8: dv is off" in complaint for complaint in complaints)
    assert not any("all_to_all 8:" in complaint for complaint in complaints)


def test_judgement_of_figures():
    good = {name: 1e-3 for name in benchmark.NAMES}
    cell = {"name": "case", "textbook": dict.fromkeys(benchmark.NAMES, 1e-2),
            "modes": {str(mode): dict(good) for mode in benchmark.MODES}}  # fmt: skip
    assert benchmark.complain([cell]) == [] and benchmark.summarise([cell])["largest_growth"] <= 1
    for name, error, count in (("dk", 1.09e-3, 0), ("dk", 1.11e-3, 1), ("out", float("inf"), 2), ("lse", 1.2e-3, 1)):
        changed = copy.deepcopy(cell)
        changed["modes"]["ring 8"][name] = error
        assert len(benchmark.complain([changed])) == count, (name, error)
    large = copy.deepcopy(cell)
    for found in large["modes"].values():
        found["dq"] = 2.1e-2
    assert len(benchmark.complain([large])) == len(benchmark.MODES)


def test_what_is_no_number_is_an_infinite_error():
    exact = {name: torch.ones(3, dtype=torch.float64) for name in benchmark.NAMES}
    found = exact | {"dq": torch.tensor([1.0, float("nan"), 1.0])}
    assert benchmark.errors(found, exact) == dict.fromkeys(benchmark.NAMES, 0.0) | {"dq": float("inf")}


def test_halves_are_put_back():
    shipped = ring.LEAST_HALF
    with pytest.raises(KeyError), benchmark.halves(True):
        assert set(ring.LEAST_HALF.values()) == {0}
        raise KeyError
    assert ring.LEAST_HALF is shipped
