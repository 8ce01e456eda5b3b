"""The build chain: rows, hashes, reports, the machine-code check, doctor, and the compiled delta kernel on a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import build_library as builder
import machine_code
import pytest
import torch
from torch import Tensor

from fa3_dist import __main__ as cli
from fa3_dist import __version__, _build, ops

needs_library = pytest.mark.skipif(not _build.LIBRARY.is_file(), reason="no compiled library: make kernels")


# ---- rows and hash ---------------------------------------------------------------------------------------------------


def write_csrc(folder: Path, rows: str) -> Path:
    """A source tree with one kernel header and the given rows."""
    (folder / "forward").mkdir(parents=True)
    (folder / "forward" / "forward.cuh").write_text("// kernel\n")
    (folder / "instances.def").write_text(rows)
    return folder


def test_rows_are_parsed_in_order(tmp_path: Path) -> None:
    lines = ["// FA3_X(no, row)", "FA3_FORWARD(matrix, bf16, 128)", "#define FA3_Y(a, b)", "FA3_QUANTIZE(memory, e4m3)"]
    csrc = write_csrc(tmp_path, "\n".join(lines))
    rows = _build.instances(csrc)
    assert [(row.name, row.kind) for row in rows] == [("forward_bf16_128", "matrix"), ("quantize_e4m3", "memory")]


def test_a_row_listed_twice_is_an_error(tmp_path: Path) -> None:
    csrc = write_csrc(tmp_path, "FA3_DELTA(memory, bf16)\nFA3_DELTA(matrix, bf16)\n")
    with pytest.raises(ValueError, match="delta_bf16 more than once"):
        _build.instances(csrc)


def test_hash_follows_sources_and_nothing_else(tmp_path: Path) -> None:
    csrc = write_csrc(tmp_path / "csrc", "FA3_DELTA(memory, bf16)\n")
    first = _build.csrc_hash(csrc)
    (csrc / "tool.py").write_text("print()\n")
    assert _build.csrc_hash(csrc) == first
    kernel = csrc / "forward" / "forward.cuh"
    kernel.write_text("// kernel!\n")
    second = _build.csrc_hash(csrc)
    kernel.rename(csrc / "forward" / "other.cuh")
    assert len({first, second, _build.csrc_hash(csrc)}) == 3
    assert _build.csrc_hash(tmp_path / "nothing") is None


def test_selection_of_rows() -> None:
    rows = [_build.parse_row(f"FA3_{text})") for text in ("A(memory, bf16", "A(memory, fp16", "B(matrix, bf16, 64")]
    names = [row.name for row in rows if row]
    assert [row.name for row in builder.select_rows(rows, "")] == names
    assert [row.name for row in builder.select_rows(rows, "one-per-family")] == ["a_bf16", "b_bf16_64"]
    assert [row.name for row in builder.select_rows(rows, "b_*, *fp16")] == ["a_fp16", "b_bf16_64"]
    control = _build.parse_row("FA3_C(control, all)")
    assert [row.name for row in builder.select_rows([*rows, control], "a_bf16")] == ["a_bf16", "c_all"]
    with pytest.raises(ValueError, match="'c_bf16' matches no row.*a_bf16, a_fp16, b_bf16_64"):
        builder.select_rows(rows, "a_bf16,c_bf16")


def test_generated_list_holds_the_selected_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "BUILD", tmp_path)
    rows = builder.select_rows(_build.instances(), "delta_fp16")
    builder.generate(rows, {"version": 'with "quotes" and \\'})
    assert [row.name for row in _build.instances(tmp_path / "generated")] == ["schedule_ranges", "delta_fp16"]
    assert "#undef FA3_DELTA" in (tmp_path / "generated" / "instances.def").read_text()
    unit = tmp_path / "generated" / "delta_fp16.cu"
    assert unit.read_text() == '#include "backward/delta.cuh"\n\nFA3_INSTANTIATE(fp16)\n'
    before = unit.stat().st_mtime_ns
    builder.generate(rows, {"version": "2"})
    assert unit.stat().st_mtime_ns == before, "an unchanged file was written again: everything would be rebuilt"


def test_kernels_without_cutlass_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csrc = write_csrc(tmp_path, "FA3_FORWARD(matrix, bf16)\n")
    monkeypatch.setattr(builder, "CSRC", csrc)
    monkeypatch.setattr(builder, "ROOT", tmp_path)

    class NoCutlass:
        cutlass = None

    builder.check_cutlass(_build.instances(csrc), NoCutlass)
    (csrc / "forward" / "forward.cuh").write_text("#include <cute/tensor.hpp>\n")
    with pytest.raises(builder.MissingTool, match="nvidia-cutlass"):
        builder.check_cutlass(_build.instances(csrc), NoCutlass)


# ---- report and machine code -----------------------------------------------------------------------------------------

PTXAS_LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_90a'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compile time = 36.557 ms
ptxas info    : Compiling entry function '_Z5spillv' for 'sm_90a'
ptxas info    : Function properties for _Z5spillv
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 24 bytes cumulative stack size
"""


def test_ptxas_report() -> None:
    assert builder.parse_ptxas(PTXAS_LOG) == [
        {"symbol": "_Z4goodv", "stack": 0, "spill_stores": 0, "spill_loads": 0, "registers": 40, "shared": 512},
        {"symbol": "_Z5spillv", "stack": 24, "spill_stores": 20, "spill_loads": 16, "registers": 168, "shared": 0},
    ]


def sass(symbol: str, *instructions: str) -> str:
    """A function as cuobjdump prints it."""
    body = "".join(
        f"        /*{16 * line:04x}*/                   {text} ;      /* 0x000000fffff67984 */\n"
        "                                                      /* 0x000fe200000003f0 */\n"
        for line, text in enumerate(instructions)
    )
    return f"\n\tcode for sm_90a\n\t\tFunction : {symbol}\n\t.headerflags    @\"EF_CUDA_SM90\"\n{body}\t\t..........\n"


def problems(kind: str, *instructions: str, name: str = "kernel", spill: int = 0) -> list[str]:
    """What the check says of a build of one row with one kernel."""
    kernel = {"variant": "v", "kind": kind, "kernel": name, "symbol": "_Zk", "spill_stores": spill, "spill_loads": 0}
    text = "Fatbin elf code:\n" + sass("_Zother", "EXIT") + sass("_Zk", *instructions)
    return machine_code.check({"variants": ["v"], "kernels": [kernel]}, {"v": machine_code.parse_sass(text)})


LOAD = "LDG.E.128 R4, desc[UR18][R4.64]"
BULK = "@P0 UTMALDG.4D [UR8], [UR4], desc[UR6]"
HGMMA = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24"
QGMMA = "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXP2 = "MUFU.EX2 R2, R2"
SOFTMAX = [WAIT, EXP2, WAIT]  # while a product runs


def test_sass_is_parsed_by_function() -> None:
    parsed = machine_code.parse_sass(sass("_Za", LOAD, "@!P1 BRA 0xd90") + sass("_Zb", BULK))
    load, branch = machine_code.Instruction(0, "LDG.E.128"), machine_code.Instruction(16, "BRA", 0xD90)
    assert parsed == {"_Za": [load, branch], "_Zb": [machine_code.Instruction(0, "UTMALDG.4D")]}


@pytest.mark.parametrize(
    ("kind", "instructions"),
    [
        ("memory", [LOAD]),
        ("control", ["IADD3 R2, R2, R3, RZ"]),
        ("matrix", [BULK, HGMMA, *SOFTMAX, "@P0 BRA 0x10"]),
        ("matrix8", [BULK, QGMMA, *SOFTMAX, "@P0 BRA 0x10"]),
        ("halves", [BULK, HGMMA, WAIT, EXP2, WAIT, EXP2, "@P0 BRA 0x10"]),
        ("matrix", [BULK, "STL [R1], R2", HGMMA, *SOFTMAX, "@P0 BRA 0x20", "LDL R2, [R1]", "@P1 BRA 0x0"]),  # outside
    ],
)
def test_a_good_kernel_passes(kind: str, instructions: list[str]) -> None:
    assert problems(kind, *instructions) == []


@pytest.mark.parametrize(
    ("kind", "instructions", "expected"),
    [
        ("memory", ["LDG.E.64 R4, desc[UR18][R4.64]", "LDG.E R4, R5"], "has no LDG.E.128"),
        ("memory", [], "has no LDG.E.128"),
        ("matrix", [BULK, "HMMA.16816.F32.BF16 R4, R8, R12, R4"], "has no HGMMA"),
        ("matrix", [HGMMA, LOAD, *SOFTMAX, "@P0 BRA 0x0"], "has no UTMALDG"),
        ("matrix", [BULK, HGMMA, WAIT, WAIT, EXP2, "@P0 BRA 0x10"], "do not overlap"),
        ("matrix", [BULK, HGMMA, WAIT, EXP2, HGMMA, WAIT, "@P0 BRA 0x10"], "do not overlap"),
        ("matrix", [BULK, HGMMA, WAIT, EXP2, WAIT, EXP2, "@P0 BRA 0x10"], "do not overlap"),
        ("halves", [BULK, HGMMA, WAIT, EXP2, WAIT, EXP2, EXP2, "@P0 BRA 0x10"], "do not overlap"),
        ("matrix", [BULK, HGMMA, WAIT, "@P0 BRA 0x10"], "do not overlap"),
        ("matrix", [BULK, HGMMA], "in no loop"),
        ("matrix8", [BULK, HGMMA], "has no QGMMA"),
        ("tensor", [BULK, HGMMA], "the kind 'tensor'"),
    ],
)
def test_a_missing_instruction_fails(kind: str, instructions: list[str], expected: str) -> None:
    (problem,) = problems(kind, *instructions)
    assert expected in problem and problem.startswith("v: kernel")


def test_a_spill_fails() -> None:
    (problem,) = problems("memory", LOAD, spill=4)
    assert "spills registers (4 bytes stored" in problem
    assert "spills registers" in problems("control", LOAD, spill=4)[0]


@pytest.mark.parametrize("spill", ["STL.64 [R1+0x8], R2", "@P1 LDL.LU R2, [R1]"])
def test_a_spill_in_a_main_loop_fails(spill: str) -> None:
    (problem,) = problems("matrix", BULK, HGMMA, spill, *SOFTMAX, "@P0 BRA 0x10", "@P1 BRA 0x0", spill=8)
    assert "spills registers in a main loop (1 instructions, the first at 0x20)" in problem


def test_strided_kernels_are_exempt_but_do_not_stand_alone() -> None:
    assert problems("memory", "LDG.E R4, R5", name="delta_strided_kernel<float>") == ["v: has no kernel to check"]
    report = {"variants": ["v"], "kernels": []}
    assert machine_code.check(report, {"v": {}}) == ["v: has no kernel to check"]


def test_a_kernel_without_machine_code_fails() -> None:
    kernel = {"variant": "v", "kind": "memory", "kernel": "k", "symbol": "_Zk", "spill_stores": 0, "spill_loads": 0}
    (problem,) = machine_code.check({"variants": ["v"], "kernels": [kernel]}, {"v": {}})
    assert "not in the object file" in problem


# ---- the built library -----------------------------------------------------------------------------------------------


@needs_library
def test_library_loads_and_tells_what_it_is() -> None:
    info = ops.library_info()
    assert info is not None, f"{_build.LIBRARY} does not load under torch {torch.__version__}"
    assert set(info) >= {"version", "variants", "csrc_hash", "nvcc", "cutlass"}
    assert info["version"] == __version__
    assert info["variants"] and set(info["variants"]) <= {row.name for row in _build.instances()}
    assert info["csrc_hash"] == _build.csrc_hash(), "the library is not built from these sources: make kernels"
    assert all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"fa3_dist::{op}_sm90", "CUDA") for op in ops.COMPILED
    )


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_library_needs_no_libpython_no_cuda_and_holds_the_weak_stream() -> None:
    dynamic = subprocess.run(["readelf", "-d", _build.LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert not [name for name in needed if name.startswith(("libpython", "libcuda", "libtorch_python", "libc10_cuda"))]
    # NOTE: without libtorch.so among them the weak symbol would stay NULL on a CUDA torch.
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)
    symbols = subprocess.run(["readelf", "-sW", _build.LIBRARY], capture_output=True, text=True, check=True).stdout
    (stream,) = {tuple(line.split()[4:7]) for line in symbols.splitlines() if "current_cuda_stream" in line}
    assert stream[0] == "WEAK" and stream[2] == "UND"


# ---- doctor ----------------------------------------------------------------------------------------------------------


def findings(**changes: object) -> dict:
    """Findings of a machine where nothing is missing, with changes; `library` is merged."""
    info = {"version": "1", "variants": ["delta_bf16"], "csrc_hash": "a", "nvcc": "13", "cutlass": None}
    library = {
        "path": "lib.so", "exists": True, "loaded": True, "info": info, "csrc_hash": "a", "matches_csrc": True,
        "missing_variants": [],
    }
    good = {
        "fa3_dist": "1", "python": "3", "torch": "2", "torch_cuda": "13.0", "nccl": "2.28",
        "gpus": [{"name": "H200", "capability": [9, 0], "memory": 2**37, "sms": 132}] * 2,
        "library": {**library, **changes.pop("library", {})}, "packages": {"tqdm": "1"},
    }  # fmt: skip
    return {**good, **changes}


def test_doctor_has_nothing_to_say_where_nothing_is_missing() -> None:
    assert cli.advise(findings()) == []
    text = cli.render(findings())
    assert "Nothing is missing." in text and "delta        bf16" in text and "H200, capability 9.0" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"torch_cuda": None, "gpus": []}, "CPU build"),
        ({"gpus": []}, "CUDA_VISIBLE_DEVICES"),
        ({"gpus": [{"name": "A100", "capability": [8, 0], "memory": 1, "sms": 108}]}, "A100: not Hopper"),
        ({"nccl": None}, "no NCCL"),
        ({"library": {"exists": False, "loaded": False, "info": None}}, "no compiled kernels: `make kernels`"),
        ({"library": {"loaded": False, "info": None}}, "does not load"),
        ({"library": {"matches_csrc": False}}, "older or newer than csrc/"),
        ({"library": {"missing_variants": ["forward_bf16"]}}, "built without forward_bf16"),
        ({"packages": {"tqdm": None}}, "pip install tqdm"),
    ],
)
def test_doctor_says_what_to_do(changes: dict, expected: str) -> None:
    found = findings(**changes)
    (advice,) = cli.advise(found)
    assert expected in advice and advice in cli.render(found)


def test_doctor_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and str(_build.LIBRARY) in text
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__ and found["library"]["csrc_hash"] == _build.csrc_hash()
    assert len(found["gpus"]) == torch.cuda.device_count()


# ---- the delta kernel ------------------------------------------------------------------------------------------------


def delta_fp64(dout: Tensor, out: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """delta in fp64 from the same rounded inputs, and the sum of its terms' magnitudes, both (..., H, S)."""
    terms = dout.double() * out.double()
    expected, size = terms.sum(-1).transpose(-1, -2), terms.abs().sum(-1).transpose(-1, -2)
    if dlse is not None:
        expected, size = expected - dlse.double(), size + dlse.double().abs()
    return expected, size


def assert_delta(delta: Tensor, dout: Tensor, out: Tensor, dlse: Tensor | None = None) -> None:
    """fp32 summation of at most 512 products: a few roundings of the terms' magnitudes."""
    expected, size = delta_fp64(dout, out, dlse)
    assert delta.dtype == torch.float32 and delta.shape == expected.shape and delta.is_contiguous()
    error = (delta.double() - expected).abs()
    assert bool((error <= 1e-6 * size).all()), f"off by {(error / size.clamp_min(1e-30)).max().item():.1e} of the terms"


def needs_kernel(*dtypes: str) -> None:
    """Skips where the library, the GPU or the rows for dout's dtypes are missing."""
    info = ops.library_info()
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    missing = [name for name in dtypes if info is None or f"delta_{name}" not in info["variants"]]
    if missing:
        pytest.skip(f"the library has no delta kernel for {', '.join(missing)}: make kernels")


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {
    "contiguous": lambda x: x,
    "heads_first": lambda x: x.transpose(-2, -3).contiguous().transpose(-2, -3),
    "strided_head_dim": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "padded": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]],
    "misaligned": lambda x: torch.cat([torch.full_like(x[..., :1], torch.nan), x], -1)[..., 1:],
}


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [1, 8, 40, 64, 72, 96, 100, 128, 192, 256, 512])
@pytest.mark.parametrize("dtypes", ["bf16/bf16", "fp16/fp16", "fp32/fp32", "bf16/fp32", "fp32/bf16", "fp16/bf16"])
def test_delta_against_fp64(head_dim: int, dtypes: str) -> None:
    dout_dtype, out_dtype = dtypes.split("/")
    needs_kernel(dout_dtype)
    for batch, seqlen, heads in [(2, 333, 8), (1, 1, 1), (3, 17, 7), (1, 129, 12), (2, 128, 16)]:
        dout = torch.randn(batch, seqlen, heads, head_dim, device="cuda").to(DTYPES[dout_dtype])
        out = torch.randn(batch, seqlen, heads, head_dim, device="cuda").to(DTYPES[out_dtype])
        assert_delta(ops.delta(dout, out), dout, out)
        assert_delta(torch.ops.fa3_dist.delta_sm90(dout[0], out[0], None), dout[0], out[0])


@pytest.mark.gpu
@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("dout_layout", LAYOUTS)
def test_delta_takes_any_strides(dout_layout: str, out_layout: str) -> None:
    needs_kernel("bf16")
    dout = LAYOUTS[dout_layout](torch.randn(2, 77, 6, 64, device="cuda").bfloat16())
    out = LAYOUTS[out_layout](torch.randn(2, 77, 6, 64, device="cuda").bfloat16())
    dlse = torch.randn(77, 2, 6, device="cuda").permute(1, 2, 0)
    assert_delta(torch.ops.fa3_dist.delta_sm90(dout, out, dlse), dout, out, dlse)
    packed = dlse[0]
    assert_delta(torch.ops.fa3_dist.delta_sm90(dout[0], out[0], packed), dout[0], out[0], packed)
    expanded = dout[:1].expand(2, -1, -1, -1)
    dlse = dlse[:1].expand(2, -1, -1)
    assert_delta(torch.ops.fa3_dist.delta_sm90(expanded, out, dlse), expanded, out, dlse)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 300, 16, 128), (1, 5, 3, 64), (2, 333, 8, 100)])
def test_delta_writes_all_of_its_result_and_exact_zeros(shape: tuple[int, int, int, int]) -> None:
    needs_kernel("bf16")
    batch, seqlen, heads, _ = shape
    dout, out = torch.randn(2, *shape, device="cuda").bfloat16().unbind()
    dlse = torch.randn(batch, heads, seqlen, device="cuda")
    dout[:, ::3] = 0
    torch.cuda.empty_cache()
    poison = torch.full((batch, heads, seqlen), torch.nan, device="cuda")
    address = poison.data_ptr()
    del poison
    delta = torch.ops.fa3_dist.delta_sm90(dout, out, dlse)
    assert delta.data_ptr() == address, "the allocator gave other memory: this test proves nothing"
    assert_delta(delta, dout, out, dlse)
    assert torch.equal(delta[:, :, ::3], -dlse[:, :, ::3])
    without = torch.ops.fa3_dist.delta_sm90(dout, out, None)
    assert torch.equal(without[:, :, ::3], torch.zeros_like(without[:, :, ::3]))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 5, 4, 64), (2, 0, 4, 64), (2, 5, 0, 64), (2, 5, 4, 0), (0, 4, 64), (5, 4, 0)])
def test_delta_of_nothing(shape: tuple[int, ...]) -> None:
    needs_kernel("bf16")
    dout = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    delta = torch.ops.fa3_dist.delta_sm90(dout, dout, None)
    assert torch.equal(delta, torch.zeros(*shape[:-3], shape[-2], shape[-3], device="cuda"))


@pytest.mark.gpu
def test_delta_addresses_more_than_two_to_the_31_elements() -> None:
    needs_kernel("bf16")
    seqlen, heads, head_dim = 2**31 // (16 * 128) + 4096, 16, 128
    dout = torch.ones(1, seqlen, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    assert dout.numel() > 2**31
    dout[:, -4096:] = torch.randn(1, 4096, heads, head_dim, device="cuda").bfloat16()
    delta = torch.ops.fa3_dist.delta_sm90(dout, dout, None)
    assert_delta(delta[:, :, -4096:].contiguous(), dout[:, -4096:], dout[:, -4096:])
    assert bool((delta[:, :, :-4096] == head_dim).all())


@pytest.mark.gpu
def test_delta_runs_on_the_current_stream() -> None:
    needs_kernel("bf16")
    source = torch.randn(1, 512, 4, 64, device="cuda").bfloat16()
    dout, out = torch.zeros_like(source), source.clone()
    ops.delta(dout, out)  # so that nothing is loaded, which would wait for the device, inside the stream below
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        dout.copy_(source)
        delta = torch.ops.fa3_dist.delta_sm90(dout, out, None)
    torch.cuda.synchronize()
    assert_delta(delta, source, out)


@pytest.mark.multi_gpu
def test_delta_runs_on_its_tensors_device() -> None:
    needs_kernel("bf16")
    dout = torch.randn(1, 100, 4, 64, device="cuda:1").bfloat16()
    assert_delta(torch.ops.fa3_dist.delta_sm90(dout, dout, None), dout, dout)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x, y, z: (x[0, 0], y[0, 0], None), "dout must have shape"),
        (lambda x, y, z: (x, y[:, :-1], None), "out must have dout's shape"),
        (lambda x, y, z: (x.double(), y, None), "no kernel for dout's dtype"),
        (lambda x, y, z: (x, y.double(), None), "out must be bfloat16, float16 or float32"),
        (lambda x, y, z: (x, y, z.transpose(1, 2)), "dlse must have the result's shape"),
        (lambda x, y, z: (x, y, z.double()), "dlse must be float32"),
        (lambda x, y, z: (x, y, z.cpu()), "dlse must be on dout's device"),
        (lambda x, y, z: (x, y.cpu(), None), "same CUDA device"),
    ],
)
def test_the_binding_refuses_wrong_tensors(change, expected: str) -> None:
    needs_kernel("bf16")
    x = torch.randn(2, 5, 3, 64, device="cuda").bfloat16()
    with pytest.raises(RuntimeError, match=expected):
        torch.ops.fa3_dist.delta_sm90(*change(x, x.clone(), torch.randn(2, 3, 5, device="cuda")))
