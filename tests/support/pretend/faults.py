"""Makes the pretend device fail as a GPU does, at one of its kernels or of torch's own launches:

    python -m tests.support.pretend.run --fail memory:adamw:2 rl.train …

is out of memory at the second launch of the kernel ``adamw``; ``*`` is any kernel or launch, and ``memory:adamw:2:1``
does so in the process of rank 1 only. `ERRORS` has the kinds; each error has the class and the text that torch 2.11 to
2.13 gives it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.distributed import DistBackendError

from tests.support.pretend.device import ledger

ALLOCATOR = (
    "CUDA out of memory. Tried to allocate 1.95 GiB. GPU 0 has a total capacity of 14.57 GiB of which 1.58 GiB is "
    "free. Process 2493055 has 12.02 GiB memory in use. Including non-PyTorch memory, this process has 966.00 MiB "
    "memory in use. Of the allocated memory 734.07 MiB is allocated by PyTorch, and 33.93 MiB is reserved by PyTorch "
    "but unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF="
    "expandable_segments:True to avoid fragmentation.  See documentation for Memory Management  "
    "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
"""Of the caching allocator, with another process on the card."""

_ASYNCHRONOUS = (
    "\nSearch for `{}' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)

NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 304 'OS call failed or operation not supported on this OS'"
)


def cuda_error(said: str, name: str = "cudaErrorUnknown") -> torch.AcceleratorError:
    """torch's, of CUDA's words: ``cuda_error("unspecified launch failure", "cudaErrorLaunchFailure")``."""
    return torch.AcceleratorError(f"CUDA error: {said}{_ASYNCHRONOUS.format(name)}")


ERRORS: dict[str, Callable[[], Exception]] = {
    "memory": lambda: torch.OutOfMemoryError(ALLOCATOR),
    "lost": lambda: cuda_error("uncorrectable ECC error encountered", "cudaErrorECCUncorrectable"),
    "fault": lambda: cuda_error("unspecified launch failure", "cudaErrorLaunchFailure"),
    "busy": lambda: cuda_error("CUDA-capable device(s) is/are busy or unavailable", "cudaErrorDevicesUnavailable"),
    "nccl": lambda: DistBackendError(NCCL),
    "defect": lambda: cuda_error("invalid argument", "cudaErrorInvalidValue"),
}


def fail_at(where: str) -> None:
    """``KIND:KERNEL:N`` or ``KIND:KERNEL:N:RANK``, as in the module's text. Once it has failed the device fails at
    everything, as a GPU that faulted does, until `mend`."""
    kind, kernel, count, *rank = where.split(":")
    if rank and rank != [os.environ.get("RANK", "0")]:
        return
    left = int(count)

    def failing(launch: Callable[[str], None]) -> Callable[[str], None]:
        def run(name: str) -> None:
            nonlocal left
            launch(name)
            left -= kernel in ("*", name)
            if left <= 0:
                raise ERRORS[kind]()

        return run

    ledger.kernel = failing(ledger.kernel)  # type: ignore[method-assign]
    ledger.launch = failing(ledger.launch)  # type: ignore[method-assign]


def mend() -> None:
    """Undoes `fail_at`."""
    for name in ("kernel", "launch"):
        vars(ledger).pop(name, None)
