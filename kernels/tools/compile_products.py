"""Which instructions compute each matrix product, read from compiled kernels, and whether all kernels use the same.

A *product* is one function of numbers that several kernels may compute for different rows: ``rows x weights, forward:
bf16`` is computed by `linear`, and by the gathered and the grouped form of `expert_linear`. Its bits may not depend on
which of them gets a row, so that all must use the same instructions over the same tile: two families of matrix
instructions (``mma.sync`` and ``wgmma``) may add in different orders and would be two functions. Within one kernel the
row count changes nothing, as one compiled kernel serves all (`tests/kernels/triton/test_binder.py`): attention has one
for decoding, for prefill and for the learner.

Products with an fp32 operand are chains of fused multiply-adds on Nvidia's plain units, one a term in the order of the
source; AMD's matrix units have an fp32 form, which is used there. This module reads text; it imports no triton.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

_WEIGHTS = re.compile(
    r"(?:linear|expert_linear(?: gather| grouped)?) (forward|input gradient|weight gradient): (\w+)(?: x (\w+) -> \w+)?"
)
_EMBEDDING = re.compile(r"embedding_sum gradient, \w+ codes: (\w+)")
_ATTENTION = re.compile(r"(attention(?: gradient (?:dq|dk and dv|drel|drel_proj))?), (\d+/\d+ heads of \d+), .*: (\w+)")

_PTX_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*")
_GCN_MATRIX = re.compile(r"\bv_mfma\w*")
_PTX_CHAIN = re.compile(r"^\s*(fma\.rn\.f32(?:x2)?|mov\.b64)\s+(\{[^}]*\}|%\w+),\s*(.*);", re.MULTILINE)
_FP32_MATRIX = re.compile(r"v_mfma_f32_\d+x\d+x\d+_?f32")
_BF16_MATRIX = re.compile(r"mma\.sync\S*\.f32\.bf16\.bf16\.f32|v_mfma_f32_\w+_bf16\w*")


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target. ``Compiled("linear/bf16", "sm_90", 96, 0, 49152, 128, 2.1, ())`` passes."""

    kernel: str
    target: str
    registers: int  # vector registers of a thread
    spill_bytes: int  # of a thread
    shared_bytes: int  # of a program
    threads: int  # of a program
    seconds: float  # near 0 when Triton's cache had it
    problems: tuple[str, ...]  # empty: passes
    tile: str = ""  # rows, columns, terms, warps and stages, as in the contract
    product: str = ""  # the matrix product it computes, which other kernels may compute too
    products: tuple[str, ...] = ()  # the instructions that compute it


def product_of(kernel: str) -> str:
    """The product that a kernel of `kernels.triton.specs` computes, named with its operands' types; "" for none.

    >>> product_of("linear forward: bf16 x bf16 -> fp32") == product_of("expert_linear gather forward: bf16")
    True
    """
    if found := _WEIGHTS.fullmatch(kernel):
        use, a, b = found.groups()
        return f"rows x weights, {use}: {a}" + (f" x {b}" if b not in (None, a) else "")
    if found := _EMBEDDING.fullmatch(kernel):
        return "embedding_sum gradient: fp32" + (" x bf16" if found[1] == "bf16" else "")  # 0 and 1 are fp32
    if found := _ATTENTION.fullmatch(kernel):
        return f"{found[1]}, {found[2]}: {found[3]}"
    return ""


def instructions(code: str, platform: str) -> tuple[str, ...]:
    """Matrix instructions in ``code`` (PTX or AMDGCN), and of PTX the lengths of its chains of fp32 multiply-adds.

    Shapes are the order of a sum within a tile, and so is the length of a chain: as many terms as the tile has, unless
    the compiler divides the sum."""
    if platform != "cuda":
        return tuple(sorted(set(_GCN_MATRIX.findall(code))))
    return (*sorted(set(_PTX_MATRIX.findall(code))), *(f"fma.rn.f32, chains of {n}" for n in chains(code)))


def chains(ptx: str) -> list[int]:
    """Lengths of the chains d = a b + c, d' = a' b' + d, … in ``ptx``, ascending, each once. One pass of a loop is one
    chain. A link over a pair of numbers (f32x2, of sm_100) is a link of both their chains. What exp consists of, which
    flushes to zero (.ftz), is not counted."""
    ends: set[int] = set()
    running: dict[str, int] = {}  # register -> terms of the chain whose last sum it holds
    for operation, to, operands in _PTX_CHAIN.findall(ptx):
        targets, sources = re.findall(r"%\w+", to), re.findall(r"%\w+", operands)
        if operation == "mov.b64":  # into a pair and out of it
            length = max((running.pop(source, 0) for source in sources), default=0)
        else:
            length = running.pop(sources[-1], 0) + 1
        for target in targets:
            ends.add(running.pop(target, 0))
            if length:
                running[target] = length
    return sorted((ends | set(running.values())) - {0})


def audit_kernel(product: str, found: Sequence[str], multiplies: bool, platform: str) -> list[str]:
    """One line for each thing wrong with the instructions ``found`` of one kernel; ``multiplies`` is whether its source
    has a matrix product."""
    if multiplies != bool(product):
        return [f"its source has {'a' if multiplies else 'no'} matrix product, its name {'one' if product else 'none'}"]
    if not product:
        return []
    chained, matrix = [x for x in found if x.startswith("fma")], [x for x in found if not x.startswith("fma")]
    if "fp32" not in product.rpartition(":")[2]:
        return [] if matrix and not chained else [f"a bf16 product, but its instructions are {list(found)}"]
    allowed = [_FP32_MATRIX] if platform != "cuda" else []
    if product.startswith("attention, "):
        allowed.append(_BF16_MATRIX)  # counts infinities, exactly
    wrong = [x for x in matrix if not any(pattern.fullmatch(x) for pattern in allowed)]
    problems = [f"an fp32 product by {x}" for x in wrong]
    if platform == "cuda" and not chained:
        problems.append("an fp32 product without a chain of fma.rn.f32")
    return problems


def audit_products(results: Iterable[Compiled]) -> list[Compiled]:
    """``results`` with a problem added to each kernel whose instructions or tile are not those of the first kernel that
    computes the same product on the same target. Tiles as well, because tcgen05's instruction does not show its
    shape."""
    firsts: dict[tuple[str, str], Compiled] = {}
    out = []
    for result in results:
        first = firsts.setdefault((result.product, result.target), result) if result.product else result
        for what, mine, other in (
            ("instructions are", result.products, first.products),
            ("tile is", result.tile, first.tile),
        ):
            if mine != other:
                problem = f"its {what} {mine}, those of {first.kernel}, the same product, {other}"
                result = replace(result, problems=(*result.problems, problem))
        out.append(result)
    return out


def short(instruction: str) -> str:
    """``wgmma m64n64k16`` for a table."""
    shape = re.search(r"m\d+n\d+k\d+|kind::\w+", instruction)
    if instruction.startswith("fma"):
        return "fma x " + instruction.rpartition(" ")[2]
    if instruction.startswith("v_mfma_f32_"):
        return "mfma " + instruction.removeprefix("v_mfma_f32_")
    name = ".".join(instruction.split(".")[: 2 if instruction.startswith("mma") else 1])
    return f"{name} {shape[0]}" if shape else name
