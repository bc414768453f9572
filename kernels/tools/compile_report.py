"""Compiles every Triton kernel ahead of time for several kinds of GPU and checks the result; needs no GPU.

    python -m kernels.tools.compile_report [--json FILE]

Kernels are compiled as the backend launches them (`kernels.triton.specs`) for Nvidia's sm_80, sm_90 and sm_100 and
AMD's gfx942. The compiled code is checked, not the source:

- no atomic and no reduction instruction on global memory: those add in whatever order programs arrive;
- no tf32 product: fp32 stays fp32;
- each matrix product is computed by the same instructions over the same tile by all kernels that may get rows of it
  (`kernels.tools.compile_products`);
- registers, spilled bytes and shared memory within the target's limits, so that the kernel can be launched at all.

Prints a table of kernels and one of products, and exits with status 1 when a kernel fails to compile or to pass. CI
runs it by the slow tests (`tests/kernels/tools/test_compile_report.py`, with kernels that must be reported). It does
not prove that a kernel gives the right numbers: the other tests do, in Triton's interpreter and, where there is one, on
a GPU.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("kernels.tools.compile_report")

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.errors import MetronomeError
from kernels.tools.compile_products import Compiled, audit_kernel, audit_products, instructions, product_of, short
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.outputs import output_file

if TYPE_CHECKING:  # importing it imports triton, whose mode is looked at first
    from rich.table import Table

    from kernels.triton.launch import CompileSpec


@dataclass(frozen=True)
class Target:
    """One kind of GPU and what a single program can use of it."""

    name: str
    platform: str  # "cuda" or "hip"
    arch: int | str  # as Triton names it
    warp: int  # threads
    shared_bytes: int  # a program's most shared memory
    registers: int  # a thread's most vector registers
    file_registers: int  # all registers that the threads of one program have between them


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * 1024, 255, 65536),
    Target("sm_90", "cuda", 90, 32, 227 * 1024, 255, 65536),
    Target("sm_100", "cuda", 100, 32, 227 * 1024, 255, 65536),
    Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 512, 4 * 512 * 64),
)

SPILL_BYTES = 256
"""The most bytes that a thread may spill. Spilling costs time, never bits; much of it means that a tile is too
large."""

_PTX_ATOMIC = re.compile(r"(?:\b(?:atom|red)|multimem\.red|cp\.reduce\S*)\.[\w.:]+")
_GCN_ATOMIC = re.compile(r"\b(?:global|flat|buffer|s)_atomic\w*")
_PTX_TF32 = re.compile(r"\bmma\S*\.tf32\S*|\bwgmma\S*\.tf32\S*|\btcgen05\.mma\S*kind::tf32\S*")
_GCN_TF32 = re.compile(r"\bv_mfma\w*xf32\w*")


def compile_one(spec: CompileSpec, target: Target) -> Compiled:
    """Compiles ``spec`` for ``target``, or takes it from Triton's cache, and checks it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.triton.tiles import FP_FUSION

    names = spec.fn.arg_names
    constants = {(names.index(name),): value for name, value in spec.constexprs.items()}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible}
    signature = {name: "constexpr" if name in spec.constexprs else spec.signature[name] for name in names}
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": FP_FUSION}
    threads, tile, product = spec.num_warps * target.warp, tile_of(spec), product_of(spec.name)
    start = time.perf_counter()
    try:
        kernel = triton.compile(
            ASTSource(spec.fn, signature, constants, hints),
            target=GPUTarget(target.platform, target.arch, target.warp),
            options=options,
        )
        registers, spilled = _cubin_usage(kernel, target) if target.platform == "cuda" else _gcn_usage(kernel)
    except Exception as error:  # whatever the compiler raises is the finding; the other kernels are reported too
        reason = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        seconds = time.perf_counter() - start
        return Compiled(spec.name, target.name, 0, 0, 0, threads, seconds, (reason,), tile, product)
    code = kernel.asm["ptx" if target.platform == "cuda" else "amdgcn"]
    shared: int = kernel.metadata.shared
    multiplies = "tt.dot " in kernel.asm["ttir"]
    products = instructions(code, target.platform) if multiplies else ()
    problems = (
        *audit_code(code, target),
        *audit_size(registers, spilled, shared, threads, target),
        *audit_kernel(product, products, multiplies, target.platform),
    )
    seconds = time.perf_counter() - start
    used = registers, spilled, shared, threads
    return Compiled(spec.name, target.name, *used, seconds, problems, tile, product, products)


def tile_of(spec: CompileSpec) -> str:
    """m.n.k.warps.stages, by the names that kernels give their sizes; 1 for one that a kernel has not."""
    names = (("M", "ROWS"), ("N", "KEYS", "CHANNELS_PAD", "BLOCK"), ("K", "STEP"))
    sizes = [next((spec.constexprs[name] for name in some if name in spec.constexprs), 1) for some in names]
    return ".".join(map(str, (*sizes, spec.num_warps, spec.num_stages)))


def audit_code(code: str, target: Target) -> list[str]:
    """One line for each kind of instruction in ``code`` (PTX or AMDGCN) that breaks the row contract or the
    precision."""
    # A PTX instruction that names the shared window reduces inside one program, in an order that program fixes.
    if target.platform == "cuda":
        atomics = {x for x in _PTX_ATOMIC.findall(code) if ".shared" not in x or ".global" in x}
        tf32 = set(_PTX_TF32.findall(code))
    else:
        atomics, tf32 = set(_GCN_ATOMIC.findall(code)), set(_GCN_TF32.findall(code))
    return [f"atomic on global memory: {x}" for x in sorted(atomics)] + [f"tf32 product: {x}" for x in sorted(tf32)]


def audit_size(registers: int, spilled: int, shared: int, threads: int, target: Target) -> list[str]:
    """One line for each resource of which a program needs more than the target has."""
    problems = []
    if registers > target.registers or registers * threads > target.file_registers:
        problems.append(
            f"{registers} registers a thread, {threads} threads; "
            f"{target.name} has {target.registers} a thread, {target.file_registers} in all"
        )
    if shared > target.shared_bytes:
        problems.append(f"{shared} bytes of shared memory; {target.name} gives a program {target.shared_bytes}")
    if spilled > SPILL_BYTES:
        problems.append(f"{spilled} bytes spilled a thread; the limit is {SPILL_BYTES}")
    return problems


def _cubin_usage(kernel: Any, target: Target) -> tuple[int, int]:
    """(registers a thread, bytes spilled a thread) of a compiled Nvidia kernel."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        text = _tool([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)])
        registers, stack = _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)
        if stack == 0:
            return registers, 0  # spills live on the stack
        # Only the assembler's own log tells spills from other uses of the stack.
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        arch = re.search(r"^\.target\s+(\w+)", kernel.asm["ptx"], re.MULTILINE)
        assert arch is not None
        fused = [] if kernel.metadata.enable_fp_fusion else ["--fmad=false"]
        command = [
            get_ptxas(int(target.arch)).path,
            "-v",
            *fused,
            "--regAllocOptLevel=2",
            f"--gpu-name={arch[1]}",
            str(source),
            "-o",
        ]
        return registers, _number(r"(\d+) bytes spill stores", _tool([*command, os.devnull]))


def _gcn_usage(kernel: Any) -> tuple[int, int]:
    """(vector registers a thread, bytes spilled a thread) of a compiled AMD kernel, from its metadata."""
    text = kernel.asm["amdgcn"]
    return _number(r"\.vgpr_count:\s+(\d+)", text), 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)


def _tool(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"{pattern!r} is not in what the compiler's tools say; their form has changed")
    return int(match[1])


_jobs: list[tuple[CompileSpec, Target]] = []  # what forked workers inherit: kernels cannot be pickled


def _run_job(index: int) -> Compiled:
    return compile_one(*_jobs[index])


def report(specs: list[CompileSpec], targets: Sequence[Target] = TARGETS) -> list[Compiled]:
    """Compiles and checks every spec for every target, one process a core. Triton's cache makes a second run quick."""
    _jobs[:] = [(spec, target) for spec in specs for target in targets]
    if not _jobs:
        return []
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return audit_products(pool.map(_run_job, range(len(_jobs)), chunksize=1))


def print_table(results: list[Compiled]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="registers a thread / bytes spilled / bytes of shared memory", caption_justify="left")
    table.add_column("kernel")
    targets = list(dict.fromkeys(result.target for result in results))
    for target in targets:
        table.add_column(target, justify="right")
    rows: dict[str, dict[str, Compiled]] = {}
    for result in results:
        rows.setdefault(result.kernel, {})[result.target] = result
    for kernel, row in rows.items():
        table.add_row(kernel, *(_cell(row[target]) for target in targets))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(_products_table(results, targets))
    for result in results:
        for problem in result.problems:
            console.print(f"[red]FAIL[/red] {result.kernel} on {result.target}: {problem}", highlight=False)
    failed = sum(bool(result.problems) for result in results)
    console.print(
        f"{len(rows)} kernels × {len(targets)} targets compiled, {failed} failed. No atomics or reductions on global "
        "memory, no tf32, one instruction a product, within limits: " + ("yes" if not failed else "no")
    )


def _products_table(results: list[Compiled], targets: list[str]) -> Table:
    """A row a product: how many kernels compute it, over which tile, by which instructions."""
    from rich.table import Table

    table = Table(title="instructions of each matrix product; fma x n: chains of n fp32 multiply-adds")
    for column in ("product", "kernels", "tile", *targets):
        table.add_column(column)
    for product in dict.fromkeys(result.product for result in results if result.product):
        mine = [result for result in results if result.product == product]
        used = [
            "\n".join(dict.fromkeys(short(x) for r in mine if r.target == target for x in r.products)) or "none"
            for target in targets
        ]
        tiles = "\n".join(dict.fromkeys(result.tile for result in mine))
        table.add_row(product, str(len({result.kernel for result in mine})), tiles, *used)
    return table


def _cell(result: Compiled) -> str:
    text = f"{result.registers} / {result.spill_bytes} / {result.shared_bytes}"
    return f"[red]{text}[/red]" if result.problems else text


def parser() -> Parser:
    parser = Parser("kernels.tools.compile_report", "Compiles every Triton kernel for every target and audits it.")
    parser.add_argument("--json", type=output_file(), help="also write the results here, a list of objects")
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise MetronomeError("TRITON_INTERPRET is set, which makes kernels Python functions; unset it to compile them")
    from kernels.triton.specs import compile_specs

    start = time.perf_counter()
    results = report(compile_specs())
    print_table(results)
    print(f"{time.perf_counter() - start:.0f} s")
    if given.json:
        write_json(given.json, [asdict(result) for result in results], indent=1)
    if not results or any(result.problems for result in results):
        raise SystemExit(1)
