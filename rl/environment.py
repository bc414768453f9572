"""The software and hardware of a run, written beside its results so that a difference of two runs can be traced."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kernels import dispatch
from model.program import gpu, teams

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "numpy", "safetensors", "soundfile", "triton")


def environment() -> dict[str, Any]:
    """The content of environment.json, as plain values. No result of the run depends on it. A team of processes counts
    as one, because it sums gradients as one does."""
    return computing() | {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        **({"gpu": None} if dispatch.device().type == "cpu" else gpu.card()),
        "cores": os.cpu_count(),
        "processes": teams.count(),
        "threads": torch.get_num_threads(),
        "command": shlex.join([sys.executable, *sys.orig_argv[1:]]),
        "git_commit": _git_commit(Path(__file__).resolve().parent.parent),
    }


def computing() -> dict[str, Any]:
    """The part of it that says what computes."""
    return {
        "contract_id": dispatch.contract_id(),
        "contract": dispatch.contract(),
        "instruction_set": dispatch.instruction_set(),
    }


def contract_in_words(environment: Mapping[str, Any]) -> str:
    """The contract of an environment.json that may be anybody's: ``contract 9428813e9a92ad76 (triton on sm_90)``. The
    CPU's instruction sets share one, and are not named."""
    contract, words = environment.get("contract"), f"contract {environment.get('contract_id')}"
    names = [contract.get("backend") if isinstance(contract, dict) else None, environment.get("instruction_set")]
    backend, place = (name if isinstance(name, str) and name.isidentifier() else "unknown" for name in names)
    return f"{words} ({backend} on {place})" if backend == "triton" else f"{words} ({backend})"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _git_commit(root: Path) -> str | None:
    """The commit, with ``+changes`` when tracked files differ from it; None outside a repository or without git."""
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
