"""The pretend GPU for transformers' `Trainer` and accelerate, which ask torch for devices in their own way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from model.program import gpu
from tests.support.pretend.device import DEVICE, PretendTensor


def be_the_trainers_gpu() -> None:
    """From now on a trainer works on the pretend device, if ``placement.device`` is cuda: accelerate takes the device
    that its environment names where it sees no GPU. Its checkpoints can be written and read."""
    check, save_file = gpu.check, safetensors.torch.save_file

    def found() -> None:
        check()
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"{DEVICE}:0"

    def save(tensors: Mapping[str, Tensor], *arguments: Any, **named: Any) -> None:
        """From a GPU safetensors copies tensors to the CPU itself; it asks for their addresses before."""
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, *arguments, **named)

    gpu.check = found
    safetensors.torch.save_file = save
    torch.serialization.add_safe_globals([PretendTensor])
