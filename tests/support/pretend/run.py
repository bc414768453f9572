"""Runs one of our commands with the pretend device in a GPU's place, or several, one after another in one process:

    python -m tests.support.pretend.run [OPTION…] MODULE ARGUMENT… [+ [OPTION…] MODULE ARGUMENT…]…
    python -m tests.support.pretend.run rl.train --config configs/quickstart.yaml --placement.device cuda

``--spoil OP[:WHO]`` gives an op a wrong last bit, in all calls or those of WHO, "learner" or "sampler"; ``--fail
KIND:KERNEL:N`` breaks the device (`tests.support.pretend.faults`); ``--patch MODULE`` imports a module that changes the
program; ``--ledger FILE`` writes the counts of the whole command as JSON. Several commands share one world of
processes, and each one's exit status is printed after it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

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
    from rollout.engines.vllm import process
    from tests.support.pretend.ops import PretendBackend

    load = dispatch._load
    dispatch._load = lambda name: PretendBackend(spoilt) if name == "triton" else load(name)  # type: ignore[assignment,return-value]
    gpu.check = lambda: None
    gpu.take = lambda local_rank: None
    gpu.memory = lambda device: gpu.Memory(free=2**34, total=2**34, others=0)
    gpu.card = lambda: {"gpu": "pretend GPU"}
    gpu.COLLECTIVES = "gloo"
    process.unavailable_reason = lambda: "vLLM does not know the pretend GPU"
    be_the_trainers_gpu()


def main(arguments: list[str]) -> None:
    install()
    commands = [list(part) for plus, part in itertools.groupby(arguments, lambda x: x == "+") if not plus]
    if len(commands) == 1:
        one(commands[0])
        return
    from model.program import ranks

    be_the_gpu()
    with ranks.joined():  # a process has one world
        for command in commands:
            try:
                one(command)
                status: Any = 0
            except SystemExit as end:
                status = end.code or 0
            except Exception:
                traceback.print_exc(file=sys.stdout)
                status = 1
            print(f"exit status {status}", flush=True)


def one(arguments: list[str]) -> None:
    """Runs one command, and exits with its status."""
    spoilt: frozenset[str] = frozenset()
    report: Path | None = None
    while arguments[0].startswith("--"):
        option, value, *arguments = arguments
        if option == "--spoil":
            spoilt |= {value}
        elif option == "--fail":
            fail_at(value)
        elif option == "--patch":
            importlib.import_module(value)
        else:
            report = Path(value)
    be_the_gpu(spoilt)
    from model.program.startup import run_command

    module, *rest = arguments
    sys.argv = [module, *rest]
    ledger.clear()
    try:
        run_command(module)
    finally:
        if report is not None:
            report.write_text(json.dumps(ledger.totals()))


if __name__ == "__mp_main__":  # a process that the command has started by multiprocessing's "spawn"
    be_the_gpu()
if __name__ == "__main__":
    importlib.import_module("tests.support.pretend.run").main(sys.argv[1:])
