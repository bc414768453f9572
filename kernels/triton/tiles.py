"""What decides the Triton backend's bits beside the kernels' text: tile sizes, number formats, the compiler's settings.

The row contract rests on one argument. Every call of an op, whatever its row count, runs *the same compiled kernel*
over tiles of one size, and a tile's rows are computed alike; only the number of programs follows the row count. So

- no tile size, warp count or pipeline depth is a function of the row count: the functions here are given a type, a
  width or a head count, and no function has a row count to look at but `expert_form`, between two forms of one tile;
- row counts are passed unspecialised, and activations always with the same alignment (`launch.aligned`), for
  Triton compiles another kernel for an integer that 16 divides, or that is 1;
- fp32 products keep fp32 inputs (PRECISION), and a multiply and an add are fused only where the source says so
  (FP_FUSION, whose default changed between Triton's versions).

**Orders of reduction**, all of them one program's, in fp32; no atomics, no reduction split over programs:

- products (linear, experts, their gradients): k terms of a tile at a time, tiles in ascending order of k; the order
  within a tile is the matrix unit's (bf16) or the compiler's sequence of multiplies and adds (fp32), the same for
  every row of a tile;
- attention: n keys at a time, aligned parts of a split (16 keys in fp32, 32 in bf16, for whole splits of 64 spill
  registers), each with its own maximum, sum of exp and weighted values, combined from left to right; a score is a
  product over the head's width plus a chain over the bias's channels;
- RMS norm, log-probabilities, the router: n neighbouring columns at a time, one tree of the compiler's over them;
- convolution, experts' weighted sum, embedding: one chain in ascending index.

`contract` names all of it for the contract id. Left out: autotuning, which would let the clock choose bits.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
import triton
import triton.language as tl

FP_FUSION = False
PRECISION = tl.constexpr("ieee")
"""Of every product with fp32 operands: no tf32."""


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work. ``k`` is the number of terms reduced at a time."""

    m: int  # rows
    n: int  # columns
    k: int
    warps: int
    stages: int


# ---- products ----


def product_tile(dtype: torch.dtype) -> Tile:
    """The one tile of every matrix product in ``dtype``: rows few or many, gathered or grouped, forward or backward.

    64 rows let Hopper's and Blackwell's matrix instructions be used, which take no fewer; a decode of one row wastes
    them, but waits for the weights to arrive all the same. In fp32, which runs on the plain FMA units, 16 rows are what
    the units can hide behind the weights."""
    if dtype == torch.bfloat16:
        return Tile(m=64, n=64, k=64, warps=4, stages=3)
    return Tile(m=16, n=64, k=32, warps=4, stages=3)


GATHER_ROWS = 64
"""Up to so many rows experts run one row a program (gather + GEMV), beyond it rows sorted by expert (grouped GEMM)."""


def expert_form(rows: int) -> str:
    """Which kernel runs ``rows`` expert rows. Both reduce over the same tile, so the choice cannot change a bit."""
    return "gather" if rows <= GATHER_ROWS else "grouped"


BINS_TILE = Tile(m=16, n=64, k=32, warps=4, stages=2)
"""The embedding table's gradient: m bins and n columns a program, k rows at a time."""


# ---- rows alone ----


MAP_TILE = Tile(m=16, n=128, k=1, warps=4, stages=1)
"""Ops that treat every element alone, or sum few terms in a loop."""

ROWS_TILE = Tile(m=32, n=64, k=32, warps=4, stages=1)
"""Gradients of the weights of norm and convolution: sums over rows, m rows at a time, n columns a program."""

VOCAB_TILE = Tile(m=1, n=1024, k=1024, warps=4, stages=1)
"""Rows of logits over tokens, n tokens at a time."""

DOT_TILE = Tile(m=1, n=8, k=512, warps=1, stages=1)
"""A sum over a whole tensor: n lanes of a program, each a chain of k products."""

NORM_COLUMNS = 2048
"""A wider row than this is taken so many columns at a time."""


def norm_tile(width: int) -> Tile:
    """About a thousand elements a program."""
    n = min(triton.next_power_of_2(width), NORM_COLUMNS)
    return Tile(m=min(max(1024 // n, 1), 16), n=n, k=n, warps=4, stages=1)


def router_tile(experts: int) -> Tile:
    """n: the row of experts, shared ones included, padded to a power of two."""
    n = triton.next_power_of_2(experts)
    return Tile(m=1, n=n, k=n, warps=1, stages=1)


# ---- attention ----

PASS_TILES = 64
"""Query tiles whose gradients by distance are kept at a time; keeps their slices aligned, and at 32 rows, 8 key heads
and an extent of 1024 takes 64 MiB."""

DISTANCES = 64
"""Distances of one step, or one program, of the bias's gradient."""


def attention_tile(dtype: torch.dtype) -> Tile:
    """m: queries times heads of a query tile; n: keys taken at a time, a part of a split; k: of a head's width, terms
    of a product taken at a time.

    fp32 runs on the plain FMA units, whose operands lie in registers: small tiles. Below 64 rows Hopper's compiler
    never picks another instruction family."""
    if dtype == torch.bfloat16:
        return Tile(m=32, n=32, k=64, warps=4, stages=1)
    return Tile(m=16, n=16, k=16, warps=4, stages=1)


# ---- the contract ----


def contract() -> dict[str, str | int]:
    """All of the above as plain values. A tile reads m.n.k.warps.stages."""
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
