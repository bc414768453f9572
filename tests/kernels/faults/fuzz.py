"""Random mistakes in the arguments of every op, up to three at once: the result is the reference's, or a ValueError.

    python -m tests.kernels.faults.fuzz EXAMPLES FILE NAME…

runs the cases of those names. Native code that goes wrong can end the process, so each example is written to FILE
before its op is called: after a crash the last one lies there. test_fuzz.py starts this as a process of its own.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import dispatch
from tests.kernels.contract import DTYPES, generator
from tests.kernels.faults.cases import CASES, CONSTANT, Inputs, call

CRASH = "crash"  # a case that does: the control

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.uint8, torch.int32, torch.int64)
WILD = (-(2**62), -(2**31), -1, 0, 1, 2, 100, 2**31 - 1, 2**31, 2**62)


def _wild(x: Tensor, seed: int) -> Tensor:
    """Integers that name nothing, at places drawn by ``seed``."""
    if x.is_floating_point() or x.dtype == torch.bool or not x.numel():
        return x
    info, rng, y = torch.iinfo(x.dtype), generator(seed), x.clone()
    values = torch.tensor([min(max(n, info.min), info.max) for n in WILD], dtype=x.dtype)
    place = torch.randint(0, x.numel(), (1 + seed % 3,), generator=rng)
    y.view(-1)[place] = values[torch.randint(0, len(WILD), place.shape, generator=rng)]
    return y


MISTAKES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "another type": lambda x, n: x.to(TYPES[n % len(TYPES)]),
    "elsewhere": lambda x, n: x.to("meta"),
    "no rows": lambda x, n: x[:0] if x.dim() else x,
    "a row less": lambda x, n: x[:-1] if x.dim() else x,
    "a row more": lambda x, n: torch.cat([x, x[:1]]) if x.dim() else x,
    "no columns": lambda x, n: x[..., :0] if x.dim() else x,
    "a column less": lambda x, n: x[..., :-1] if x.dim() else x,
    "an axis more": lambda x, n: x.unsqueeze(n % (x.dim() + 1)),
    "flat": lambda x, n: x.reshape(-1),
    "a number": lambda x, n: torch.ones((), dtype=x.dtype),
    "columns apart": lambda x, n: torch.stack([x, x], -1)[..., 0],
    "rows apart": lambda x, n: torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() else x,
    "turned": lambda x, n: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
    "one row throughout": lambda x, n: x[:1].expand_as(x) if x.dim() and len(x) else x,
    "one number throughout": lambda x, n: x.reshape(-1)[:1].expand(x.shape) if x.dim() and x.numel() else x,
    "from the middle": lambda x, n: torch.cat([x, x])[len(x) // 2 :][: len(x)] if x.dim() else x,
    "wild": _wild,
}


@st.composite
def _arguments(draw: st.DrawFn, name: str) -> tuple[Inputs, dict[str, Any], bool]:
    case = CASES[name]
    rows, width = draw(st.sampled_from([0, 1, 2, 9, 70])), draw(st.sampled_from([0, 1, 2, 13, 16, 33]))
    inputs = case.make(draw(st.integers(0, 99)), rows, width or 1, draw(st.sampled_from(DTYPES)))
    if not width:
        inputs = {key: x[..., :0] if key in (*case.rows, "w") else x for key, x in inputs.items()}
    for key in draw(st.lists(st.sampled_from(sorted(inputs)), max_size=3)):
        if inputs[key].device.type == "cpu":
            inputs[key] = MISTAKES[draw(st.sampled_from(sorted(MISTAKES)))](inputs[key], draw(st.integers(0, 7)))
    numbers = {key: draw(st.sampled_from(odd)) for key, odd in case.numbers.items() if draw(st.integers(0, 4)) == 0}
    return inputs, numbers, draw(st.booleans())


def _results(name: str, inputs: Inputs, numbers: dict[str, Any], backward: bool) -> list[Tensor]:
    """The op's outputs and, if wanted, the gradient of every input that can have one; 0 where none flows."""
    float_keys = [key for key, x in inputs.items() if x.is_floating_point() and key not in CONSTANT]
    leaves = {key: x.detach().requires_grad_(backward and key in float_keys) for key, x in inputs.items()}
    outputs = list(call(name, leaves, **numbers))
    able, wanted = [x for x in outputs if x.requires_grad], [x for x in leaves.values() if x.requires_grad]
    found: list[Tensor | None] = [None] * len(wanted)
    if able:
        found = list(torch.autograd.grad(able, wanted, [torch.ones_like(x) for x in able], allow_unused=True))
    outputs += [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]
    return [x.detach() for x in outputs]


def assert_alike(got: list[Tensor], expected: list[Tensor]) -> None:
    """Same types and shapes; numbers as near as a sum in another order is. Digests are of bits and not compared."""
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, (one.dtype, one.shape, other.dtype, other.shape)
        if one.dtype == torch.int64:
            continue
        size = other.double().nan_to_num(0, 0, 0).abs().max() if other.numel() else 0.0
        bound = (0.05 if other.dtype == torch.bfloat16 else 1e-3) * max(1.0, float(size))
        assert torch.allclose(one.double(), other.double(), rtol=bound, atol=bound, equal_nan=True)


def fuzz(name: str, examples: int, file: Path) -> int:
    """Returns how many of the examples were accepted."""
    accepted = 0

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(_arguments(name))
    def run(arguments: tuple[Inputs, dict[str, Any], bool]) -> None:
        nonlocal accepted
        inputs, numbers, backward = arguments
        tensors = {key: (x.dtype, tuple(x.shape), x.stride(), x.device) for key, x in inputs.items()}
        file.write_text(f"{name}: {tensors}, {numbers}, backward: {backward}")
        dispatch.use_backend("cpu")
        try:
            got = _results(name, inputs, numbers, backward)
        except ValueError:
            return
        accepted += 1
        dispatch.use_backend("reference")
        assert_alike(got, _results(name, inputs, numbers, backward))

    run()
    return accepted


if __name__ == "__main__":
    for chosen in sys.argv[3:]:
        if chosen == CRASH:
            Path(sys.argv[2]).write_text(CRASH)
            ctypes.string_at(0)
        print(f"{chosen}: {fuzz(chosen, int(sys.argv[1]), Path(sys.argv[2]))} of {sys.argv[1]} accepted", flush=True)
