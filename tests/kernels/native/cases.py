"""Digests of what every op gives on one set of inputs, to compare instruction sets, builds and machines.

    METRONOME_ISA=avx2 python -m tests.kernels.native.cases

prints them with the contract. Widths leave every remainder of a vector and of a panel; values include zeros of both
signs, denormals, infinities and NaN.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch
from torch import Tensor

from kernels import dispatch, ops
from kernels.cpu import library
from kernels.cpu import noise as native_noise
from kernels.cpu.dmel import transform
from kernels.exact import roots_of_unity
from kernels.layout import SPLIT_TOKENS, AdamWStep, DMelTables, PagedKV, Segments
from tests.kernels.contract import DTYPES, generator, normal
from tests.kernels.noise import normal_words, words

Digests = dict[str, str]

SHAPES = ((1, 61), (7, 128), (150, 513))  # rows, columns
NARROW = (1, 2, 3, 8, 9, 15, 16, 17, 31, 33, 40)  # columns


def digests(spoil: float = 0.0) -> Digests:
    """Digest of every op's outputs and gradients, fp32 and bf16. ``spoil`` is added to one input of linear."""
    found: Digests = {}
    for dtype, short in zip(DTYPES, ("fp32", "bf16"), strict=True):
        for rows, cols in SHAPES:
            found |= _rows(f"{rows}x{cols} {short}", _leaf(1, rows, cols, dtype=dtype), 83, spoil)
        for cols in NARROW:
            found |= _rows(f"5x{cols} {short}", _leaf(1, 5, cols, dtype=dtype), cols)
            found |= _rows(f"strange 14x{cols} {short}", _strange(1, 14, cols, dtype=dtype), 1 + cols % 3)
        for window, first in ((None, 0), (70, 0), (20, 64)):
            found[f"attention window {window} first {first} {short}"] = _attention(dtype, window, first)
    found |= _scores() | _functions() | _dmel() | _normal() | _updates()
    return found


def sha(outputs: tuple[Tensor | None, ...]) -> str:
    """Of the outputs' bits; every NaN counts as one and the same."""
    digest = hashlib.sha256()
    for x in outputs:
        if x is not None:
            one = torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x
            digest.update(one.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _leaf(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(seed, *shape, dtype=dtype).requires_grad_()


def _strange(seed: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Random numbers, then rows with one value each that is out of the ordinary."""
    x = normal(seed, rows, cols, dtype=dtype)
    values = (0.0, -0.0, 1e-40, -1e-40, 1e-45, 3e38, -3e38, 1e-30, torch.inf, -torch.inf, torch.nan)
    for row, value in enumerate(values, 1):
        x[row, row % cols] = value
    return x.requires_grad_()


def _with_gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return out, *torch.autograd.grad(out, inputs, normal(77, *out.shape).to(out.dtype))


def _rows(name: str, x: Tensor, columns: int, spoil: float = 0.0) -> Digests:
    """Every op that takes rows [T, C], on ``x``; ``columns`` is the number that linear gives."""
    (rows, cols), dtype = x.shape, x.dtype
    found = {}
    other = _leaf(2, columns, cols, dtype=dtype)
    spoilt = x.detach().clone().requires_grad_()
    with torch.no_grad():
        spoilt[0, 0] += spoil
    found["linear"] = _with_gradients(ops.linear(spoilt, ops.pack_linear(other)), spoilt, other)
    with torch.no_grad():
        mixed = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
        found["linear to the other type"] = (ops.linear(x, ops.pack_linear(other), mixed),)
    weights = _leaf(3, 5, columns, cols, dtype=dtype)
    expert = torch.randint(0, 5, (2 * rows,), generator=generator(4)).to(torch.int32)
    found["expert_linear"] = _with_gradients(ops.expert_linear(x, ops.pack_experts((weights,)), expert, 2), x, weights)
    scale = _leaf(5, cols, dtype=dtype)
    found["rms_norm"] = _with_gradients(ops.rms_norm(x, scale, 1e-6), x, scale)
    taps, segments = _leaf(6, cols, 4), Segments.build([0], [0], [rows])
    found["short_conv"] = _with_gradients(ops.short_conv(x, taps, segments), x, taps)
    state = normal(7, 1, 3, cols, dtype=dtype)
    with torch.no_grad():
        found["short_conv state"] = (ops.short_conv(x, taps, Segments.build([0], [5], [rows]), state), state)
    wide = torch.cat([x, x.roll(1, 0)], dim=1).detach().requires_grad_()
    found["swiglu"] = _with_gradients(ops.swiglu(wide), wide)
    found["gelu"] = _with_gradients(ops.gelu(x), x)
    share = _leaf(9, rows, 3)
    three = torch.cat([x, x * 2, x * 3]).detach().requires_grad_()
    found["moe_combine"] = _with_gradients(ops.moe_combine(three, share), three, share)
    table = torch.cat([x] * 35)[:35].detach().requires_grad_()
    for code in (torch.uint8, torch.int16, torch.int32, torch.int64):
        codes = torch.randint(0, 5, (6, 7), generator=generator(11)).to(code)
        found[f"embedding_sum {code}"] = _with_gradients(ops.embedding_sum(codes, table, 5), table)
    return {f"{op} {name}": sha(outputs) for op, outputs in found.items()}


def _attention(dtype: torch.dtype, window: int | None, first: int) -> str:
    rows, width = 200, 20
    q, k, v = (_leaf(20 + n, rows, heads, width, dtype=dtype) for n, heads in enumerate((4, 2, 2)))
    rel, proj, tau = _leaf(23, rows, 4, 5, dtype=dtype), _leaf(24, 5, 70, dtype=dtype), 1 + normal(25, rows).abs()
    segments = Segments.build([0, 1], [0, 0], [130, 70])
    how = {"scale": 0.2, "window": window, "first": first, "tau": tau}
    out = ops.attention(q, k, v, rel, proj, segments, **how)
    both = _with_gradients(out, q, k, v, rel, proj)
    pages = PagedKV(
        torch.zeros(6, 2, width, SPLIT_TOKENS, dtype=dtype),
        torch.zeros(6, 2, SPLIT_TOKENS, width, dtype=dtype),
        torch.tensor([[3, 1, 4], [0, 5, 2]], dtype=torch.int32),
    )
    with torch.no_grad():
        cached = ops.attention(q, k, v, rel, proj, segments, cache=pages, **how)
    assert torch.equal(cached, out)
    narrow = []
    for heads_width in (1, 7, 16, 33):
        parts = [_strange(heads_width, 14, heads_width, dtype)[:, None].detach() for _ in range(3)]
        narrow.append(
            ops.attention(*parts, rel[:14, :1].detach(), proj.detach(), Segments.build([0], [0], [14]), scale=1.0)
        )
    return sha((*both, pages.key, pages.value, *narrow))


def _scores() -> Digests:
    found = {}
    for vocab in (1, 15, 77, 256):
        logits, zero = _leaf(30, 60, vocab), torch.zeros(60, dtype=torch.int64)
        allowed = torch.rand(1, vocab, generator=generator(31)) < 0.7
        allowed[0, 0] = True
        with torch.no_grad():
            logits[3, 1:] = -torch.inf
            logits[4] = 1e-40
            logits[5, 0] = 2e38
        key = torch.randint(-(2**63), 2**63 - 1, (60,), generator=generator(32))
        for temperature in (0.0, 0.7):
            with torch.no_grad():
                drawn = ops.sample(logits, temperature, key, allowed, zero)
            found[f"sample {vocab} at {temperature}"] = sha(drawn)
        logp, entropy, digest = ops.logprob(logits, drawn[0], 0.7, allowed, zero)
        gradient = torch.autograd.grad(logp.sum() + 0.3 * entropy.sum(), logits)
        found[f"logprob {vocab}"] = sha((logp, entropy, digest, *gradient))
    for experts, top_k, shared in ((8, 2, 1), (64, 6, 2), (33, 3, 0), (3, 1, 0)):
        logits = _leaf(33, 60, experts + shared)
        expert, weight = ops.route(logits, normal(34, experts) / 10, top_k, shared)
        found[f"route {experts}"] = sha((expert, *_with_gradients(weight, logits)))
    return found


def _functions() -> Digests:
    found = {}
    for name, low, high in (("vec_exp", -110.0, 95.0), ("vec_log", 1e-40, 1e38)):
        points = torch.cat([torch.linspace(low, high, 30_001), _strange(35, 14, 3, torch.float32).detach().view(-1)])
        out = torch.empty_like(points)
        library.bind(name, "ppi")(points.data_ptr(), out.data_ptr(), points.numel())
        found[name] = sha((out,))
    word = words()
    noise = torch.empty(len(word))
    library.bind("vec_gumbel", "ppi")(word.data_ptr(), noise.data_ptr(), len(word))
    tails = torch.linspace(-20, 20, 30_001)[None].requires_grad_()
    gelu = sha(_with_gradients(ops.gelu(tails), tails))
    return found | {"vec_gumbel": sha((noise,)), "gelu, both tails": gelu}


def _updates() -> Digests:
    """Sums over whole tensors and AdamW's updates, of sizes that leave every remainder of a vector and of a block."""
    found = {}
    step = AdamWStep.build(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.02, taken=3)
    for size in (1, 5, 8, 13, 31, 4096, 4103, 20_011):
        state = [normal(50, size), normal(51, size), normal(52, size), normal(53, size).square()]
        found[f"dot {size}"] = sha((ops.dot(state[0], state[1]),))
        ops.adamw(*state, step)
        found[f"adamw {size}"] = sha(tuple(state))
    return found


def _dmel() -> Digests:
    """Of mel values and codes: one frame more than fills a block, filters of all lengths to 5, channels to spare."""
    samples, channels = normal(40, 3, 1600 + 2 * 800), 6
    first, weight = torch.arange(1, 1 + 131 * channels, 131), normal(42, channels, 5).abs().double()
    weight *= torch.arange(5) <= torch.arange(channels)[:, None] % 5
    roots, edges = torch.from_numpy(roots_of_unity(1600, 1600)), torch.linspace(1, 60, 7, dtype=torch.float64)
    tables = DMelTables(normal(41, 1600).double(), roots, first, weight, edges)
    return {"dmel": sha(transform(samples, 800, tables))}


def _normal() -> Digests:
    """Of normal noise: rows that leave remainders of a vector and of a block; fp64 of words of the centre and tails."""
    key = torch.randint(-(2**63), 2**63 - 1, (3,), generator=generator(60))
    rows = tuple(native_noise.normal(key, count) for count in (1, 3, 8, 13, 511, 512, 1045))
    return {"normal": sha((*rows, native_noise.of_words(normal_words())))}


if __name__ == "__main__":
    described = {"contract": dispatch.contract(), "instruction_set": dispatch.instruction_set()}
    json.dump(described | {"digests": digests()}, sys.stdout, indent=1)
