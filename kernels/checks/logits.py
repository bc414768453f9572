"""Checks of the ops that read rows of logits: `route`, `logprob`, `sample`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FINE, BAD_LOGIT, NO_TOKEN, NOT_ALLOWED, BAD_CLASS, BAD_TOKEN = range(6)
"""Statuses that the kernels of `logprob` and `sample` give a row. cpu/native/sampling.cpp has the same numbers."""


def check_route(logits: Tensor, bias: Tensor, top_k: int, shared: int) -> None:
    """logits fp32 [T, E + shared], bias fp32 [E], 1 <= top_k <= E."""
    _logits("route", logits)
    experts = logits.shape[1] - shared
    if shared < 0:
        raise ValueError(f"route: shared is {shared}; need >= 0")
    if bias.shape != (experts,) or bias.dtype is not torch.float32 or not bias.is_contiguous():
        raise ValueError(
            f"route: bias is {bias.dtype} {tuple(bias.shape)}; logits {tuple(logits.shape)} with {shared} shared need "
            f"contiguous float32 [{experts}]"
        )
    if not 0 < top_k <= experts:
        raise ValueError(f"route: top_k is {top_k}; need 1 to {experts}, the number of routed experts")


def check_logprob(logits: Tensor, token: Tensor, temperature: float, allowed: Tensor, row_class: Tensor) -> None:
    """logits fp32 [T, V], token and row_class int64 [T], allowed bool [classes, V], 0 < temperature < inf."""
    _logits("logprob", logits)
    _classes("logprob", logits, allowed, row_class)
    _integers("logprob", "token", token, logits.shape[0])
    if not 0 < temperature < math.inf:
        raise ValueError(f"logprob: temperature is {temperature}; need a number > 0 (score greedy tokens at 1)")


def check_sample(logits: Tensor, temperature: float, key: Tensor, allowed: Tensor, row_class: Tensor) -> None:
    """logits fp32 [T, V], key and row_class int64 [T], allowed bool [classes, V], 0 <= temperature < inf."""
    _logits("sample", logits)
    _classes("sample", logits, allowed, row_class)
    _integers("sample", "key", key, logits.shape[0])
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sample: temperature is {temperature}; need a number >= 0 (0 is greedy)")


def _logits(op: str, logits: Tensor) -> None:
    shape = logits.shape
    if len(shape) != 2 or logits.dtype is not torch.float32:
        raise ValueError(f"{op}: logits is {logits.dtype} {tuple(shape)}; need float32 [T, V]")
    stride = logits.stride()
    if shape[1] == 0 or stride[1] != 1:
        raise ValueError(f"{op}: logits is {tuple(shape)}, strides {stride}; columns must be adjacent")


def _classes(op: str, logits: Tensor, allowed: Tensor, row_class: Tensor) -> None:
    count, vocab = logits.shape
    shape = allowed.shape
    if len(shape) != 2 or shape[1] != vocab or allowed.dtype is not torch.bool or not allowed.is_contiguous():
        raise ValueError(f"{op}: allowed is {allowed.dtype} {tuple(shape)}; need contiguous bool [classes, {vocab}]")
    _integers(op, "row_class", row_class, count)


def _integers(op: str, name: str, x: Tensor, count: int) -> None:
    if x.shape != (count,) or x.dtype is not torch.int64 or not x.is_contiguous():
        raise ValueError(f"{op}: {name} is {x.dtype} {tuple(x.shape)}; need contiguous int64 [{count}]")


def bad_row(
    op: str, row: int, reason: int, logits: Tensor, allowed: Tensor, row_class: Tensor, token: Tensor | None
) -> ValueError:
    """The error for a row whose status is not FINE. ``token`` may be None where the op draws the token."""
    kind = int(row_class[row])
    if reason == BAD_CLASS:
        return ValueError(f"{op}: row {row} has class {kind}; allowed has classes 0 to {allowed.shape[0] - 1}")
    if reason == BAD_LOGIT:
        bad = allowed[kind] & ~(logits[row] < torch.inf)
        where = f"token {int(bad.int().argmax())}" if bool(bad.any()) else "a logit that overflows at this temperature"
        return ValueError(f"{op}: row {row} (class {kind}) holds a NaN or +inf among its allowed logits: {where}")
    if reason == NO_TOKEN:
        return ValueError(f"{op}: row {row} (class {kind}) has no finite logit among the tokens that its class allows")
    assert token is not None
    if reason == BAD_TOKEN:
        return ValueError(f"{op}: row {row} has token {int(token[row])}, outside 0 to {logits.shape[1] - 1}")
    return ValueError(f"{op}: row {row} has token {int(token[row])}, which its class {kind} does not allow")
