"""What the program asks of a GPU's driver, in one place: whether one can be used, which one is ours, what it has left.

Nothing here is called unless the recipe's ``placement.device`` is cuda, except `name`.
"""

from __future__ import annotations

import torch

from kernels.errors import MetronomeError

COLLECTIVES = "cpu:gloo,cuda:nccl"
"""torch.distributed's backends between processes on GPUs: tensors there by nccl, objects and CPU tensors by gloo."""


def check() -> None:
    """Raises MetronomeError when no GPU can be used, saying why and what to do."""
    if not torch.cuda.is_available():
        build = "a build for the CPU" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        raise MetronomeError(
            f"placement.device is cuda, but torch {torch.__version__} ({build}) finds no GPU. `nvidia-smi` lists the "
            "machine's; give --placement.device cpu to run without one"
        )


def take(local_rank: int) -> None:
    """Makes the GPU of that number this process's own: one GPU a process."""
    torch.cuda.set_device(local_rank)


def free_bytes(device: torch.device) -> int:
    """Memory of ``device`` that nobody uses."""
    return torch.cuda.mem_get_info(device)[0]


def name() -> str | None:
    """The GPU's name, "NVIDIA H100 80GB HBM3"; None where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
