"""What the program asks of a GPU's driver, in one place: whether one can be used, which one is ours, what it has left.

Nothing here is called unless the recipe's ``placement.device`` is cuda. What goes wrong with a GPU in the middle of the
work is told by `model.program.gpu_faults`.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.errors import MetronomeError
from model.program.launched import Launched
from model.program.startup import interpreted

COLLECTIVES = "cpu:gloo,cuda:nccl"
"""torch.distributed's backends between processes on GPUs: tensors there by nccl, objects and CPU tensors by gloo. Where
a group has one for the CPU, torch sends objects by that, so that no record passes through a GPU. DeepSpeed takes the
group that it finds, and new groups have its backends."""

OLDEST = (8, 0)
"""NVIDIA's compute capability from which cards have the bf16 matrix instructions that the kernels are compiled to
(`kernels.tools.compile_report`)."""

CONTEXT_BYTES = 2**30
"""At most so much of a card a process takes beside what torch counts: its context and the code of kernels."""

_OTHERWISE = "or give --placement.device cpu to run without one"
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Memory:
    """Of one GPU, in bytes."""

    free: int  # for this process: what nobody has, and what torch keeps for its next tensors
    total: int
    others: int  # held by other processes, at least


def check() -> None:
    """Raises MetronomeError when this process cannot have a GPU that the kernels run on, saying why and what to do. No
    memory of a card is taken."""
    if interpreted():
        raise MetronomeError(
            "placement.device is cuda, but TRITON_INTERPRET is set, by which Triton's kernels run on the CPU: "
            "`unset TRITON_INTERPRET`, or give --placement.device cpu"
        )
    if torch.version.cuda is None and torch.version.hip is None:
        raise MetronomeError(
            f"placement.device is cuda, but torch {torch.__version__} is built for the CPU: install its build for your "
            f"GPU (https://pytorch.org/get-started/locally), {_OTHERWISE}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of cards that are too old, which `_check_card` tells
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise MetronomeError(f"placement.device is cuda, but {_why_none(str(error))}") from error
    launched = Launched.read()
    _check_count(1 if launched is None else launched.local_world)
    _check_card(0 if launched is None else launched.local_rank)
    _check_triton()


def take(local_rank: int) -> None:
    """Makes the GPU of that number this process's own, one GPU a process. Raises MetronomeError where there is no such
    GPU, or it does not answer, as when another process has it to itself."""
    _check_count(local_rank + 1)
    try:
        torch.cuda.set_device(local_rank)
        memory(torch.device("cuda", local_rank))  # the first call that the card itself must answer
    except RuntimeError as error:
        raise MetronomeError(
            f"GPU {local_rank} cannot be had ({_first_line(str(error))}): `nvidia-smi` lists what else runs there and "
            "holds its memory (`-q -d COMPUTE` says whether one process may have it to itself); end that, or take "
            "another card by CUDA_VISIBLE_DEVICES"
        ) from error


def memory(device: torch.device) -> Memory:
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    unused = reserved - torch.cuda.memory_allocated(device)
    return Memory(free + unused, total, max(0, total - free - reserved - CONTEXT_BYTES))


def card() -> dict[str, Any]:
    """This process's GPU: ``{"gpu": "NVIDIA H100 80GB HBM3", "gpu_memory_bytes": 84929347584, "gpu_driver":
    "580.65.06", "cuda": "13.0"}``. The last is what torch is built for: CUDA's version, or ROCm's."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory_bytes": torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
        "gpu_driver": driver(),
        "cuda": torch.version.cuda or torch.version.hip,
    }


def driver(file: Path = _DRIVER) -> str | None:
    """The version of NVIDIA's driver, "580.65.06"; None where Linux does not say."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", file.read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def _why_none(error: str) -> str:
    """Why CUDA did not start, and what to do, by torch's text (c10/cuda/CUDAFunctions.cpp)."""
    version = torch.version.cuda or torch.version.hip
    mine = f"torch {torch.__version__}, built for {'CUDA' if torch.version.cuda else 'ROCm'} {version},"
    lists = "`nvidia-smi -L`" if torch.version.cuda else "`amd-smi list`"
    hidden = next((f"{name}={os.environ[name]!r}" for name in _VISIBLE if name in os.environ), None)
    if found := re.search(r"driver on your system is too old \(found version (\d+)\)", error):
        knows = f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}"
        return (
            f"this machine's NVIDIA driver{f' {installed}' if (installed := driver()) else ''} knows CUDA {knows}, and "
            f"{mine} needs a newer one: update the driver, install a torch built for CUDA {knows}, {_OTHERWISE}"
        )
    if "Found no NVIDIA driver" in error:
        return (
            f"{mine} finds no driver: see that `nvidia-smi` works, also within a container (docker's `--gpus all`), "
            f"{_OTHERWISE}"
        )
    if re.search(r"No (CUDA|HIP) GPUs are available", error):
        if hidden is not None:
            return f"{hidden} names no GPU of this machine: {lists} numbers them; mend it, {_OTHERWISE}"
        return f"{mine} finds no GPU: {lists} shows the machine's; {_OTHERWISE.removeprefix('or ')}"
    said = f" (with {hidden})" if hidden else ""
    why = _first_line(error[error.find("Error ") :] if "cudaGetDeviceCount" in error else error)
    return f"{mine} cannot start it{said}: {why}; see that {lists} works, {_OTHERWISE}"


def _check_count(processes: int) -> None:
    """Raises MetronomeError when this machine has fewer GPUs than the run has processes on it."""
    count = torch.cuda.device_count()
    if processes > count:
        hidden = ", ".join(f"{name}={os.environ[name]!r}" for name in _VISIBLE if name in os.environ)
        raise MetronomeError(
            f"the run has {processes} processes on this machine, and torch sees {count} GPU{'s' * (count != 1)}"
            f"{f' ({hidden})' if hidden else ''}: each process takes one. Give the launcher --num_processes {count}, "
            "or make more GPUs visible"
        )


def _check_card(index: int) -> None:
    if torch.version.hip is not None:
        return
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        has, needs = (".".join(map(str, one)) for one in (capability, OLDEST))
        raise MetronomeError(
            f"GPU {index}, {torch.cuda.get_device_name(index)}, has compute capability {has}, and the kernels need "
            f"{needs} or newer (bf16 matrix instructions): take a newer card (CUDA_VISIBLE_DEVICES chooses), "
            f"{_OTHERWISE}"
        )


def _check_triton() -> None:
    """Raises MetronomeError unless Triton's own part for this GPU works, which it compiles at its first use."""
    importlib.import_module("kernels.triton.library").check()
    triton: Any = importlib.import_module("triton")
    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, AssertionError, OSError, subprocess.CalledProcessError) as error:
        said = _first_line(str(error)).removesuffix(".")
        problem = f"Triton {triton.__version__} cannot start on this machine ({said})"
        raise MetronomeError(f"{problem}: {_cure(said)}") from error


def _cure(said: str) -> str:
    cache = f"its cache, {os.environ.get('TRITON_CACHE_DIR') or '~/.triton/cache'} (TRITON_CACHE_DIR),"
    if "active drivers" in said or "libcuda" in said:
        return "it must find one kind of GPU, and its driver's libcuda.so.1 (TRITON_LIBCUDA_PATH names its folder)"
    if "Permission denied" in said or "Read-only" in said or "No space" in said:
        return f"{cache} must be a folder that can be written into"
    return (
        "it compiles a little C at its first use and needs gcc or clang (or what CC names), Python's headers "
        f"(Debian's python3-dev), and {cache} to write into"
    )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200] or "no reason given"
