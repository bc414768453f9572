"""``python -m kernels.tools.device_variants [--json FILE]``: which other tiles give the bits of the shipped product.

Two questions to the device. Asserted: the shipped product gives the same bits for 1 to 1,000 rows and when it is
computed again, in both number formats. For information, since no kernel relies on it: which tile sizes and numbers of
warps (and so which matrix instructions: ``mma.sync`` below 64 rows, ``wgmma`` from 64 on) would give the same bits as
the shipped tile; and at which row counts the library's own products and norm differ from their result for many rows.
Exit status 1 when the shipped product differs from itself.

Runs with the Triton backend only; ``--dry`` takes few variants, for the interpreter.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("kernels.tools.device_variants")

import traceback
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from kernels import dispatch
from kernels.errors import MetronomeError
from kernels.tools.row_contract import COUNTS, same
from kernels.triton.launch import run
from kernels.triton.linear import product_kernel
from kernels.triton.tiles import Tile, product_tile
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.outputs import output_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def multiply(x: Tensor, w: Tensor, tile: Tile) -> Tensor:
    """x [T, K] and w [N, K] -> fp32 [T, N], by the backend's product kernel with ``tile``."""
    out = x.new_empty(x.shape[0], w.shape[0], dtype=torch.float32)
    grid = (triton.cdiv(w.shape[0], tile.n), triton.cdiv(x.shape[0], tile.m))
    sizes = (*out.shape, w.shape[1], x.stride(0), 1, 1, w.stride(0))
    run(product_kernel, grid, out.device, tile, x, w, out, *sizes, M=tile.m, N=tile.n, K=tile.k, WIDEN=False)
    return out


def tiles(dtype: torch.dtype, dry: bool) -> Iterator[Tile]:
    """Other tiles than the shipped one."""
    shipped = product_tile(dtype)
    sizes = ((16, 64), (64,), (4,)) if dry else ((16, 32, 64, 128), (32, 64, 128), (4, 8))
    for m, n, warps in product(*sizes):
        for k in (shipped.k,) if dry else (shipped.k, shipped.k // 2):
            if (tile := Tile(m, n, k, warps, shipped.stages)) != shipped:
                yield tile


def variants(dtype: torch.dtype, dry: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(tile, whether its bits are the shipped tile's and the share of elements that differ)."""
    draw, device = torch.Generator().manual_seed(0), dispatch.device()
    x, w = (torch.randn(rows, 512, generator=draw).to(dtype).to(device) for rows in ((64, 128) if dry else (256, 256)))
    shipped = multiply(x, w, product_tile(dtype))
    for tile in tiles(dtype, dry):
        name = f"{tile.m} x {tile.n} x {tile.k}, {tile.warps} warps"
        try:
            got = multiply(x, w, tile)
        except Exception as error:  # too large a tile for this device, say
            yield name, {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
            continue
        yield name, {"same_bits": same(got, shipped), "share_differing": float((got != shipped).float().mean())}


def shipped_differences(dtype: torch.dtype, dry: bool) -> list[str]:
    """Where the shipped product differs from its own result for all rows."""
    draw, device, rows = torch.Generator().manual_seed(1), dispatch.device(), 65 if dry else 1000
    x, w = (torch.randn(n, 512, generator=draw).to(dtype).to(device) for n in (rows, 192))
    tile = product_tile(dtype)
    whole = multiply(x, w, tile)
    found = [f"{n} rows" for n in COUNTS if n <= rows and not same(multiply(x[:n], w, tile), whole[:n])]
    return found + ([] if same(multiply(x, w, tile), whole) else ["computed twice"])


def library(dry: bool) -> Iterator[tuple[str, list[int]]]:
    """(op of torch, row counts for which its rows differ from those of a call with many)."""
    draw, device = torch.Generator().manual_seed(2), dispatch.device()
    rows = 64 if dry else 1000
    torch.backends.cuda.matmul.allow_tf32 = False

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    x, w, weight, frames = normal(rows, 512), normal(512, 512), normal(512), normal(rows, 1600)
    ops: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "matmul fp32": (lambda y: y @ w, x),
        "matmul bf16": (lambda y: y @ w.bfloat16(), x.bfloat16()),
        "rms_norm": (lambda y: F.rms_norm(y, (512,), weight), x),
        "softmax": (lambda y: torch.softmax(y, 1), x),
        "rfft": (lambda y: torch.view_as_real(torch.fft.rfft(y)), frames),
    }
    for name, (op, inputs) in ops.items():
        whole = op(inputs)
        yield name, [n for n in COUNTS if n < rows and not same(op(inputs[:n]), whole[:n])]


def parser() -> Parser:
    parser = Parser("kernels.tools.device_variants", __doc__)
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="write the results to FILE")
    parser.add_argument("--dry", action="store_true", help="few variants and sizes")
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    if dispatch.contract()["backend"] != "triton":
        raise MetronomeError("tiles are the Triton backend's; start with METRONOME_BACKEND=triton")
    report: dict[str, Any] = {"shipped": {}, "variants": {}, "library_differs_at_rows": {}}
    for name, dtype in DTYPES.items():
        found = report["shipped"][name] = shipped_differences(dtype, given.dry)
        print(f"{'FAIL' if found else 'ok  '} shipped product {name} {'; '.join(found)}", flush=True)
        report["variants"][name] = dict(variants(dtype, given.dry))
        equal = sum(value.get("same_bits", False) for value in report["variants"][name].values())
        print(f"     {name}: {equal} of {len(report['variants'][name])} other tiles give the shipped bits", flush=True)
    try:
        report["library_differs_at_rows"] = dict(library(given.dry))
    except RuntimeError:
        traceback.print_exc()
    for name, counts in report["library_differs_at_rows"].items():
        print(f"     torch's {name} differs at row counts {counts}")
    if given.json is not None:
        write_json(given.json, {"contract_id": dispatch.contract_id()} | report, indent=1)
    if any(report["shipped"].values()):
        raise SystemExit(1)
