"""The sampler's Gumbel noise on this backend against decimal arithmetic, and the interpreter's conversion to fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import run
from kernels.triton.sampling import gumbel
from kernels.triton.tiles import Tile
from tests.kernels.backend import device
from tests.kernels.noise import ULPS, exact_noise, to_24_bits, words

BLOCK = 1024


@triton.jit
def noise_kernel(word, noise, number, count, BLOCK: tl.constexpr):
    """noise[i] of word[i], and number[i] = fp32(word[i])."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(word + at, mask=at < count, other=0)
    tl.store(noise + at, gumbel(mine.to(tl.uint64, bitcast=True)), mask=at < count)
    tl.store(number + at, mine.to(tl.float32), mask=at < count)


def test_exact() -> None:
    """Noise within a few units of the last place; int64 to fp32 rounds once, to nearest, as Python's integers say: by
    way of float64, which is the control, it would round twice."""
    word = words()
    noise, number = (torch.empty(len(word), device=device()) for _ in range(2))
    grid = (triton.cdiv(len(word), BLOCK),)
    run(
        noise_kernel,
        grid,
        noise.device,
        Tile(1, BLOCK, 1, 4, 1),
        word.to(device()),
        noise,
        number,
        len(word),
        BLOCK=BLOCK,
    )
    exact = torch.tensor([exact_noise(w) for w in word.tolist()], dtype=torch.float64)
    unit = 2.0**-24 * exact.abs().clamp(min=1)
    assert float(((noise.cpu().double() - exact).abs() / unit).max()) <= ULPS
    once = torch.tensor([to_24_bits(w) for w in word.tolist()], dtype=torch.float64)
    assert torch.equal(number.cpu().double(), once)
    assert not torch.equal(word.double().float().double(), once)
