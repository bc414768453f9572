"""A GPU that runs out of memory, faults or is lost in the middle of the work: `sentence` says it in one line, for
`model.program.exhausted`. (What is wrong before the work begins, `model.program.gpu` says.)

CUDA's errors reach Python as a RuntimeError of torch (``torch.OutOfMemoryError``, ``torch.AcceleratorError``,
``DistBackendError``) or of Triton, so they are told apart by CUDA's own words. Only those that a machine or a user can
cause are listed: "invalid argument" and its like are defects, and keep their traceback. Some are either, as an address
that is not allowed; then the message says how to see more. Imports nothing but the standard library.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cusolver_status_alloc_failed", "failed to cuda calloc")

_CALL = re.compile(r"(?:CUDA|HIP|CUDA driver) error: |Triton Error \[(?:CUDA|HIP)\]: |(?:Cuda|HIP) failure (?:\d+ )?'?")
"""What stands before the driver's words in an error of torch, of Triton and of NCCL."""

_KEPT = "Finished files are whole"

_RESUME = f"{_KEPT}, and the run can go on with --resume"


class Fault(NamedTuple):
    words: tuple[str, ...]  # of cudaGetErrorString, any of them; small letters
    what: str
    remedy: str


FAULTS = (
    Fault(
        ("busy or unavailable", "exclusive-process"),
        "the GPU cannot be had",
        "another process has it to itself (`nvidia-smi` lists them; `-q -d COMPUTE` shows its mode), or it is being "
        f"reset. End the other one, or take another card by CUDA_VISIBLE_DEVICES. {_RESUME}",
    ),
    Fault(
        ("no kernel image is available", "unsupported toolchain", "kernel image is invalid", "driver version is ins"),
        "the GPU or its driver does not fit this program's torch and Triton",
        "update the driver, or install the torch and the Triton that know this card "
        f"(https://pytorch.org/get-started/locally). {_KEPT}",
    ),
    Fault(
        (
            "gpu is lost", "ecc error", "no cuda-capable device", "no rocm-capable device", "unknown error", "nvlink",
            "hardware stack error", "not yet initialized", "initialization error", "driver shutting down",
            "launch timed out",
        ),
        "the GPU is lost or fails",
        f"`nvidia-smi` and the kernel's log (`dmesg`, Xid) say why; reset it or take another of its kind. {_RESUME}",
    ),
    Fault(
        (
            "unspecified launch failure", "illegal memory access", "misaligned address", "illegal instruction",
            "device-side assert", "invalid program counter", "global/shared address space",
        ),
        "a kernel failed on the GPU",
        f"{_RESUME}. If it fails there again, it is a defect: CUDA_LAUNCH_BLOCKING=1 METRONOME_TRACEBACK=1 shows where",
    ),
)  # fmt: skip

NCCL = ("ncclUnhandledCudaError", "ncclSystemError", "Watchdog caught collective operation timeout")
"""What the processes' exchange fails with where neither the program nor another process is at fault."""


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ran out."""
    text = str(error).lower()
    named = type(error).__name__ == "OutOfMemoryError" or re.search(r"\b(cuda|hip)\b", text) is not None
    return isinstance(error, RuntimeError) and named and any(words in text for words in _MEMORY)


def sentence(error: BaseException, phase: str = "", lower: str = "") -> str | None:
    """What happened to the GPU, and what to do; None for an error of another kind. ``phase``: of the work, in which its
    memory ran out; ``lower``: what makes it need less."""
    text = str(error)
    if out_of_memory(error):
        return _memory(text, phase, lower)
    if type(error).__module__.startswith("triton."):
        return _compiling(type(error).__name__, text)
    if not isinstance(error, RuntimeError):
        return None
    if call := _CALL.search(text):
        said = text[call.end() :].partition("\n")[0].strip(" '.")
        for fault in FAULTS:
            if any(words in said.lower() for words in fault.words):
                return f"{fault.what} ({said}): {fault.remedy}"
    if any(name in text for name in NCCL):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = lines[-1] if "Last error:" in lines else next(x for x in lines if any(name in x for name in NCCL))
        return (
            f"the GPUs of this run cannot exchange data ({said[:200].rstrip('.')}): NCCL_DEBUG=INFO says more; see "
            f"`nvidia-smi`, /dev/shm's space and the network between machines. {_RESUME}"
        )
    return None


def _memory(text: str, phase: str, lower: str) -> str:
    facts, remedy = [], lower or "use a smaller model or batch"
    if asked := re.search(r"Tried to allocate ([\d.]+ \w+)", text):
        facts.append(f"{asked[1]} asked for")
    if room := re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text):
        facts.append(f"{room[2]} of {room[1]} free")
    if others := re.findall(r"Process (\d+) has ([\d.]+ \w+) memory", text):
        facts += [f"process {who} holds {much}" for who, much in others]
        remedy = f"end what else runs there (`nvidia-smi`), or {remedy}"
    said = f" ({', '.join(facts)})" if facts else ""
    during = f" in {phase}" if phase else ""
    return (
        f"the GPU's memory ran out{during}{said}: {remedy}. {_KEPT}; as soon as the card has room, the run can go on "
        "with --resume"
    )


def _compiling(name: str, text: str) -> str | None:
    """Of an error of Triton's own class: what of them a machine causes."""
    if name == "PTXASError":
        own = re.search(r"stderr:\s*(\S[^\n]*)", text)
        said = own[1] if own else text.partition("\n")[0]
        return (
            f"Triton's ptxas cannot compile a kernel for this GPU ({said[:200]}): install the Triton that belongs to "
            f"this torch; TRITON_PTXAS_PATH names another ptxas. {_KEPT}"
        )
    if name == "OutOfResources":
        return (
            f"this GPU is too small for a kernel ({text.partition('. ')[0]}): take a card of a larger kind, or give "
            f"--placement.device cpu. {_KEPT}"
        )
    return None
