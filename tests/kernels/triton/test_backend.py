"""The Triton backend behind `kernels.ops`: chosen, named in the contract, refused where nothing can run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch, ops
from kernels.triton import launch
from tests.kernels.contract import normal
from tests.kernels.triton.device import DEVICE_VARIABLE, device


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    dispatch.use_backend("triton")
    yield
    dispatch.use_backend("cpu")


def test_contract_names_what_decides_bits() -> None:
    contract = dispatch.contract()
    assert contract["backend"] == "triton"
    assert (contract["isa"] == "interpreter") == launch.INTERPRET
    assert "fp_fusion False" in str(contract["numerics"])
    assert str(launch.product_tile(torch.bfloat16)) in str(contract["numerics"])


def test_ops_reach_the_backend() -> None:
    w, x = normal(1, 8, 16).to(device()), normal(2, 3, 16).to(device())
    packed = ops.pack_linear(w)
    before = ops.linear(x, packed)
    w *= 2
    ops.repack(packed)
    assert torch.equal(ops.linear(x, packed), 2 * before)
    experts = ops.pack_experts((w[None],))
    expert = torch.zeros(3, dtype=torch.int32, device=device())
    assert torch.equal(ops.expert_linear(x, experts, expert), 2 * before)
    ops.repack(experts)


def test_packs_of_another_backend_are_refused() -> None:
    dispatch.use_backend("cpu")
    packed = ops.pack_linear(normal(1, 8, 16))
    dispatch.use_backend("triton")
    with pytest.raises(ValueError, match=r"made by another backend.*use_backend\('triton'\)"):
        ops.linear(normal(2, 3, 16).to(device()), packed)


def test_every_kernel_has_a_spec_for_compiling() -> None:
    """Names come once, every argument of a kernel has a type or a value, hints name arguments that have a type."""
    specs = launch.compile_specs()
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        assert set(spec.signature) | set(spec.constexprs) == set(spec.fn.arg_names), spec.name
        assert not set(spec.signature) & set(spec.constexprs) and set(spec.divisible) <= set(spec.signature), spec.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_refused_without_gpu_and_interpreter() -> None:
    hidden = {"TRITON_INTERPRET", DEVICE_VARIABLE}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-c", "from kernels import dispatch; dispatch.use_backend('triton')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode and "the triton backend needs a GPU" in done.stderr
