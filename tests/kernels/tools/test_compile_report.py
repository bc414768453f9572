"""The compile report: its audit finds what it is for, and every kernel of the package passes.

In processes of their own: kernels compile only where TRITON_INTERPRET was not set at the first import of triton.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from kernels.tools import compile_products as products
from kernels.tools import compile_report as report
from kernels.tools.compile_products import Compiled
from tests.kernels.backend import COPIES, OPS

ROOT = Path(__file__).parents[3]

CONTROLS = """
import json
import triton
import triton.language as tl
from dataclasses import asdict, replace
from kernels.tools import compile_report
from kernels.triton import experts, linear
from kernels.triton.launch import CompileSpec

@triton.jit
def total(x, y, n, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0)
    if ATOMIC:
        tl.atomic_add(y, s)
    else:
        tl.store(y + tl.program_id(0), s)

@triton.jit
def product(x, y, n, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    r, c = tl.arange(0, BLOCK), tl.arange(0, 64)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in tl.range(0, n, 64, num_stages=STAGES):
        a = tl.load(x + r[:, None] * n + k + c[None, :])
        b = tl.load(x + (k + c)[:, None] * n + r[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(y + r[:, None] * BLOCK + r[None, :], acc)

@triton.jit
def broken(x, y, n):
    tl.store(y, tl.load(x) + no_such_name)

signature = {"x": "*fp32", "y": "*fp32", "n": "i32"}

def spec(name, fn, constants, stages=1):
    return CompileSpec(name, fn, signature, constants, ("x", "y", "n"), 4, stages)

results = compile_report.report([
    spec("store", total, {"ATOMIC": False, "BLOCK": 256}),
    spec("atomic", total, {"ATOMIC": True, "BLOCK": 256}),
    spec("linear forward: fp32", product, {"PRECISION": "ieee", "BLOCK": 32, "STAGES": 1}),
    spec("linear input gradient: fp32", product, {"PRECISION": "tf32", "BLOCK": 64, "STAGES": 1}),
    spec("broken", broken, {}),
])
*nvidia, amd = compile_report.TARGETS
for stages, targets in ((12, nvidia), (4, [amd])):  # as many buffers as are too many, and no more: it takes long
    tile = {"PRECISION": "ieee" if targets == [amd] else "tf32", "BLOCK": 64, "STAGES": stages}
    results += compile_report.report([spec("linear weight gradient: fp32", product, tile, stages)], targets)

# One form over another tile than the other kernels of its product: a matrix instruction, a chain of another length.
known = {spec.name: spec for spec in [*linear.specs(), *experts.specs()]}
for whole, form, size in (
    ("linear forward: bf16 x bf16 -> bf16", "expert_linear gather forward: bf16", {"M": 16}),
    ("linear forward: fp32 x fp32 -> fp32", "expert_linear grouped forward: fp32", {"K": 16}),
):
    other = replace(known[form], constexprs=known[form].constexprs | size)
    results += compile_report.report([known[whole], other], nvidia[1:2])
print("RESULTS", json.dumps([asdict(result) for result in results]))
"""


def run(*command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT)} | extra
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_controls(tmp_path: Path) -> None:
    """An atomic add, a tf32 product, more shared memory than there is and a kernel that does not compile are found on
    every target; a plain sum and a plain fp32 product pass on every one. A form of a product over another tile is
    found, the product itself passes."""
    path = tmp_path / "controls.py"  # Triton reads a kernel's source from its file
    path.write_text(CONTROLS)
    done = run(str(path))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))
    problems = {(found["kernel"], found["target"]): found["problems"] for found in json.loads(line[8:])}
    for target in (target.name for target in report.TARGETS):
        assert problems["store", target] == problems["linear forward: fp32", target] == []
        assert [text.split(":")[0] for text in problems["atomic", target]] == ["atomic on global memory"]
        tf32 = " ".join(problems["linear input gradient: fp32", target])
        assert tf32.startswith("tf32 product: ") and "an fp32 product by " in tf32
        assert any("bytes of shared memory" in text for text in problems["linear weight gradient: fp32", target])
        assert problems["broken", target][0].startswith("does not compile: CompilationError")
    assert problems["linear forward: bf16 x bf16 -> bf16", "sm_90"] == []
    assert problems["linear forward: fp32 x fp32 -> fp32", "sm_90"] == []
    instruction, tile = problems["expert_linear gather forward: bf16", "sm_90"]
    assert "mma.sync.aligned.m16n8k16" in instruction and "wgmma.mma_async.sync.aligned.m64n64k16" in instruction
    assert "16.64.64.4.3" in tile and "64.64.64.4.3" in tile
    instruction, tile = problems["expert_linear grouped forward: fp32", "sm_90"]
    assert "chains of 16" in instruction and "chains of 32" in instruction


@pytest.mark.slow
def test_every_kernel_passes(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = run("-m", "kernels.tools.compile_report", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    kernels = {found["kernel"] for found in results}
    assert len(results) == len(kernels) * len(report.TARGETS)
    assert all(found["registers"] > 0 and not found["problems"] for found in results)
    names = {found["product"] for found in results if found["product"]}
    assert len(names) == 30 and all(bool(found["product"]) == bool(found["products"]) for found in results)
    for product in names:  # also where a kernel that computes it was forgotten, one instruction a target
        for target in report.TARGETS:
            mine = [f for f in results if f["product"] == product and f["target"] == target.name]
            assert len({(tuple(f["products"]), f["tile"]) for f in mine}) == 1
            assert target.platform != "cuda" or "fp32" not in product or "chains of" in mine[0]["products"][-1]
    for op in set(OPS) - COPIES - {"scale"}:  # scale: a product of torch's, and dot
        assert any(kernel.startswith(op) for kernel in kernels), f"no kernel of {op} in the report: {sorted(kernels)}"


@pytest.mark.parametrize("problems", [(), ("atomic on global memory: atom.global.add.f32",)])
def test_exit_status(
    problems: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One kernel that fails on one target fails the whole."""
    fine = Compiled("linear", "sm_90", 96, 0, 49152, 128, 2.1, ())
    found = [fine, dataclasses.replace(fine, target="gfx942", problems=problems)]
    monkeypatch.setattr(report, "report", lambda specs: found)
    monkeypatch.setattr(sys, "argv", ["compile_report"])
    with pytest.raises(SystemExit) if problems else nullcontext() as ended:
        report.main()
    assert ended is None or ended.value.code == 1
    said = capsys.readouterr().out
    assert ("FAIL linear on gfx942: atomic on global memory" in said) == bool(problems)
    assert f"{len(problems)} failed" in said


def test_refuses_the_interpreter() -> None:
    done = run("-m", "kernels.tools.compile_report", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


NVIDIA, AMD = report.TARGETS[1], report.TARGETS[-1]


@pytest.mark.parametrize(
    ("target", "instruction", "found"),
    [
        (NVIDIA, "@%p1 atom.global.gpu.acq_rel.add.f32 %r1, [%rd1], %r2;", True),
        (NVIDIA, "atom.add.f32 %r1, [%rd1], %r2;", True),  # a generic address may be global
        (NVIDIA, "red.global.add.f32 [%rd1], %r2;", True),
        (NVIDIA, "red.async.relaxed.cluster.global.add.u32 [%rd1], %r2;", True),
        (NVIDIA, "multimem.red.release.sys.global.add.v4.f32 [%rd1], {%r1, %r2};", True),
        (NVIDIA, "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r2], 16;", True),
        (NVIDIA, "atom.shared.add.u32 %r1, [%r2], %r3;", False),
        (NVIDIA, "redux.sync.add.s32 %r1, %r2, 0xffffffff;", False),  # within a warp, integers
        (NVIDIA, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};", True),
        (NVIDIA, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};", False),
        (AMD, "global_atomic_add_f32 v0, v1, s[2:3]", True),
        (AMD, "buffer_atomic_pk_add_bf16 v0, v1, s[0:3], 0 offen", True),
        (AMD, "flat_atomic_cmpswap v0, v[1:2], v[3:4] glc", True),
        (AMD, "ds_add_f32 v0, v1", False),
        (AMD, "v_mfma_f32_32x32x4_xf32 a[0:15], v[0:1], v[2:3], a[0:15]", True),
        (AMD, "v_mfma_f32_32x32x2f32 a[0:15], v0, v1, a[0:15]", False),
    ],
)
def test_audit_of_instructions(target: report.Target, instruction: str, found: bool) -> None:
    assert bool(report.audit_code(f"\t{instruction}\n", target)) == found


SM_90 = ("sm_90", 64, 0, 0, 128, 1.0, ())
CHAIN = "fma.rn.f32, chains of 16"
COUNTS = "mma.sync.m16n8k16.f32.bf16.bf16.f32"


def test_audit_of_products() -> None:
    """Other instructions, or another tile, of one kernel of a product are found, on its target alone."""
    of = "rows x weights, forward: bf16"
    one = Compiled("linear forward: bf16 x bf16 -> bf16", *SM_90, "64.64.64.4.3", of, ("wgmma.k16",))
    other = dataclasses.replace(one, kernel="expert_linear gather forward: bf16")
    results = [one, other, dataclasses.replace(one, target="sm_80", products=("mma.k8",))]
    results.append(dataclasses.replace(one, kernel="swiglu: bf16", tile="16.128.1.4.1", product="", products=()))
    assert products.audit_products(results) == results
    for change, told in (({"products": ("wgmma.k8",)}, ("wgmma.k8", "wgmma.k16")), ({"tile": "1.2"}, ("1.2", "64.64"))):
        results[1] = dataclasses.replace(other, **change)  # type: ignore[arg-type]
        found = products.audit_products(results)
        (problem,) = found[1].problems
        assert "linear forward: bf16" in problem and all(text in problem for text in told)
        assert not any(result.problems for result in (found[0], *found[2:]))


@pytest.mark.parametrize(
    ("product", "found", "platform", "problem"),
    [
        ("rows x weights, forward: bf16", ["wgmma.mma_async.k16"], "cuda", ""),
        ("rows x weights, forward: bf16", [], "cuda", "a bf16 product, but"),
        ("rows x weights, forward: bf16", ["wgmma.mma_async.k16", CHAIN], "cuda", "a bf16 product"),
        ("rows x weights, forward: fp32", [CHAIN], "cuda", ""),
        ("rows x weights, forward: fp32", [], "cuda", "without a chain"),
        ("rows x weights, input gradient: fp32 x bf16", ["mma.sync.m16n8k16", CHAIN], "cuda", "by mma"),
        ("rows x weights, forward: fp32", ["v_mfma_f32_16x16x4_f32"], "hip", ""),
        ("rows x weights, forward: fp32", ["v_mfma_f32_32x32x4_xf32"], "hip", "by v_mfma_f32_32x32x4_xf32"),
        ("rows x weights, forward: fp32", ["v_mfma_f32_32x32x8_bf16"], "hip", "by v_mfma_f32_32x32x8_bf16"),
        ("attention, 4/2 heads of 32: fp32", [COUNTS, CHAIN], "cuda", ""),
        ("attention, 4/2 heads of 32: fp32", ["mma.sync.m16n8k8.f32.tf32.tf32.f32", CHAIN], "cuda", "by"),
        ("", [CHAIN], "cuda", "its source has a matrix product, its name none"),
    ],
)  # fmt: skip
def test_audit_of_a_products_instructions(product: str, found: list[str], platform: str, problem: str) -> None:
    said = products.audit_kernel(product, found, True, platform)
    assert bool(said) == bool(problem) and problem in " ".join(said)


def test_names_of_products() -> None:
    """Kernels that may get rows of one product have one name, other directions and types another."""
    forward = ("linear forward: bf16 x bf16 -> bf16", "linear forward: bf16 x bf16 -> fp32")
    forms = ("expert_linear gather forward: bf16", "expert_linear grouped forward: bf16")
    assert {products.product_of(name) for name in (*forward, *forms)} == {"rows x weights, forward: bf16"}
    assert (
        products.product_of("linear input gradient: fp32 x bf16 -> bf16")
        == "rows x weights, input gradient: fp32 x bf16"
    )
    windows = [f"attention gradient dq, 32/8 heads of 128, {where}: fp32" for where in ("window 512", "global")]
    assert {products.product_of(name) for name in windows} == {"attention gradient dq, 32/8 heads of 128: fp32"}
    for name in ("swiglu: bf16", "gelu: fp32", "attention pages, 2 heads of 32: fp32", "embedding_sum, u8 codes: fp32"):
        assert products.product_of(name) == ""


LOOP = """
    mov.b32 %r9, 0f00000000;
$L:
    fma.rn.f32 %r1, %r20, %r21, %r9;
    fma.rn.f32 %r2, %r22, %r23, %r1;
    {end}
    @%p1 bra $L;
"""


@pytest.mark.parametrize(
    ("end", "lengths"),
    [
        ("fma.rn.f32 %r9, %r24, %r25, %r2;", [3]),  # the loop goes on in the register that it began with
        ("mov.b32 %r9, %r2;", [2]),
        ("mul.rn.f32 %r3, %r24, %r25;\nadd.rn.f32 %r9, %r3, %r2;", [2]),
        ("fma.rn.ftz.f32 %r9, %r24, %r25, %r2;", [2]),  # exp's
        ("fma.rn.f32 %r9, %r24, %r2, %r25;", [1, 2]),  # a factor is no sum: another chain
        (
            "mov.b64 %rd1, {%r2, %r30};\nfma.rn.f32x2 %rd2, %rd3, %rd4, %rd1;\nmov.b64 {%r4, %r5}, %rd2;\n"
            "fma.rn.f32 %r9, %r24, %r25, %r4;\nfma.rn.f32 %r6, %r24, %r25, %r5;",
            [4],
        ),
    ],
)
def test_lengths_of_chains(end: str, lengths: list[int]) -> None:
    assert products.chains(LOOP.replace("{end}", end)) == lengths


def test_audit_of_sizes() -> None:
    assert report.audit_size(255, report.SPILL_BYTES, NVIDIA.shared_bytes, 256, NVIDIA) == []
    assert "257 bytes spilled" in report.audit_size(255, 257, 0, 256, NVIDIA)[0]
    assert "bytes of shared memory" in report.audit_size(1, 0, NVIDIA.shared_bytes + 1, 256, NVIDIA)[0]
    assert "255 registers a thread, 512 threads" in report.audit_size(255, 0, 0, 512, NVIDIA)[0]
    assert "513 registers" in report.audit_size(513, 0, 0, 64, AMD)[0]
