"""Pointers that no element's size divides: x86 loads them all the same.

In a file of its own because C++ forbids them: .ci/sanitize, which would report each, leaves this file out.
"""

from __future__ import annotations

import pytest
import torch

from kernels import noise
from kernels.cpu.library import bind
from tests.kernels.contract import DTYPES
from tests.kernels.faults.cases import BY_NAME, CASES, call, same
from tests.kernels.faults.test_memory import moved


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_byte_off(name: str, dtype: torch.dtype) -> None:
    inputs = CASES[name].make(5, 11, 19, dtype)
    same(CASES[name].call({key: moved(x, 1) for key, x in inputs.items()}), call(name, inputs), name)


def test_normal_noise_one_byte_off() -> None:
    """No op, so no case of the list: its keys, and the native code's output."""
    key = torch.arange(-3, 4)
    whole = noise.normal(key, 77)
    assert torch.equal(noise.normal(moved(key, 1), 77), whole)
    out = moved(torch.zeros_like(whole), 1)
    bind("normal_rows", "piip")(key.data_ptr(), len(key), 77, out.data_ptr())
    assert torch.equal(out, whole)
