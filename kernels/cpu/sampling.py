"""The router, log-probabilities and sampling on the CPU. `sample` and `logprob` share the native code of one row."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import bind

_LOGPROB = bind("logprob_rows", "pipfppiiippppp")
_LOGPROB_BACKWARD = bind("logprob_backward", "pipfppiipppppp")
_SAMPLE = bind("sample_rows", "pifpppiiippp")
_ROUTE = bind("route_rows", "pipiiiipp")
_ROUTE_BACKWARD = bind("route_backward", "pipppiiip")


def route(logits: Tensor, bias: Tensor, top_k: int, shared: int) -> tuple[Tensor, Tensor]:
    _check_rows("route", logits)
    experts = logits.shape[1] - shared
    if shared < 0:
        raise ValueError(f"route: shared is {shared}; need >= 0")
    if bias.shape != (experts,) or bias.dtype != torch.float32 or not bias.is_contiguous() or not bias.is_cpu:
        raise ValueError(
            f"route: bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}; logits {tuple(logits.shape)} "
            f"with {shared} shared need contiguous CPU float32 [{experts}]"
        )
    if not 0 < top_k <= experts:
        raise ValueError(f"route: top_k is {top_k}; need 1 to {experts}, the number of routed experts")
    if torch.is_grad_enabled() and logits.requires_grad:
        result: tuple[Tensor, Tensor] = _Route.apply(logits, bias, top_k, shared)
        return result
    return _route(logits, bias, top_k, shared)


def _route(logits: Tensor, bias: Tensor, top_k: int, shared: int) -> tuple[Tensor, Tensor]:
    rows, width = logits.shape
    expert = torch.empty(rows, top_k + shared, dtype=torch.int32)
    weight = torch.empty(rows, top_k + shared)
    _ROUTE(
        logits.data_ptr(), logits.stride(0), bias.data_ptr(), rows, width - shared, top_k, shared,
        expert.data_ptr(), weight.data_ptr(),
    )  # fmt: skip
    return expert, weight


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, top_k, shared):  # type: ignore[no-untyped-def]
        expert, weight = _route(logits, bias, top_k, shared)
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
    _check_rows("logprob", logits)
    _check_classes("logprob", logits, allowed, row_class)
    _check_integers("logprob", "token", token, logits.shape[0])
    if not 0 < temperature < float("inf"):
        raise ValueError(f"logprob: temperature is {temperature}; need a number > 0 (score greedy tokens at 1)")
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
        logits.data_ptr(), logits.stride(0), token.data_ptr(), temperature, allowed.data_ptr(), row_class.data_ptr(),
        rows, vocab, allowed.shape[0], chosen.data_ptr(), entropy.data_ptr(), digest.data_ptr(),
        0 if peak is None else peak.data_ptr(), 0 if log_sum is None else log_sum.data_ptr(),
    )  # fmt: skip
    if failed:
        raise _error("logprob", failed, logits, allowed, row_class, token)
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
            logits.data_ptr(), logits.stride(0), token.data_ptr(), ctx.temperature, allowed.data_ptr(),
            row_class.data_ptr(), *logits.shape, peak.data_ptr(), log_sum.data_ptr(), entropy.data_ptr(),
            grad.data_ptr(), grad_entropy.data_ptr(), dlogits.data_ptr(),
        )  # fmt: skip
        return dlogits, None, None, None, None


def sample(
    logits: Tensor, temperature: float, key: Tensor, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rows("sample", logits)
    _check_classes("sample", logits, allowed, row_class)
    _check_integers("sample", "key", key, logits.shape[0])
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"sample: temperature is {temperature}; need a number >= 0 (0 is greedy)")
    rows, vocab = logits.shape
    token, digest = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    chosen = torch.empty(rows)
    failed = _SAMPLE(
        logits.data_ptr(), logits.stride(0), temperature, key.data_ptr(), allowed.data_ptr(), row_class.data_ptr(),
        rows, vocab, allowed.shape[0], token.data_ptr(), chosen.data_ptr(), digest.data_ptr(),
    )  # fmt: skip
    if failed:
        raise _error("sample", failed, logits, allowed, row_class, None)
    return token, chosen, digest


def _check_rows(op: str, logits: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.is_cpu:
        raise ValueError(
            f"{op}: logits is {logits.dtype} {tuple(logits.shape)} on {logits.device}; need CPU float32 [T, V]"
        )
    if logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(
            f"{op}: logits has shape {tuple(logits.shape)}, strides {logits.stride()}; columns must be adjacent"
        )


def _check_classes(op: str, logits: Tensor, allowed: Tensor, row_class: Tensor) -> None:
    vocab = logits.shape[1]
    fits = allowed.dim() == 2 and allowed.shape[1] == vocab and allowed.dtype == torch.bool
    if not fits or not allowed.is_contiguous() or not allowed.is_cpu:
        raise ValueError(
            f"{op}: allowed is {allowed.dtype} {tuple(allowed.shape)} on {allowed.device}; need "
            f"contiguous bool [classes, {vocab}] on the CPU"
        )
    _check_integers(op, "row_class", row_class, logits.shape[0])


def _check_integers(op: str, name: str, x: Tensor, rows: int) -> None:
    if x.shape != (rows,) or x.dtype != torch.int64 or not x.is_contiguous() or not x.is_cpu:
        raise ValueError(f"{op}: {name} is {x.dtype} {tuple(x.shape)}; need contiguous int64 [{rows}] on the CPU")


def _error(
    op: str, failed: int, logits: Tensor, allowed: Tensor, row_class: Tensor, token: Tensor | None
) -> ValueError:
    row, reason = divmod(failed, 8)
    kind, vocab = int(row_class[row]), logits.shape[1]
    if reason == 4:
        return ValueError(f"{op}: row {row} has class {kind}; allowed has classes 0 to {allowed.shape[0] - 1}")
    if reason == 1:
        bad = allowed[kind] & ~(logits[row] < torch.inf)
        where = f"token {int(bad.int().argmax())}" if bool(bad.any()) else "a logit that overflows at this temperature"
        return ValueError(f"{op}: row {row} (class {kind}) holds a NaN or +inf among its allowed logits: {where}")
    if reason == 2:
        return ValueError(f"{op}: row {row} (class {kind}) has no finite logit among the tokens that its class allows")
    assert token is not None
    if reason == 5:
        return ValueError(f"{op}: row {row} has token {int(token[row])}, outside 0 to {vocab - 1}")
    return ValueError(f"{op}: row {row} has token {int(token[row])}, which its class {kind} does not allow")
