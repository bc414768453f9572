"""A GPU that fails in the middle of the work is one line; a defect keeps its traceback."""

from __future__ import annotations

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.distributed import DistBackendError
from triton.runtime.errors import OutOfResources, PTXASError

from model.program import exhausted, ranks
from model.program.exhausted import needing, sentence
from reward.learned.settings import RANGES
from rl import resume, rollers
from tests.model.test_startup import command, run
from tests.support.pretend.faults import ALLOCATOR, ERRORS, cuda_error
from tests.support.recipes import ROOT, classes, leaves

PTXAS = (
    "Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas fatal   : Value 'sm_123a' is not defined for option "
    "'gpu-name'\n\nRepro command: ptxas -lineinfo -v --gpu-name=sm_123a a.ptx -o a.ptx.o\n"
)

FAULTS = {
    "memory": (
        ERRORS["memory"](),
        "the GPU's memory ran out (1.95 GiB asked for, 1.58 GiB of 14.57 GiB free, process 2493055 holds 12.02 GiB): "
        "end what else runs there (`nvidia-smi`), or use a smaller model or batch. Finished files are whole",
    ),
    "memory of one process": (
        torch.OutOfMemoryError(ALLOCATOR.replace("Process 2493055 has 12.02 GiB memory in use. ", "")),
        "1.58 GiB of 14.57 GiB free): use a smaller model or batch",
    ),
    "memory, not the allocator's": (cuda_error("out of memory", "cudaErrorMemoryAllocation"), "memory ran out: use a"),
    "memory of Triton": (RuntimeError("Triton Error [CUDA]: out of memory"), "the GPU's memory ran out: "),
    "memory of NCCL": (
        DistBackendError("NCCL error in: a.cpp:1, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        "the GPU's memory ran out: ",
    ),
    "memory of AMD": (torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 MiB."), "(2.00 MiB asked for)"),
    "fault": (ERRORS["fault"](), "a kernel failed on the GPU (unspecified launch failure): Finished files are whole"),
    "address": (cuda_error("an illegal memory access was encountered"), "If it fails there again, it is a defect"),
    "address, of Triton": (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "failed on"),
    "assert": (cuda_error("device-side assert triggered"), "a kernel failed on the GPU (device-side assert triggered)"),
    "lost": (ERRORS["lost"](), "the GPU is lost or fails (uncorrectable ECC error encountered): `nvidia-smi` and"),
    "fallen off": (cuda_error("GPU is lost"), "the run can go on with --resume"),
    "gone": (cuda_error("no CUDA-capable device is detected"), "the GPU is lost or fails"),
    "busy": (ERRORS["busy"](), "the GPU cannot be had (CUDA-capable device(s) is/are busy or unavailable): another"),
    "busy, before CUDA 12": (cuda_error("all CUDA-capable devices are busy or unavailable"), "has it to itself"),
    "newer card": (cuda_error("no kernel image is available for execution on the device"), "does not fit this program"),
    "older driver": (
        RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."),
        "(the provided PTX was compiled with an unsupported toolchain): update the driver",
    ),
    "nccl": (ERRORS["nccl"](), "the GPUs of this run cannot exchange data (Cuda failure 304 'OS call failed or oper"),
    "nccl that lost its card": (
        DistBackendError("NCCL error in: a.cpp:1\nncclUnhandledCudaError: x\nLast error:\nCuda failure 'GPU is lost'"),
        "the GPU is lost or fails (GPU is lost)",
    ),
    "ptxas": (PTXASError(PTXAS), "(ptxas fatal   : Value 'sm_123a' is not defined for option 'gpu-name')"),
    "small card": (
        OutOfResources(180_000, 101_376, "shared memory"),
        "this GPU is too small for a kernel (out of resource: shared memory, Required: 180000, Hardware limit: 101376)",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_what_a_gpu_fails_with_is_one_sentence(what: str) -> None:
    error, says = FAULTS[what]
    text = sentence(error)
    assert text is not None and says in text and "\n" not in text, text
    assert "Finished files are whole" in text


DEFECTS = (
    ERRORS["defect"](),
    cuda_error("operation not permitted when stream is capturing"),
    cuda_error("invalid configuration argument"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    RuntimeError("the chip is busy or unavailable"),
    RuntimeError("CUDA kernels of shape [3, 4]"),
    ValueError("CUDA error: unspecified launch failure"),
    DistBackendError("NCCL error in: a.cpp:1, invalid usage\nncclInvalidUsage: This usually reflects invalid usage."),
)


@pytest.mark.parametrize("error", DEFECTS, ids=lambda e: str(e).partition("\n")[0][:40])
def test_control_a_defect_is_none_of_them(error: Exception) -> None:
    assert sentence(error) is None


def test_a_command_ends_with_that_line_and_a_defect_with_its_traceback(tmp_path: Path) -> None:
    body = "from tests.support.pretend.faults import ERRORS\ndef main(): raise ERRORS[{!r}]()"
    lost = run(command(tmp_path, body.format("lost")))
    assert lost.returncode == 2 and lost.stderr.count("\n") == 1
    assert lost.stderr.startswith("error: the GPU is lost or fails (uncorrectable ECC error encountered): ")
    defect = run(command(tmp_path, body.format("defect")))
    assert defect.returncode == 1 and "Traceback" in defect.stderr and "invalid argument" in defect.stderr


def test_another_process_that_ended_is_told_from_a_card_that_fails() -> None:
    from model.program.startup import _lost_a_process

    remote = (
        "NCCL error in: a.cpp:1, remote process exited or there was a network error, NCCL version 2.28.9\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
    )
    assert _lost_a_process(DistBackendError(remote))
    assert not _lost_a_process(ERRORS["nccl"]()) and not _lost_a_process(ERRORS["lost"]())


@pytest.mark.parametrize(
    "error", [ERRORS["memory"](), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_the_innermost_phase_says_what_to_lower(error: Exception) -> None:
    @needing("the rollout", "lower rl.groups")
    def inner() -> None:
        raise error

    with pytest.raises(type(error)) as raised, needing("the evaluation", "lower eval.scenarios"):
        inner()
    text = sentence(raised.value) or ""
    assert " in the rollout" in text and "or lower rl.groups" in text and "eval" not in text
    assert "Finished files are whole" in text


def test_control_another_error_has_no_phase() -> None:
    with pytest.raises(RuntimeError) as raised, needing("the rollout", "lower rl.groups"):
        raise ERRORS["lost"]()
    assert not hasattr(raised.value, "__notes__") and "rollout" not in (sentence(raised.value) or "")


def test_what_is_said_to_change_only_in_a_new_run_is_what_resuming_refuses() -> None:
    free, new = rollers.SMALLER.removesuffix(" (in a new run)").removeprefix("lower ").split(", or ")
    assert resume.covered(free, resume.FREE) and new.split(" or ") == ["rl.groups", "rl.rollouts"]
    assert not any(resume.covered(name, resume.FREE) for name in ("rl.groups", "rl.rollouts", "rl.micro_batch"))


def test_what_was_raised_first_is_told_when_the_processes_cannot_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def part() -> None:
        raise DistBackendError("NCCL error in: a.cpp:1, invalid usage")

    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(ranks, "join", lambda: None)
    monkeypatch.setattr(ranks, "leave", part)
    with pytest.raises(torch.AcceleratorError, match="ECC"), ranks.joined():
        raise ERRORS["lost"]()
    with pytest.raises(DistBackendError), ranks.joined():  # the control: at a block's own end it is an error
        pass


def test_the_standard_library_is_enough(tmp_path: Path) -> None:
    code = "import sys, model.program.exhausted; print('torch' in sys.modules, 'triton' in sys.modules)"
    assert run(code).stdout.split() == ["False", "False"] and exhausted.__name__ in sys.modules


def test_each_phase_of_a_run_names_fields_that_its_recipe_has() -> None:
    """What the program gives to `needing`, found in its source."""
    known = {name for kind in classes() for name, _ in leaves(kind)} | {f"trainer.{name}" for name in RANGES}
    found: dict[str, str] = {}
    for path in (p for package in ("rl", "reward") for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "needing":
                module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
                phase, lower = (eval(ast.unparse(argument), vars(module)) for argument in node.args)
                found[phase] = lower
    assert len(found) >= 9
    for phase, lower in found.items():
        names = re.findall(r"\b[a-z]+\.[a-z_.]*[a-z_]", lower)
        assert names and {*names} <= known, (phase, names)
