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

from kernels.tools import compile_report as report
from tests.kernels.backend import OPS

ROOT = Path(__file__).parents[3]

CONTROLS = """
import json
import triton
import triton.language as tl
from dataclasses import asdict
from kernels.tools import compile_report
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
    spec("ieee", product, {"PRECISION": "ieee", "BLOCK": 32, "STAGES": 1}),
    spec("tf32", product, {"PRECISION": "tf32", "BLOCK": 64, "STAGES": 1}),
    spec("broken", broken, {}),
])
*nvidia, amd = compile_report.TARGETS
for stages, targets in ((12, nvidia), (4, [amd])):  # as many buffers as are too many, and no more: it takes long
    tile = {"PRECISION": "ieee" if targets == [amd] else "tf32", "BLOCK": 64, "STAGES": stages}
    results += compile_report.report([spec("shared", product, tile, stages)], targets)
print("RESULTS", json.dumps([asdict(result) for result in results]))
"""


def run(*command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT)} | extra
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_controls(tmp_path: Path) -> None:
    """An atomic add, a tf32 product, more shared memory than there is and a kernel that does not compile are found on
    every target; a plain sum and a plain fp32 product pass on every one."""
    path = tmp_path / "controls.py"  # Triton reads a kernel's source from its file
    path.write_text(CONTROLS)
    done = run(str(path))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS "))
    problems = {(found["kernel"], found["target"]): found["problems"] for found in json.loads(line[8:])}
    for target in (target.name for target in report.TARGETS):
        assert problems["store", target] == problems["ieee", target] == []
        assert [text.split(":")[0] for text in problems["atomic", target]] == ["atomic on global memory"]
        assert [text.split(":")[0] for text in problems["tf32", target]] == ["tf32 product"]
        assert any("bytes of shared memory" in text for text in problems["shared", target])
        assert problems["broken", target][0].startswith("does not compile: CompilationError")


@pytest.mark.slow
def test_every_kernel_passes(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = run("-m", "kernels.tools.compile_report", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    kernels = {found["kernel"] for found in results}
    assert len(results) == len(kernels) * len(report.TARGETS)
    assert all(found["registers"] > 0 and not found["problems"] for found in results)
    products = [f for f in results if f["kernel"].startswith("expert_linear") and f["kernel"].endswith("bf16")]
    assert products and all(found["products"] for found in products)
    for op in set(OPS) - {"pack_linear", "pack_experts", "repack", "scale"}:  # scale: a product of torch's, and dot
        assert any(kernel.startswith(op) for kernel in kernels), f"no kernel of {op} in the report: {sorted(kernels)}"


@pytest.mark.parametrize("problems", [(), ("atomic on global memory: atom.global.add.f32",)])
def test_exit_status(
    problems: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One kernel that fails on one target fails the whole."""
    fine = report.Compiled("linear", "sm_90", 96, 0, 49152, 128, 2.1, ())
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


def test_audit_of_forms() -> None:
    """Another shape of the gathered form's instructions is found, on its target alone."""
    one = report.Compiled("expert_linear gather forward: bf16", "sm_90", 64, 0, 0, 128, 1.0, (), ("wgmma.k16",))
    other = dataclasses.replace(one, kernel="expert_linear grouped forward: bf16")
    results = [one, other, dataclasses.replace(one, target="sm_80", products=("mma.k8",))]
    assert report.audit_forms(results) == results
    results[1] = dataclasses.replace(other, products=("wgmma.k8",))
    (problem,) = report.audit_forms(results)[0].problems
    assert "wgmma.k16" in problem and "wgmma.k8" in problem
    assert not any(result.problems for result in report.audit_forms(results)[1:])


def test_audit_of_sizes() -> None:
    assert report.audit_size(255, report.SPILL_BYTES, NVIDIA.shared_bytes, 256, NVIDIA) == []
    assert "257 bytes spilled" in report.audit_size(255, 257, 0, 256, NVIDIA)[0]
    assert "bytes of shared memory" in report.audit_size(1, 0, NVIDIA.shared_bytes + 1, 256, NVIDIA)[0]
    assert "255 registers a thread, 512 threads" in report.audit_size(255, 0, 0, 512, NVIDIA)[0]
    assert "513 registers" in report.audit_size(513, 0, 0, 64, AMD)[0]
