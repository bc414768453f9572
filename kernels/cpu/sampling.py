"""The router, log-probabilities and sampling on the CPU. `sample` and `logprob` treat a row by the same native code."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks.common import check_device
from kernels.checks.logits import bad_row, check_logprob, check_route, check_sample
from kernels.cpu.library import bind

_LOGPROB = bind("logprob_rows", "pipfppiiippppp")
_LOGPROB_BACKWARD = bind("logprob_backward", "pipfppiipppppp")
_SAMPLE = bind("sample_rows", "pifpppiiippp")
_ROUTE = bind("route_rows", "pipiiiipp")
_ROUTE_BACKWARD = bind("route_backward", "pipppiiip")


def route(logits: Tensor, bias: Tensor, top_k: int, shared: int) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and logits.requires_grad:
        result: tuple[Tensor, Tensor] = _Route.apply(logits, bias, top_k, shared)
        return result
    check_route(logits, bias, top_k, shared)
    if not (logits.is_cpu and bias.is_cpu):
        check_device("route", "cpu", "cpu", logits=logits, bias=bias)
    (rows, width), chosen = logits.shape, top_k + shared
    expert, weight = torch.empty(rows, chosen, dtype=torch.int32), torch.empty(rows, chosen)
    _ROUTE(
        logits.data_ptr(), logits.stride()[0], bias.data_ptr(), rows, width - shared, top_k, shared, expert.data_ptr(),
        weight.data_ptr(),
    )  # fmt: skip
    return expert, weight


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, top_k, shared):  # type: ignore[no-untyped-def]
        expert, weight = route(logits, bias, top_k, shared)  # no gradient is asked for in here
        ctx.save_for_backward(logits, expert, weight)
        ctx.mark_non_differentiable(expert)
        return expert, weight

    @staticmethod
    def backward(ctx, _, grad):  # type: ignore[no-untyped-def]
        logits, expert, weight = ctx.saved_tensors
        grad, dlogits = grad.contiguous(), torch.empty(logits.shape)
        _ROUTE_BACKWARD(
            logits.data_ptr(), logits.stride(0), expert.data_ptr(), weight.data_ptr(), grad.data_ptr(),
            *logits.shape, expert.shape[1], dlogits.data_ptr(),
        )  # fmt: skip
        return dlogits, None, None, None


def logprob(
    logits: Tensor, token: Tensor, temperature: float, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_logprob(logits, token, temperature, allowed, row_class)
    if not (logits.is_cpu and token.is_cpu and allowed.is_cpu and row_class.is_cpu):
        check_device("logprob", "cpu", "cpu", logits=logits, token=token, allowed=allowed, row_class=row_class)
    if torch.is_grad_enabled() and logits.requires_grad:
        result: tuple[Tensor, Tensor, Tensor] = _Logprob.apply(logits, token, temperature, allowed, row_class)
        return result
    return _logprob(logits, token, temperature, allowed, row_class, None, None)


def _logprob(
    logits: Tensor,
    token: Tensor,
    temperature: float,
    allowed: Tensor,
    row_class: Tensor,
    peak: Tensor | None,
    log_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    chosen, entropy, digest = torch.empty(rows), torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    failed = _LOGPROB(
        logits.data_ptr(), logits.stride()[0], token.data_ptr(), temperature, allowed.data_ptr(), row_class.data_ptr(),
        rows, vocab, allowed.shape[0], chosen.data_ptr(), entropy.data_ptr(), digest.data_ptr(),
        0 if peak is None else peak.data_ptr(), 0 if log_sum is None else log_sum.data_ptr(),
    )  # fmt: skip
    if failed:
        raise bad_row("logprob", *divmod(failed, 8), logits, allowed, row_class, token)
    return chosen, entropy, digest


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, token, temperature, allowed, row_class):  # type: ignore[no-untyped-def]
        peak, log_sum = torch.empty(logits.shape[0]), torch.empty(logits.shape[0])
        chosen, entropy, digest = _logprob(logits, token, temperature, allowed, row_class, peak, log_sum)
        ctx.save_for_backward(logits, token, allowed, row_class, peak, log_sum, entropy)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(digest)
        return chosen, entropy, digest

    @staticmethod
    def backward(ctx, grad, grad_entropy, _):  # type: ignore[no-untyped-def]
        logits, token, allowed, row_class, peak, log_sum, entropy = ctx.saved_tensors
        grad, grad_entropy, dlogits = grad.contiguous(), grad_entropy.contiguous(), torch.empty(logits.shape)
        _LOGPROB_BACKWARD(
            logits.data_ptr(), logits.stride()[0], token.data_ptr(), ctx.temperature, allowed.data_ptr(),
            row_class.data_ptr(), *logits.shape, peak.data_ptr(), log_sum.data_ptr(), entropy.data_ptr(),
            grad.data_ptr(), grad_entropy.data_ptr(), dlogits.data_ptr(),
        )  # fmt: skip
        return dlogits, None, None, None, None


def sample(
    logits: Tensor, temperature: float, key: Tensor, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_sample(logits, temperature, key, allowed, row_class)
    if not (logits.is_cpu and key.is_cpu and allowed.is_cpu and row_class.is_cpu):
        check_device("sample", "cpu", "cpu", logits=logits, key=key, allowed=allowed, row_class=row_class)
    rows, vocab = logits.shape
    token, digest = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    chosen = torch.empty(rows)
    failed = _SAMPLE(
        logits.data_ptr(), logits.stride()[0], temperature, key.data_ptr(), allowed.data_ptr(), row_class.data_ptr(),
        rows, vocab, allowed.shape[0], token.data_ptr(), chosen.data_ptr(), digest.data_ptr(),
    )  # fmt: skip
    if failed:
        raise bad_row("sample", *divmod(failed, 8), logits, allowed, row_class, None)
    return token, chosen, digest
