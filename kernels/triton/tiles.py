"""What decides the Triton backend's bits, beside the kernels' text: tile sizes, number formats, compiler settings.

The row contract rests on one argument. Every call of an op, whatever its number of rows, runs *the same compiled
kernel* over tiles of one size, and all rows of a tile are computed alike; only the number of programs depends on the
number of rows. Therefore

- no tile size, warp count or pipeline depth is a function of the number of rows: the functions of this module take a
  type, a width or a head count. Only `expert_form` takes a number of rows, to choose between two kernels over one tile;
- row counts are passed as unspecialised integers, and activations always with the same alignment (`launch.aligned`),
  because Triton compiles another kernel for an integer that is 1 or a multiple of 16;
- fp32 products keep fp32 inputs (PRECISION), and a multiply and an add are fused only where the source says so
  (FP_FUSION, whose default changed between Triton's versions).

**Orders of reduction**, each within one program, in fp32; no atomics, no reduction split over programs:

- products (linear, experts, their gradients): k terms of a tile at a time, tiles in ascending order of k; the order
  within a tile is the matrix unit's (bf16) or one chain of k fused multiply-adds (fp32 on Nvidia; AMD's matrix units
  take fp32), the same for every row of a tile and in every kernel (`kernels.tools.compile_products`);
- attention: n keys at a time, aligned parts of a split (16 keys in fp32, 32 in bf16; whole splits of 64 would spill
  registers), each with its own maximum, sum of exp and weighted values, combined from left to right; a score is a
  product over the head's width plus a chain over the bias's channels;
- RMS norm, log-probabilities, the router: n neighbouring columns at a time, summed by one tree that the compiler makes;
- convolution, experts' weighted sum, embedding: one chain in ascending index.

`contract` lists all of it for the contract id; `kernels.triton.compiler` adds who compiles. Left out on purpose:
autotuning, by which a timing would choose bits.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
import triton
import triton.language as tl

FP_FUSION = False
"""Whether the compiler may fuse a multiplication and an addition on its own."""
PRECISION = tl.constexpr("ieee")
"""Precision of every product with fp32 operands: no tf32."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work and how it is compiled."""

    m: int  # rows
    n: int  # columns
    k: int  # terms of a sum that are reduced at a time
    warps: int
    stages: int  # depth of the software pipeline


# ---- products ----


def product_tile(dtype: torch.dtype) -> Tile:
    """The one tile of every matrix product in ``dtype``: few rows or many, gathered or grouped, forward or backward.

    The matrix instructions of Hopper and Blackwell need 64 rows; decoding one row wastes most of them, but is limited
    by reading the weights anyway. fp32 runs on the plain FMA units, which can compute 16 rows while weights are
    read."""
    if dtype == torch.bfloat16:
        return Tile(m=64, n=64, k=64, warps=4, stages=3)
    return Tile(m=16, n=64, k=32, warps=4, stages=3)


GATHER_ROWS = 64
"""The most expert rows that are computed by gather + GEMV, one row a program; more rows are sorted by expert (grouped
GEMM)."""


def expert_form(rows: int) -> str:
    """The kernel for ``rows`` expert rows, "gather" or "grouped". Both reduce over the same tile, so the choice cannot
    change a bit."""
    return "gather" if rows <= GATHER_ROWS else "grouped"


BINS_TILE = Tile(m=16, n=64, k=32, warps=4, stages=2)
"""Tile of the embedding table's gradient: m bins and n columns a program, k rows at a time."""


# ---- rows alone ----


MAP_TILE = Tile(m=16, n=128, k=1, warps=4, stages=1)
"""Tile of ops that treat every element alone, or sum few terms in a loop."""

ROWS_TILE = Tile(m=32, n=64, k=32, warps=4, stages=1)
"""Tile of the weights' gradients of norm and convolution: sums over rows, m rows at a time, n columns a program."""

VOCAB_TILE = Tile(m=1, n=1024, k=1024, warps=4, stages=1)
"""Tile of the ops on rows of logits: n tokens at a time."""

DOT_TILE = Tile(m=1, n=8, k=512, warps=1, stages=1)
"""Tile of a sum over a whole tensor: n lanes of a program, each a chain of k products."""

NORM_COLUMNS = 2048
"""The most columns of a row that `rms_norm` takes at a time."""


def norm_tile(width: int) -> Tile:
    """Tile of `rms_norm`, of about 1,024 elements a program."""
    n = min(triton.next_power_of_2(width), NORM_COLUMNS)
    return Tile(m=min(max(1024 // n, 1), 16), n=n, k=n, warps=4, stages=1)


def router_tile(experts: int) -> Tile:
    """Tile of `route`: n is the number of ``experts``, shared ones included, rounded up to a power of two."""
    n = triton.next_power_of_2(experts)
    return Tile(m=1, n=n, k=n, warps=1, stages=1)


# ---- attention ----

PASS_TILES = 64
"""Query tiles whose bias gradients by distance are kept at a time: 64 MiB with 32 rows, 8 key heads and an extent of
1024. A multiple of 4, so that the tiles of each pass start at a multiple of 16 bytes."""

DISTANCES = 64
"""Distances that one step, or one program, of the bias's gradient takes."""


def attention_tile(dtype: torch.dtype) -> Tile:
    """m: queries times heads of a query tile; n: keys taken at a time, a part of a split; k: components of a head taken
    at a time.

    Tiles are small in fp32, which runs on the plain FMA units with operands in registers. With fewer than 64 rows the
    compiler for Hopper always uses the same family of instructions."""
    if dtype == torch.bfloat16:
        return Tile(m=32, n=32, k=64, warps=4, stages=1)
    return Tile(m=16, n=16, k=16, warps=4, stages=1)


# ---- the contract ----


def contract() -> dict[str, str | int]:
    """Everything in this module that decides bits, as plain values; a tile is written m.n.k.warps.stages."""
    tiles = {
        "product fp32": product_tile(torch.float32),
        "product bf16": product_tile(torch.bfloat16),
        "attention fp32": attention_tile(torch.float32),
        "attention bf16": attention_tile(torch.bfloat16),
        "map": MAP_TILE,
        "rows": ROWS_TILE,
        "bins": BINS_TILE,
        "vocabulary": VOCAB_TILE,
        "dot": DOT_TILE,
        "router of 256": router_tile(256),
    }
    norms = {f"norm of {2**n}": norm_tile(2**n) for n in range(NORM_COLUMNS.bit_length())}
    return {
        "triton": triton.__version__,
        "fp_fusion": str(FP_FUSION),
        "input_precision": str(PRECISION.value),
        "bf16": "matrix units, fp32 sums",
        "gradient_passes": f"{PASS_TILES} tiles, {DISTANCES} distances",
    } | {f"tile, {name}": ".".join(map(str, astuple(tile))) for name, tile in (tiles | norms).items()}
