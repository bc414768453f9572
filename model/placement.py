"""Where a model's weights, caches and activations lie, what computes with them, and in which number format.

Decided once, from the recipe, before DeepSpeed is imported or processes are joined. Everything else asks the model, or
`kernels.dispatch.device`.

A checkpoint crosses from one device to another: its weights and optimizer's moments are the same bits there, and so is
all that the host makes: codes, seeds, scenarios, the user's audio, the keys and random bits of the noise. What is
computed from these is another contract's (`kernels.dispatch.contract`). So a run is resumed and audited where it began,
and elsewhere refused by name; a new run begins from its weights anywhere (``model.checkpoint``).
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.program import gpu
from model.program.startup import accelerator

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class PlacementConfig:
    """The part of a recipe. The backend follows from the device: ``triton`` on a GPU; on the CPU ``cpu``, or what
    ``METRONOME_BACKEND`` names."""

    device: Device = "cpu"  # one GPU a process


@dataclass(frozen=True)
class Placement:
    """Example: ``Placement("cpu", torch.device("cpu"), torch.float32)``."""

    backend: str
    device: torch.device
    dtype: torch.dtype  # of weights and activations

    @staticmethod
    def enter(config: PlacementConfig, dtype: str) -> Placement:
        """Makes this process, and those that it starts, work there. ``dtype``: "float32" or "bfloat16".

        Raises MetronomeError when there is no GPU, or ``METRONOME_BACKEND`` says otherwise."""
        if config.device == "cuda":
            named = os.environ.get("METRONOME_BACKEND", "triton")
            if named != "triton":
                raise MetronomeError(
                    f"placement.device is cuda, but METRONOME_BACKEND={named} works on the CPU: unset it, or give "
                    "--placement.device cpu"
                )
            gpu.check()
            os.environ |= {"METRONOME_BACKEND": "triton", "DS_ACCELERATOR": "cuda"}
            dispatch.use_backend("triton")
        elif dispatch.device().type != "cpu":
            raise MetronomeError(
                f"placement.device is cpu, but METRONOME_BACKEND={os.environ.get('METRONOME_BACKEND')} works on a GPU: "
                "give --placement.device cuda, or unset it"
            )
        return Placement(dispatch.backend().NAME, dispatch.device(), getattr(torch, dtype))


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option of a command that has no recipe; its longer name is the recipes'."""
    parser.add_argument(
        *("--device", "--placement.device"), choices=get_args(Device), default=accelerator(),
        help="where it computes (default: cpu, or where METRONOME_BACKEND does)",
    )  # fmt: skip
