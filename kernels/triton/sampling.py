"""Log-probabilities with digest and entropy, and Gumbel sampling, in Triton. Rows are fp32, one program a row.

Learner and sampler run the same compiled kernels: `stats_kernel` computes a row's maximum, ln of its sum, entropy and
digest for both, `score_kernel` the log-prob of the token that was given or drawn. So what `sample` returns is bit for
bit what `logprob` recomputes. A row is taken BLOCK tokens at a time in ascending order.

exp is the device's fp32 function. ln is computed in float64 and rounded, once a row and twice a drawn token: the fast
fp32 ln of GPUs is off by 2^-22 near 1, where the greatest noises come from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks.logits import (
    BAD_CLASS,
    BAD_LOGIT,
    BAD_TOKEN,
    NO_TOKEN,
    NOT_ALLOWED,
    bad_row,
    check_logprob,
    check_sample,
)
from kernels.triton.deferred import settle, word_on
from kernels.triton.launch import CompileSpec, check_place, plain, run
from kernels.triton.tiles import VOCAB_TILE

_BAD_LOGIT, _NO_TOKEN = tl.constexpr(BAD_LOGIT), tl.constexpr(NO_TOKEN)
_NOT_ALLOWED, _BAD_CLASS = tl.constexpr(NOT_ALLOWED), tl.constexpr(BAD_CLASS)
_BAD_TOKEN = tl.constexpr(BAD_TOKEN)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def splitmix64(x):
    """splitmix64 (Steele, Lea & Flood 2014; Vigna's ``next()`` from state x) of uint64."""
    x = x + _GOLDEN
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def ln(x):
    """The natural logarithm of an fp32 number, computed in float64 and rounded to fp32."""
    return tl.log(x.to(tl.float64)).to(tl.float32)


@triton.jit
def gumbel(word):
    """fp32 noise -ln E, E = -ln u, of uint64 words. u = 1 - x where the word's top bit is 0, else u = x; x = m / 2^64,
    m being the lower 63 bits made odd, so that u is precise near 0 and 1 - u is precise near 1.

    m fits an int64, whose conversion to fp32 rounds once. Near u = 1, -ln(1 - x) comes from y = 1 - x, rounded, and
    d = y - 1, exact, as x ln(y) / d (Goldberg 1991, theorem 4); where y rounds to 1 it is x."""
    low = (word >> 63) != 0
    x = (((word << 1) >> 1) | 1).to(tl.int64).to(tl.float32) * (1.0 / 18446744073709551616.0)
    y = 1.0 - x
    d = y - 1.0
    of_u = ln(tl.where(low, x, y))
    high = tl.where(d == 0.0, x, of_u * tl.div_rn(x, tl.where(d == 0.0, 1.0, d)))
    return -ln(tl.where(low, -of_u, high))


@triton.jit
def scaled_logits(logits, allowed, v, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """(logit / temperature of tokens v, -inf where not allowed or beyond the row; whether each is allowed)."""
    permitted = tl.load(allowed + v, mask=v < VOCAB, other=0) != 0
    x = tl.load(logits + v, mask=permitted, other=float("-inf"))
    return tl.where(permitted, tl.div_rn(x, temperature), float("-inf")), permitted


@triton.jit(do_not_specialize=["classes"])
def stats_kernel(
    logits, allowed, row_class, peak_out, log_sum_out, entropy_out, digest_out, status_out, temperature, classes,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logp[v] = (logit / temperature - peak) - log_sum. Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    kind = tl.load(row_class + row)
    known = (kind >= 0) & (kind < classes)
    allowed += tl.where(known, kind, 0) * VOCAB
    logits += row * VOCAB
    offset = tl.arange(0, BLOCK)
    peak = tl.full((), float("-inf"), tl.float32)
    bad = tl.full((), 0, tl.int32)
    for first in range(0, VOCAB, BLOCK):
        x, permitted = scaled_logits(logits, allowed, first + offset, temperature, VOCAB, BLOCK)
        bad = tl.maximum(bad, tl.max((permitted & ~(x < float("inf"))).to(tl.int32), 0))  # NaN or +inf
        peak = tl.maximum(peak, tl.max(tl.where(x < float("inf"), x, float("-inf")), 0))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    for first in range(0, VOCAB, BLOCK):
        x, permitted = scaled_logits(logits, allowed, first + offset, temperature, VOCAB, BLOCK)
        shifted = x - safe
        weight = tl.exp(shifted)
        total += tl.sum(weight, 0)
        weighted += tl.sum(weight * tl.where(shifted > float("-inf"), shifted, 0.0), 0)
    log_sum = tl.log(total.to(tl.float64)).to(tl.float32)
    digest = tl.full((), 0, tl.uint64)
    for first in range(0, VOCAB, BLOCK):
        v = first + offset
        x, permitted = scaled_logits(logits, allowed, v, temperature, VOCAB, BLOCK)
        bits = ((x - safe) - log_sum).to(tl.uint32, bitcast=True)
        mixed = splitmix64((v.to(tl.uint64) << 32) | bits.to(tl.uint64))
        digest += tl.sum(tl.where(v < VOCAB, mixed, tl.full((BLOCK,), 0, tl.uint64)), 0)
    tl.store(peak_out + row, peak)
    tl.store(log_sum_out + row, log_sum)
    tl.store(entropy_out + row, log_sum - tl.div_rn(weighted, total))
    tl.store(digest_out + row, digest.to(tl.int64, bitcast=True))
    status = tl.where(bad != 0, _BAD_LOGIT, tl.where(peak == float("-inf"), _NO_TOKEN, 0))
    tl.store(status_out + row, tl.where(known, status, _BAD_CLASS))


@triton.jit
def score_kernel(
    logits, allowed, row_class, token, peak, log_sum, status, logp_out, noticed, temperature, VOCAB: tl.constexpr
):  # fmt: skip
    """The log-prob of each row's token. Sets the row's status when it was 0 and the token is not allowed, and
    ``noticed`` when the status is not 0 then (`kernels.triton.deferred`). Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    code = tl.load(status + row)
    chosen = tl.load(token + row)
    inside = (chosen >= 0) & (chosen < VOCAB)
    kind = tl.load(row_class + row)
    permitted = tl.load(allowed + kind * VOCAB + chosen, mask=inside & (code == 0), other=0) != 0
    x = tl.load(logits + row * VOCAB + chosen, mask=permitted, other=0.0)
    tl.store(logp_out + row, (tl.div_rn(x, temperature) - tl.load(peak + row)) - tl.load(log_sum + row))
    wrong = tl.where(inside, tl.where(permitted, 0, _NOT_ALLOWED), _BAD_TOKEN)
    code = tl.where(code == 0, wrong, code)
    tl.store(status + row, code)
    tl.store(noticed, 1, code != 0)


@triton.jit
def draw_kernel(
    logits, allowed, row_class, key, peak, log_sum, status, token_out, temperature,
    GREEDY: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of the greatest logp + noise, or of the greatest logit when GREEDY; of equal ones the lowest. Grid
    (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    kind = tl.where(tl.load(status + row) == 0, tl.load(row_class + row), 0)
    allowed += kind * VOCAB
    logits += row * VOCAB
    state = tl.load(key + row).to(tl.uint64, bitcast=True)
    top, shift = tl.load(peak + row), tl.load(log_sum + row)
    offset = tl.arange(0, BLOCK)
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    seen = tl.full((), 0, tl.int32)
    for first in range(0, VOCAB, BLOCK):
        v = first + offset
        x, permitted = scaled_logits(logits, allowed, v, temperature, VOCAB, BLOCK)
        score = x
        if not GREEDY:
            score = ((x - top) - shift) + gumbel(splitmix64(state + (v + 1).to(tl.uint64) * _GOLDEN))
        score = tl.where(permitted, score, float("-inf"))
        greatest = tl.max(score, 0)
        lowest = tl.min(tl.where(permitted & (score == greatest), v, VOCAB), 0)
        some = tl.max(permitted.to(tl.int32), 0)
        better = (some != 0) & ((seen == 0) | (greatest > best))
        best, token = tl.where(better, greatest, best), tl.where(better, lowest, token)
        seen = tl.maximum(seen, some)
    tl.store(token_out + row, token.to(tl.int64))


@triton.jit
def logprob_backward_kernel(
    logits, allowed, row_class, token, peak, log_sum, entropy, dlogp, dentropy, dlogits, temperature,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits[v] = (dlogp (1[v = token] - p_v) - dentropy p_v (logp_v + entropy)) / temperature; 0 where not allowed.
    Grid (rows, blocks of tokens)."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    allowed += tl.load(row_class + row) * VOCAB
    x, permitted = scaled_logits(logits + row * VOCAB, allowed, v, temperature, VOCAB, BLOCK)
    logp = (x - tl.load(peak + row)) - tl.load(log_sum + row)
    p = tl.exp(logp)
    far = tl.where(logp > float("-inf"), logp, 0.0)  # p = 0 there
    own = tl.where(v == tl.load(token + row), 1.0, 0.0)
    grad = tl.load(dlogp + row) * (own - p) - tl.load(dentropy + row) * p * (far + tl.load(entropy + row))
    grad = tl.div_rn(grad, temperature)
    tl.store(dlogits + row * VOCAB + v, tl.where(permitted, grad, 0.0), mask=v < VOCAB)


def logprob(
    logits: Tensor, token: Tensor, temperature: float, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_logprob(logits, token, temperature, allowed, row_class)
    check_place("logprob", logits=logits, token=token, allowed=allowed, row_class=row_class)
    if torch.is_grad_enabled() and logits.requires_grad:
        result: tuple[Tensor, Tensor, Tensor] = _Logprob.apply(logits, token, temperature, allowed, row_class)
        return result
    logits, token, row_class = plain(logits), plain(token), plain(row_class)
    stats = _stats(logits, temperature, allowed, row_class)
    return _score("logprob", logits, token, temperature, allowed, row_class, stats), stats.entropy, stats.digest


class _Stats:
    """The outputs of `stats_kernel`: fp32 peak, log_sum and entropy, int64 digest, int32 status, all [T]."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.peak, self.log_sum, self.entropy = (like.new_empty(rows, dtype=torch.float32) for _ in range(3))
        self.digest = like.new_empty(rows, dtype=torch.int64)
        self.status = like.new_empty(rows, dtype=torch.int32)


def _stats(logits: Tensor, temperature: float, allowed: Tensor, row_class: Tensor) -> _Stats:
    rows, vocab = logits.shape
    stats = _Stats(rows, logits)
    run(
        stats_kernel, (rows,), logits.device, VOCAB_TILE, logits, allowed.view(torch.uint8), row_class,
        stats.peak, stats.log_sum, stats.entropy, stats.digest, stats.status, float(temperature), allowed.shape[0],
        VOCAB=vocab, BLOCK=VOCAB_TILE.n,
    )  # fmt: skip
    return stats


def _score(
    op: str, logits: Tensor, token: Tensor, temperature: float, allowed: Tensor, row_class: Tensor, stats: _Stats
) -> Tensor:
    """The tokens' log-probs. Raises ValueError for the first row whose status is not 0, at once or as
    `kernels.triton.deferred` says."""
    chosen, noticed = torch.empty_like(stats.peak), word_on(logits.device)
    run(
        score_kernel, (len(chosen),), logits.device, VOCAB_TILE, logits, allowed.view(torch.uint8), row_class, token,
        stats.peak, stats.log_sum, stats.status, chosen, noticed, float(temperature), VOCAB=logits.shape[1],
    )  # fmt: skip

    def explain() -> None:
        bad = stats.status.nonzero()
        if len(bad):
            row = int(bad[0])
            raise bad_row(op, row, int(stats.status[row]), logits, allowed, row_class, token)

    settle(noticed, explain)
    return chosen


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, token, temperature, allowed, row_class):  # type: ignore[no-untyped-def]
        logits, token, row_class = plain(logits), plain(token), plain(row_class)
        stats = _stats(logits, temperature, allowed, row_class)
        chosen = _score("logprob", logits, token, temperature, allowed, row_class, stats)
        ctx.save_for_backward(logits, token, allowed, row_class, stats.peak, stats.log_sum, stats.entropy)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(stats.digest)
        return chosen, stats.entropy, stats.digest

    @staticmethod
    def backward(ctx, grad, grad_entropy, _):  # type: ignore[no-untyped-def]
        logits, token, allowed, row_class, peak, log_sum, entropy = ctx.saved_tensors
        (rows, vocab), dlogits = logits.shape, torch.empty_like(logits)
        run(
            logprob_backward_kernel, (rows, triton.cdiv(vocab, VOCAB_TILE.n)), logits.device, VOCAB_TILE,
            logits, allowed.view(torch.uint8), row_class, token, peak, log_sum, entropy, plain(grad),
            plain(grad_entropy), dlogits, float(ctx.temperature), VOCAB=vocab, BLOCK=VOCAB_TILE.n,
        )  # fmt: skip
        return dlogits, None, None, None, None


@torch.no_grad()
def sample(
    logits: Tensor, temperature: float, key: Tensor, allowed: Tensor, row_class: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    check_sample(logits, temperature, key, allowed, row_class)
    check_place("sample", logits=logits, key=key, allowed=allowed, row_class=row_class)
    logits, key, row_class = plain(logits), plain(key), plain(row_class)
    scored = temperature or 1.0
    stats = _stats(logits, scored, allowed, row_class)
    token = torch.empty_like(stats.digest)
    run(
        draw_kernel, (len(token),), logits.device, VOCAB_TILE, logits, allowed.view(torch.uint8), row_class, key,
        stats.peak, stats.log_sum, stats.status, token, float(scored),
        GREEDY=temperature == 0, VOCAB=logits.shape[1], BLOCK=VOCAB_TILE.n,
    )  # fmt: skip
    return token, _score("sample", logits, token, scored, allowed, row_class, stats), stats.digest


def specs() -> list[CompileSpec]:
    common = {"logits": "*fp32", "allowed": "*u8", "row_class": "*i64", "peak": "*fp32", "log_sum": "*fp32"}
    stats = {"logits": "*fp32", "allowed": "*u8", "row_class": "*i64", "digest_out": "*i64", "status_out": "*i32"}
    stats |= dict.fromkeys(("peak_out", "log_sum_out", "entropy_out"), "*fp32")
    score = common | {"token": "*i64", "status": "*i32", "logp_out": "*fp32", "noticed": "*i32"}
    draw = common | {"key": "*i64", "status": "*i32", "token_out": "*i64"}
    gradient = common | {"token": "*i64"} | dict.fromkeys(("entropy", "dlogp", "dentropy", "dlogits"), "*fp32")
    blocks: dict[str, int | bool] = {"VOCAB": 200_064, "BLOCK": VOCAB_TILE.n}
    out = []
    for name, kernel, pointers, more, constants in (
        ("logprob statistics", stats_kernel, stats, {"classes": "i32"}, blocks),
        ("logprob of tokens", score_kernel, score, {}, {"VOCAB": 200_064}),
        ("logprob gradient", logprob_backward_kernel, gradient, {}, blocks),
        ("sample", draw_kernel, draw, {}, blocks | {"GREEDY": False}),
        ("sample greedily", draw_kernel, draw, {}, blocks | {"GREEDY": True}),
    ):
        signature = pointers | more | {"temperature": "fp32"}
        spec = CompileSpec(
            f"{name}: fp32", kernel, signature, constants, tuple(pointers), VOCAB_TILE.warps, VOCAB_TILE.stages
        )
        out.append(spec)
    return out
