"""A tensor that lies on another device than the backend's: every op refuses it by name, with the program's line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch, ops
from kernels.layout import SPLIT_TOKENS, AdamWStep, PagedKV, Segments
from tests.kernels.backend import OPS, device

Call = Callable[..., Any]


def there(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype, device=device())


def cases() -> dict[str, tuple[Call, dict[str, Tensor]]]:
    """By op: (it, called by the names of its tensors; tensors that it takes)."""
    segments, late = Segments.build([0], [0], [2]), Segments.build([0], [2], [2])
    packed, many = ops.pack_linear(there(3, 16)), ops.pack_experts((there(2, 3, 16),))
    table = torch.zeros(1, 1, dtype=torch.int32, device=device())
    step = AdamWStep.build(lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0, taken=0)
    ids, allowed = torch.zeros(2, dtype=torch.int64, device=device()), there(1, 16, dtype=torch.bool)
    heads = {"q": there(2, 2, 16), "k": there(2, 1, 16), "v": there(2, 1, 16), "rel": there(2, 2, 3)}
    pages = {"key": there(1, 1, 16, SPLIT_TOKENS), "value": there(1, 1, SPLIT_TOKENS, 16)}

    def attend(key: Tensor, value: Tensor) -> Tensor:
        cache = PagedKV(key, value, table)
        return ops.attention(*heads.values(), there(3, 9), late, scale=0.2, cache=cache)

    def expert_linear(x: Tensor, expert: Tensor) -> Tensor:
        return ops.expert_linear(x, many, expert)

    def short_conv(x: Tensor, weight: Tensor, state: Tensor, addend: Tensor) -> Tensor:
        return ops.short_conv(x, weight, late, state, addend)

    def attention(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, rel_proj: Tensor, tau: Tensor) -> Tensor:
        return ops.attention(q, k, v, rel, rel_proj, segments, scale=0.2, tau=tau)

    return {
        "pack_linear": (lambda parts: ops.pack_linear(parts), {"parts": there(3, 16)}),
        "pack_experts": (lambda groups: ops.pack_experts((groups,)), {"groups": there(2, 3, 16)}),
        "linear": (lambda x: ops.linear(x, packed), {"x": there(2, 16)}),
        "expert_linear": (expert_linear, {"x": there(2, 16), "expert": table.view(1).repeat(2)}),
        "swiglu": (ops.swiglu, {"gate_up": there(2, 32)}),
        "gelu": (ops.gelu, {"x": there(2, 16)}),
        "moe_combine": (ops.moe_combine, {"y": there(4, 16), "weight": there(2, 2)}),
        "rms_norm": (lambda x, weight: ops.rms_norm(x, weight, 1e-6), {"x": there(2, 16), "weight": there(16)}),
        "embedding_sum": (
            lambda codes, table: ops.embedding_sum(codes, table, 2),
            {"codes": there(2, 3, dtype=torch.uint8), "table": there(6, 16)},
        ),
        "short_conv": (
            short_conv,
            {"x": there(2, 16), "weight": there(16, 4), "state": there(1, 3, 16), "addend": there(2, 16)},
        ),
        "attention": (attention, heads | {"rel_proj": there(3, 9), "tau": there(2)}),
        "attention over pages": (attend, pages),
        "route": (lambda logits, bias: ops.route(logits, bias, 1, 1), {"logits": there(2, 9), "bias": there(8)}),
        "logprob": (
            lambda logits, token, allowed, row_class: ops.logprob(logits, token, 1.0, allowed, row_class),
            {"logits": there(2, 16), "token": ids, "allowed": allowed, "row_class": ids},
        ),
        "sample": (
            lambda logits, key, allowed, row_class: ops.sample(logits, 1.0, key, allowed, row_class),
            {"logits": there(2, 16), "key": ids, "allowed": allowed, "row_class": ids},
        ),
        "dot": (ops.dot, {"a": there(16), "b": there(16)}),
        "adamw": (
            lambda parameter, gradient, first, second: ops.adamw(parameter, gradient, first, second, step),
            {name: there(16) for name in ("parameter", "gradient", "first", "second")},
        ),
    }


NAMES = (
    "pack_linear", "pack_experts", "linear", "expert_linear", "swiglu", "gelu", "moe_combine", "rms_norm",
    "embedding_sum", "short_conv", "attention", "attention over pages", "route", "logprob", "sample", "dot", "adamw",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_refused_with_op_argument_device_and_line(name: str) -> None:
    call, tensors = cases()[name]
    call(**tensors)  # the control: as they are, it takes them
    kind = dispatch.backend().DEVICE
    op = name.split(" ")[0]
    for argument in tensors:
        with pytest.raises(ValueError) as refused:
            call(**tensors | {argument: tensors[argument].to("meta")})
        said = (
            rf"{op}: {argument} is on meta; the \w+ backend needs it on {kind} \(tests/kernels/test_devices\.py:\d+ in "
        )
        assert re.match(said, str(refused.value)), refused.value


def test_every_op_is_tried() -> None:
    composed = {"scale", "repack"}  # of torch's product and `dot`; of a pack, which has been checked
    assert {name.split(" ")[0] for name in NAMES} == set(OPS) - composed == {n.split(" ")[0] for n in cases()}


def test_packs_whose_weights_moved() -> None:
    packed = ops.pack_linear(there(3, 16))
    moved = replace(packed, data={name: x.to("meta") for name, x in packed.data.items()})
    with pytest.raises(ValueError, match=r"linear: packed is on meta"):
        ops.linear(there(2, 16), moved)
