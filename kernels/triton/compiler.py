"""What compiles the kernels: the versions that enter the contract id, and settings of Triton's that must not be set.

On an Nvidia card a kernel's instructions are chosen by Triton, its order of them and its registers by ptxas, the
assembler that Triton runs. A user can exchange ptxas (TRITON_PTXAS_PATH) and steer the compiler by some sixty
environment variables; the first is told by its version, the second are refused. Not imported here: the kernels.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess

import torch

from kernels.errors import MetronomeError

HARMLESS = frozenset({
    # where files lie
    "TRITON_HOME", "TRITON_CACHE_DIR", "TRITON_DUMP_DIR", "TRITON_CUDACRT_PATH", "TRITON_CUDART_PATH",
    "TRITON_LIBCUDA_PATH", "TRITON_LIBHIP_PATH", "TRITON_CUOBJDUMP_PATH", "TRITON_NVDISASM_PATH",
    # the profiler's; NVIDIA's containers set them
    "TRITON_CUPTI_PATH", "TRITON_CUPTI_INCLUDE_PATH", "TRITON_CUPTI_LIB_PATH", "TRITON_CUPTI_LIB_BLACKWELL_PATH",
    "TRITON_PROTON_DISABLE", "TRITON_ENABLE_NVTX",
    # whose version is in the id
    "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH",
    # what is printed, written or compiled anew
    "TRITON_ALWAYS_COMPILE", "TRITON_KERNEL_DUMP", "TRITON_DUMP_PTXAS_LOG", "TRITON_DISABLE_LINE_INFO",
    "MLIR_ENABLE_DUMP", "MLIR_DUMP_PATH", "LLVM_IR_ENABLE_DUMP", "NVPTX_ENABLE_DUMP", "AMDGCN_ENABLE_DUMP",
    # autotuning, of which there is none here; vLLM sets them
    "TRITON_CACHE_AUTOTUNING", "TRITON_PRINT_AUTOTUNING",
    # `kernels.triton.launch.INTERPRET` follows it
    "TRITON_INTERPRET",
})  # fmt: skip
"""Variables that cannot change a compiled kernel."""


def check_environment() -> None:
    """Raises MetronomeError when a variable is set that may change a compiled kernel: all that Triton says invalidate
    its cache, and all named like its own, but for HARMLESS. What they change is not in the id, so that no run may have
    been made with them."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    own = {name for name in os.environ if name.startswith(("TRITON_", "PTXAS_", "AMDGCN_"))}
    own = {name for name in own if not name.startswith("TRITON_SERVER_")}  # NVIDIA's inference server, another Triton
    named = (own | set(get_cache_invalidating_env_vars())) - HARMLESS
    found = sorted(name for name in named if os.environ.get(name))
    if found:
        told = ", ".join(f"{name}={os.environ[name]}" for name in found)
        raise MetronomeError(
            f"{told}: such settings of Triton's compiler may change the bits of every result, and the contract id does "
            "not tell them; unset them"
        )


def contract(architecture: str) -> dict[str, str]:
    """The compiler's part of the contract, for a GPU of ``architecture`` (``sm_90``, ``gfx942``). Triton's own version
    is in `tiles.contract`, as its interpreter, too, is another in another version.

    Raises MetronomeError when ptxas does not tell its version, and as `check_environment`."""
    check_environment()
    versions = {"cuda": str(torch.version.cuda or torch.version.hip)}
    if torch.version.hip is None:
        versions["ptxas"] = ptxas(int(architecture.removeprefix("sm_")))
    return versions


def ptxas(architecture: int) -> str:
    """Version and build of the ptxas that Triton runs for compute capability ``architecture`` (90 is sm_90): Triton
    brings two, and the user may name others."""
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        return _version(get_ptxas(architecture).path)
    except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
        raise MetronomeError(
            f"cannot read the version of ptxas, the assembler that Triton runs for sm_{architecture}, which is part of "
            f"the contract id: {error}; if TRITON_PTXAS_PATH or TRITON_PTXAS_BLACKWELL_PATH is set, unset it, else "
            "install triton anew"
        ) from error


@functools.cache
def _version(path: str) -> str:
    """``13.4.59 cuda_13.4.r13.4/compiler.38657139_0`` of what ``path --version`` prints."""
    text = subprocess.run([path, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    version, build = re.search(r"\bV(\d+\.\d+\.\d+)", text), re.search(r"^Build (\S+)", text, re.MULTILINE)
    if version is None:
        raise ValueError(f"{path} --version says {text.strip()[:200]!r}")
    return f"{version[1]} {build[1]}" if build else version[1]
