"""Runs one of our commands with the pretend device in a GPU's place:

    python -m tests.support.pretend.run [--spoil OP] [--fail KIND:KERNEL:N] [--ledger FILE] MODULE ARGUMENT…
    python -m tests.support.pretend.run rl.train --config configs/quickstart.yaml --placement.device cuda

``--spoil`` gives an op a wrong last bit; ``--fail`` breaks the device (`tests.support.pretend.faults`); ``--ledger``
writes the counts of the whole command as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch

from tests.support.pretend.device import DEVICE, install, ledger
from tests.support.pretend.faults import fail_at
from tests.support.pretend.trainer import be_the_trainers_gpu


def be_the_gpu(spoilt: frozenset[str] = frozenset()) -> None:
    """From now on ``placement.device: cuda`` means the pretend device. Once a process, before autograd first runs."""
    install()
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Accelerator(CPU_Accelerator):  # type: ignore[misc]
        def device_name(self, device_index: int | None = None) -> str:
            return DEVICE if device_index is None else f"{DEVICE}:{device_index}"

        def device(self, device_index: int | None = None) -> torch.device:
            return torch.device(f"{DEVICE}:0")

        def current_device_name(self) -> str:
            return f"{DEVICE}:0"

        def current_device(self) -> int:
            return 0

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device.type == DEVICE

    set_accelerator(Accelerator())

    from kernels import dispatch
    from model.program import gpu
    from tests.support.pretend.ops import PretendBackend

    load = dispatch._load
    dispatch._load = lambda name: PretendBackend(spoilt) if name == "triton" else load(name)  # type: ignore[assignment,return-value]
    gpu.check = lambda: None
    gpu.take = lambda local_rank: None
    gpu.memory = lambda device: gpu.Memory(free=2**34, total=2**34, others=0)
    gpu.card = lambda: {"gpu": "pretend GPU"}
    gpu.COLLECTIVES = "gloo"
    be_the_trainers_gpu()


def main(arguments: list[str]) -> None:
    spoilt: frozenset[str] = frozenset()
    report: Path | None = None
    while arguments[0].startswith("--"):
        option, value, *arguments = arguments
        if option == "--spoil":
            spoilt |= {value}
        elif option == "--fail":
            fail_at(value)
        else:
            report = Path(value)
    be_the_gpu(spoilt)
    from model.program.startup import run_command

    module, *rest = arguments
    sys.argv = [module, *rest]
    try:
        run_command(module)
    finally:
        if report is not None:
            report.write_text(json.dumps(ledger.totals()))


if __name__ == "__main__":
    importlib.import_module("tests.support.pretend.run").main(sys.argv[1:])
