"""The Triton backend's own host code on the pretend device, its kernels in Triton's interpreter: what is launched,
copied and waited for is counted in the `ledger`, and each tensor that a kernel is given must lie on the device.

Needs TRITON_INTERPRET=1 from the start of the process and METRONOME_BACKEND=triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.pretend.device import DEVICE, PretendTensor, install, ledger, where


def be_tritons_device() -> None:
    """From now on the Triton backend works on the pretend device. Once a process, before autograd first runs."""
    install()
    from kernels import dispatch
    from kernels.triton import backend, launch
    from model.program import gpu
    from tests.kernels.interpreter import quicken

    assert launch.INTERPRET and dispatch.backend() is backend
    quicken()
    launch.PLACE = backend.DEVICE = DEVICE
    launch.launch = _launch
    gpu.memory = lambda device: gpu.Memory(free=2**34, total=2**34, others=0)


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    ledger.kernel(kernel.fn.__name__)
    assert device.type == DEVICE, f"{kernel.fn.__name__} is launched on {device} ({where()})"
    for x in args:
        if isinstance(x, Tensor) and not isinstance(x, PretendTensor):
            raise RuntimeError(f"{kernel.fn.__name__}: an argument {tuple(x.shape)} lies on {x.device} ({where()})")
    kernel[grid](*(x.raw.detach() if isinstance(x, PretendTensor) else x for x in args), **named)
