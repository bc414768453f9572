"""One answer on every instruction set: the same inputs with METRONOME_ISA forced to each, digests of all ops compared.

`python -m tests.kernels.test_isa` prints the digests for the set it runs on, so that two machines can be compared too.
bf16 weights and activations are widened to fp32, which is exact, and multiplied by fp32 FMA chains; no set's bf16
dot-product instruction is used (``"bf16": "exact"`` in the contract), which is why bf16 can be compared at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import dispatch, ops
from kernels.cpu import library
from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from tests.kernels.contract import DTYPES, generator, normal, threads

ROOT = Path(__file__).parents[2]
SETS = ["avx2", "avx512"]


def _sha(outputs: tuple[Tensor | None, ...]) -> str:
    digest = hashlib.sha256()
    for x in outputs:
        if x is not None:
            digest.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _with_gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return out, *torch.autograd.grad(out, inputs, normal(77, *out.shape).to(out.dtype))


def _leaf(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(seed, *shape, dtype=dtype).requires_grad_()


def digests(spoil: float = 0.0) -> dict[str, str]:
    """Digest of every op's outputs and gradients, fp32 and bf16. ``spoil`` is added to one input of linear."""
    found: dict[str, str] = {}
    for dtype, short in zip(DTYPES, ("fp32", "bf16"), strict=True):
        for rows, cols in ((1, 61), (7, 128), (150, 513)):
            x, w = _leaf(1, rows, cols, dtype=dtype), _leaf(2, 83, cols, dtype=dtype)
            with torch.no_grad():
                x[0, 0] += spoil
            out = ops.linear(x, ops.pack_linear(w))
            found[f"linear {rows}x{cols} {short}"] = _sha(_with_gradients(out, x, w))
            e = _leaf(3, 5, 83, cols, dtype=dtype)
            expert = torch.randint(0, 5, (2 * rows,), generator=generator(4)).to(torch.int32)
            out = ops.expert_linear(x, ops.pack_experts((e,)), expert, 2)
            found[f"expert_linear {rows}x{cols} {short}"] = _sha(_with_gradients(out, x, e))
            norm = _leaf(5, cols, dtype=dtype)
            found[f"rms_norm {rows}x{cols} {short}"] = _sha(_with_gradients(ops.rms_norm(x, norm, 1e-6), x, norm))
            taps, segments = _leaf(6, cols, 4), Segments.build([0], [0], [rows])
            found[f"short_conv {rows}x{cols} {short}"] = _sha(
                _with_gradients(ops.short_conv(x, taps, segments), x, taps)
            )
            state = normal(7, 1, 3, cols, dtype=dtype)
            with torch.no_grad():
                out = ops.short_conv(x, taps, Segments.build([0], [5], [rows]), state)
            found[f"short_conv state {rows}x{cols} {short}"] = _sha((out, state))
        wide = _leaf(8, 90, 2 * 37, dtype=dtype)
        found[f"swiglu {short}"] = _sha(_with_gradients(ops.swiglu(wide), wide))
        share = _leaf(9, 30, 3)
        found[f"moe_combine {short}"] = _sha(_with_gradients(ops.moe_combine(wide, share), wide, share))
        table, codes = _leaf(10, 7 * 5, 37, dtype=dtype), torch.randint(0, 5, (60, 7), generator=generator(11))
        found[f"embedding_sum {short}"] = _sha(_with_gradients(ops.embedding_sum(codes, table, 5), table))
        for window in (None, 70):
            found[f"attention window {window} {short}"] = _attention(dtype, window)
    found |= _scores()
    for name, low, high in (("vec_exp", -110.0, 95.0), ("vec_log", 1e-40, 1e38)):
        points = torch.linspace(low, high, 100_003)
        out = torch.empty_like(points)
        library.bind(name, "ppi")(points.data_ptr(), out.data_ptr(), points.numel())
        found[name] = _sha((out,))
    return found


def _attention(dtype: torch.dtype, window: int | None) -> str:
    rows, width = 200, 20
    q, k, v = (_leaf(20 + n, rows, heads, width, dtype=dtype) for n, heads in enumerate((4, 2, 2)))
    rel, proj, tau = _leaf(23, rows, 4, 5, dtype=dtype), _leaf(24, 5, 70, dtype=dtype), 1 + normal(25, rows).abs()
    segments = Segments.build([0, 1], [0, 0], [130, 70])
    out = ops.attention(q, k, v, rel, proj, segments, scale=0.2, window=window, tau=tau)
    both = _with_gradients(out, q, k, v, rel, proj)
    pages = PagedKV(
        torch.zeros(6, 2, width, SPLIT_TOKENS, dtype=dtype),
        torch.zeros(6, 2, SPLIT_TOKENS, width, dtype=dtype),
        torch.tensor([[3, 1, 4], [0, 5, 2]], dtype=torch.int32),
    )
    with torch.no_grad():
        cached = ops.attention(q, k, v, rel, proj, segments, scale=0.2, window=window, tau=tau, cache=pages)
    assert torch.equal(cached, out)
    return _sha((*both, pages.key, pages.value))


def _scores() -> dict[str, str]:
    found = {}
    for vocab in (1, 77, 256):
        logits, zero = _leaf(30, 60, vocab), torch.zeros(60, dtype=torch.int64)
        allowed = torch.rand(1, vocab, generator=generator(31)) < 0.7
        allowed[0, 0] = True
        key = torch.randint(-(2**63), 2**63 - 1, (60,), generator=generator(32))
        for temperature in (0.0, 0.7):
            with torch.no_grad():
                drawn = ops.sample(logits, temperature, key, allowed, zero)
            found[f"sample {vocab} at {temperature}"] = _sha(drawn)
        logp, entropy, digest = ops.logprob(logits, drawn[0], 0.7, allowed, zero)
        gradient = torch.autograd.grad(logp.sum() + 0.3 * entropy.sum(), logits)
        found[f"logprob {vocab}"] = _sha((logp, entropy, digest, *gradient))
    for experts, top_k, shared in ((8, 2, 1), (64, 6, 2), (33, 3, 0)):
        logits = _leaf(33, 60, experts + shared)
        expert, weight = ops.route(logits, normal(34, experts) / 10, top_k, shared)
        found[f"route {experts}"] = _sha((expert, *_with_gradients(weight, logits)))
    return found


def _run_forced(isa: str) -> dict[str, str]:
    env = os.environ | {"METRONOME_ISA": isa, "METRONOME_BACKEND": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_isa"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["contract"]["isa"] == isa and result["contract"]["bf16"] == "exact"
    found: dict[str, str] = result["digests"]
    return found


@pytest.mark.parametrize("isa", SETS)
def test_forced_instruction_set(isa: str) -> None:
    """The set forced in a process of its own gives the digests of this process's set."""
    missing = sorted(library._NEEDS[isa] - library._processor_flags())
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    forced, here = _run_forced(isa), digests()
    assert forced == here, {name for name in here if forced[name] != here[name]}


def test_digests_do_not_follow_the_thread_count() -> None:
    with threads(1):
        one = digests()
    with threads(2):
        assert digests() == one


def test_control_one_value() -> None:
    """A digest shows a change of one input in its last place."""
    before, after = digests(), digests(spoil=2.0**-22)
    changed = {name for name in before if before[name] != after[name]}
    assert any(name.startswith("linear") and name.endswith("fp32") for name in changed)
    assert not any(name.startswith(("attention", "sample", "route", "swiglu")) for name in changed)


if __name__ == "__main__":
    json.dump({"contract": dispatch.contract(), "digests": digests()}, sys.stdout, indent=1)
