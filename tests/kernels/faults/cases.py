"""Every op of `kernels.ops` as a `Case`: inputs that work, by name, and how to call it.

The tests beside this file change one thing: rows, memory layout, a pointer's alignment, a device, a type, an id, one
value to NaN or infinity. What comes out must be right or a ValueError, never a crash or another's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels import ops
from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from kernels.reference import backend as reference
from tests.kernels.contract import assert_same, generator, normal

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

HEADS = ("q", "k", "v", "rel")
WIDTHS = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 130])


@dataclass(frozen=True)
class Case:
    make: Callable[[int, int, int, torch.dtype], Inputs]  # seed, rows, width, dtype
    call: Callable[..., Outputs]  # of the inputs, and numbers that have a default
    rows: tuple[str, ...]  # inputs with a row a token, whose rows may lie apart in memory
    numbers: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # those numbers, and odd values of each


def _integers(seed: int, rows: int, below: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, below, (rows,), generator=generator(seed)).to(dtype)


def _linear(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {"x": normal(seed, rows, width, dtype=dtype), "w": normal(seed + 1, 21, width, dtype=dtype)}


def _experts(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {
        "x": normal(seed, rows, width, dtype=dtype),
        "w": normal(seed + 1, 3, 21, width, dtype=dtype),
        "expert": _integers(seed, 2 * rows, 3, torch.int32),
    }


def _combine(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {"y": normal(seed, 3 * rows, width, dtype=dtype), "weight": normal(seed + 1, rows, 3)}


def _norm(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {"x": normal(seed, rows, width, dtype=dtype), "weight": normal(seed + 1, width, dtype=dtype)}


def _conv(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {"x": normal(seed, rows, width, dtype=dtype), "weight": normal(seed + 1, width, 4)}


def state_conv_inputs(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return _conv(seed, rows, width, dtype) | {"state": normal(seed + 2, 2, 3, width, dtype=dtype)}


def one_segment(x: Tensor, slot: int = 0, start: int = 0) -> Segments:
    """All rows of x as one sequence."""
    rows = x.shape[0] if x.dim() else 0
    return Segments.build([slot], [start], [rows]) if rows else Segments.build([], [], [])


def attention_inputs(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {
        "q": normal(seed, rows, 4, width, dtype=dtype),
        "k": normal(seed + 1, rows, 2, width, dtype=dtype),
        "v": normal(seed + 2, rows, 2, width, dtype=dtype),
        "rel": normal(seed + 3, rows, 4, 5, dtype=dtype),
        "rel_proj": normal(seed + 4, 5, 70, dtype=dtype),
        "tau": 1 + normal(seed + 5, rows).abs(),
    }


def paged_inputs(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    pages = -(-rows // SPLIT_TOKENS) + 1
    return attention_inputs(seed, rows, width, dtype) | {
        "key": torch.full((pages, 2, width, SPLIT_TOKENS), torch.nan, dtype=dtype),
        "value": torch.full((pages, 2, SPLIT_TOKENS, width), torch.nan, dtype=dtype),
        "table": torch.arange(pages, dtype=torch.int32).flip(0)[None].contiguous(),
    }


def attend(
    x: Inputs, scale: float = 0.2, window: int | None = 100, first: int = 0, slot: int = 0, start: int = 0
) -> Outputs:
    cache = PagedKV(x["key"], x["value"], x["table"]) if "key" in x else None
    heads = (x["q"], x["k"], x["v"], x["rel"], x["rel_proj"])
    segments = one_segment(x["q"], slot, start)
    return (ops.attention(*heads, segments, scale=scale, window=window, first=first, tau=x["tau"], cache=cache),)


def _router(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {"logits": normal(seed, rows, width + 1), "bias": normal(seed + 1, width)}


def _codes(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    codes = torch.randint(0, 5, (rows, 7), generator=generator(seed))
    return {"codes": codes, "table": normal(seed + 1, 35, width, dtype=dtype)}


def _scores(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    allowed = torch.rand(3, width, generator=generator(seed)) < 0.6
    allowed[:, width // 2] = True
    return {
        "logits": normal(seed, rows, width),
        "token": torch.full((rows,), width // 2),
        "allowed": allowed,
        "row_class": _integers(seed + 1, rows, 3),
    }


def _draws(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return _scores(seed, rows, width, dtype) | {"token": _integers(seed + 2, rows, 2**62)}  # as keys


FAR = (-1, 2**31 - 1)
HEATS = (0.0, -0.0, -1.0, torch.nan, torch.inf, 1e-40, 1e30)
ATTENTION = {
    "scale": (0.0, -3.0, 1e30),
    "window": (None, 1, 0, -1, 2**40),
    "first": (1, 64, -64, 2**40),
    "start": (1, 64, *FAR),
    "slot": (1, *FAR),
}

CASES = {
    "linear": Case(
        _linear,
        lambda x, out_dtype=None: (ops.linear(x["x"], ops.pack_linear(x["w"]), out_dtype),),
        ("x",),
        {"out_dtype": (torch.float32, torch.bfloat16, torch.float16, torch.int32)},
    ),
    "expert_linear": Case(
        _experts,
        lambda x, fan_out=2: (ops.expert_linear(x["x"], ops.pack_experts((x["w"],)), x["expert"], fan_out),),
        ("x",),
        {"fan_out": (1, 0, -2, 3, 2**62)},
    ),
    "swiglu": Case(
        lambda seed, rows, width, dtype: {"gate_up": normal(seed, rows, 2 * width, dtype=dtype)},
        lambda x: (ops.swiglu(x["gate_up"]),),
        ("gate_up",),
    ),
    "gelu": Case(
        lambda seed, rows, width, dtype: {"x": normal(seed, rows, width, dtype=dtype)},
        lambda x: (ops.gelu(x["x"]),),
        ("x",),
    ),
    "moe_combine": Case(_combine, lambda x: (ops.moe_combine(x["y"], x["weight"]),), ()),
    "rms_norm": Case(
        _norm,
        lambda x, eps=1e-6: (ops.rms_norm(x["x"], x["weight"], eps),),
        ("x",),
        {"eps": (0.0, 1e-40, 1e30, torch.inf)},
    ),
    "short_conv": Case(
        _conv,
        lambda x, slot=0, start=0: (ops.short_conv(x["x"], x["weight"], one_segment(x["x"], slot, start)),),
        ("x",),
        {"slot": FAR, "start": (1, *FAR)},
    ),
    "short_conv with state": Case(
        state_conv_inputs,
        lambda x, slot=1, start=2: (
            ops.short_conv(x["x"], x["weight"], one_segment(x["x"], slot, start), x["state"]),
            x["state"],
        ),
        ("x",),
        {"slot": (0, 2, *FAR), "start": (0, *FAR)},
    ),
    "attention": Case(attention_inputs, attend, HEADS, ATTENTION),
    "attention with cache": Case(paged_inputs, attend, HEADS, ATTENTION),
    "route": Case(
        _router,
        lambda x, top_k=1, shared=1: ops.route(x["logits"], x["bias"], top_k, shared),
        ("logits",),
        {"top_k": (0, 2, 9, -1, 2**62), "shared": (0, 2, -1, 2**62)},
    ),
    "embedding_sum": Case(
        _codes,
        lambda x, bins=5: (ops.embedding_sum(x["codes"], x["table"], bins),),
        ("codes",),
        {"bins": (0, -5, 1, 7, 35, 2**62)},
    ),
    "logprob": Case(
        _scores,
        lambda x, heat=0.8: ops.logprob(x["logits"], x["token"], heat, x["allowed"], x["row_class"]),
        ("logits",),
        {"heat": HEATS},
    ),
    "sample": Case(
        _draws,
        lambda x, heat=0.8: ops.sample(x["logits"], heat, x["token"], x["allowed"], x["row_class"]),
        ("logits",),
        {"heat": HEATS},
    ),
}
WRITTEN = ("state", "key", "value")  # inputs that an op writes to
CONSTANT = ("tau", "bias")  # inputs that have no gradient
DIFFERENTIABLE = pytest.mark.parametrize("name", [n for n in CASES if "with" not in n and n != "sample"])
BY_NAME = pytest.mark.parametrize("name", CASES)
F64 = {
    "linear", "expert_linear", "swiglu", "gelu", "moe_combine", "rms_norm", "short_conv", "attention", "embedding_sum",
}  # fmt: skip


def call(name: str, inputs: Inputs, **numbers: Any) -> Outputs:
    """Runs the op on copies of what it may write to."""
    return CASES[name].call({key: x.clone() if key in WRITTEN else x for key, x in inputs.items()}, **numbers)


def gradients(name: str, inputs: Inputs, upstream: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of the inputs that have one, for the upstream gradients that ``upstream`` makes for the outputs."""
    leaves = {key: x.clone().requires_grad_(x.is_floating_point() and key not in CONSTANT) for key, x in inputs.items()}
    outputs = [x for x in CASES[name].call(leaves) if x.requires_grad]
    wanted = [x for x in leaves.values() if x.requires_grad]
    return list(torch.autograd.grad(outputs, wanted, [upstream(x.detach()) for x in outputs]))


def bits(outputs: Outputs) -> list[Tensor]:
    """NaN compares unequal to itself; its bits do not."""
    short = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return [x.view(short[x.dtype]) if x.dtype in short else x for x in outputs]


def same(got: Outputs, expected: Outputs, what: str) -> None:
    for one, other in zip(bits(got), bits(expected), strict=True):
        assert_same(one, other, what)


def oracle(name: str, x: Inputs) -> Tensor:
    """What float64 torch gives."""
    if name == "linear":
        return reference.linear(x["x"], reference.pack_linear((x["w"],)), torch.float64)
    if name == "expert_linear":
        return reference.expert_linear(x["x"], reference.pack_experts(((x["w"],),)), x["expert"], 2)
    if name == "swiglu":
        return reference.swiglu(x["gate_up"])
    if name == "gelu":
        return reference.gelu(x["x"])
    if name == "moe_combine":
        return reference.moe_combine(x["y"], x["weight"])
    if name == "rms_norm":
        return reference.rms_norm(x["x"], x["weight"], 1e-6)
    if name == "short_conv":
        return reference.short_conv(x["x"], x["weight"], one_segment(x["x"]), None)
    if name == "embedding_sum":
        return reference.embedding_sum(x["codes"], x["table"], 5)
    heads = (x["q"], x["k"], x["v"], x["rel"], x["rel_proj"])
    return reference.attention(*heads, one_segment(x["q"]), 0.2, 100, 0, x["tau"], None)
