"""A GPU that cannot be used is one clear error before the work: what is wrong, where, and what to do. torch.cuda is
mocked, with the texts of torch 2.11 to 2.13 (c10/cuda/CUDAFunctions.cpp)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from kernels.triton import library
from model.placement import Placement, PlacementConfig
from model.program import gpu, memory, startup
from rl.environment import environment
from tests.support.pretend.faults import cuda_error

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
    "http://www.nvidia.com/Download/index.aspx"
)
MISMATCH = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that "
    "might have already set an error? Error 803: system has unsupported display driver / cuda driver combination"
)


@dataclass
class Machine:
    """What torch.cuda and Triton say on a machine; as it is, one H100 that works."""

    cuda: str | None = "13.0"
    hip: str | None = None
    starts: str = ""  # else torch's reason why not
    cards: tuple[tuple[int, int], ...] = ((9, 0),)  # compute capabilities
    triton: object = field(
        default_factory=lambda: SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: "cuda"))
    )

    def install(self, patch: pytest.MonkeyPatch) -> None:
        def init() -> None:
            if self.starts:
                raise RuntimeError(self.starts)

        patch.setattr(torch.version, "cuda", self.cuda)
        patch.setattr(torch.version, "hip", self.hip)
        patch.setattr(torch.cuda, "init", init)
        patch.setattr(torch.cuda, "is_available", lambda: not self.starts)
        patch.setattr(torch.cuda, "device_count", lambda: len(self.cards))
        patch.setattr(torch.cuda, "get_device_capability", lambda i=0: self.cards[i])
        patch.setattr(torch.cuda, "get_device_name", lambda i=0: "Tesla V100-SXM2-32GB")
        import triton

        patch.setattr(triton.runtime, "driver", self.triton)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("METRONOME_BACKEND", "TRITON_INTERPRET", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name in (*names, "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


def no_driver_of_triton(error: Exception) -> object:
    def target() -> None:
        raise error

    return SimpleNamespace(active=SimpleNamespace(get_current_target=target))


STATES: dict[str, tuple[Machine, dict[str, str], str]] = {
    "torch for the CPU": (
        Machine(cuda=None),
        {},
        rf"torch {torch.__version__.replace('+', '[+]')} is built for the CPU: install its build for your GPU",
    ),
    "no driver": (Machine(starts=NO_DRIVER), {}, "built for CUDA 13.0, finds no driver: see that `nvidia-smi` works"),
    "old driver": (
        Machine(starts=TOO_OLD),
        {},
        "NVIDIA driver 535.129.03 knows CUDA 12.2, and torch .*, built for CUDA 13.0, needs a newer one: update",
    ),
    "no GPU": (Machine(starts="No CUDA GPUs are available"), {}, "13.0, finds no GPU: `nvidia-smi -L` shows"),
    "none visible": (
        Machine(starts="No CUDA GPUs are available"),
        {"CUDA_VISIBLE_DEVICES": ""},
        "CUDA_VISIBLE_DEVICES='' names no GPU of this machine: `nvidia-smi -L` numbers them",
    ),
    "another one visible": (
        Machine(starts="No CUDA GPUs are available"),
        {"CUDA_VISIBLE_DEVICES": "7"},
        "CUDA_VISIBLE_DEVICES='7' names no GPU",
    ),
    "a driver that does not fit": (
        Machine(starts=MISMATCH),
        {},
        "cannot start it: Error 803: system has .* combination; see",
    ),
    "no GPU of AMD's": (
        Machine(cuda=None, hip="7.0", starts="No HIP GPUs are available"),
        {},
        "built for ROCm 7.0, finds no GPU: `amd-smi list` shows",
    ),
    "two processes on one GPU": (
        Machine(),
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"},
        "has 2 processes on this machine, and torch sees 1 GPU: each process takes one. Give the launcher "
        "--num_processes 1",
    ),
    "a V100": (
        Machine(cards=((7, 0),)),
        {},
        "GPU 0, Tesla V100-SXM2-32GB, has compute capability 7.0, and the kernels need 8.0 or newer",
    ),
    "a T4 for the second process": (
        Machine(cards=((9, 0), (7, 5))),
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"},
        "GPU 1, .* has compute capability 7.5",
    ),
    "the interpreter": (Machine(), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set, .*: `unset TRITON_INTERPRET`"),
    "no C compiler": (
        Machine(
            triton=no_driver_of_triton(
                RuntimeError(
                    "Failed to find C compiler. Please specify via CC environment variable or set "
                    "triton.knobs.build.impl."
                )
            )
        ),
        {},
        r"Triton .* cannot start on this machine \(Failed to find C compiler.*needs gcc or clang .*python3-dev",
    ),
    "CC names none": (
        Machine(triton=no_driver_of_triton(FileNotFoundError(2, "No such file or directory", "nocc"))),
        {},
        r"cannot start on this machine \(.*'nocc'\): it compiles a little C at its first use",
    ),
    "a cache that cannot be written": (
        Machine(triton=no_driver_of_triton(PermissionError(13, "Permission denied", "/cache/ab"))),
        {"TRITON_CACHE_DIR": "/cache"},
        r"its cache, /cache \(TRITON_CACHE_DIR\), must be a folder that can be written into",
    ),
    "Triton finds no driver": (
        Machine(triton=no_driver_of_triton(RuntimeError("0 active drivers ([]). There should only be one."))),
        {},
        "it must find one kind of GPU, and its driver's libcuda",
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_a_gpu_that_cannot_be_used_is_one_clear_error(
    state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine, variables, says = STATES[state]
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n")
    monkeypatch.setattr(gpu.driver, "__defaults__", (version,))
    machine.install(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = dispatch.backend()
    with pytest.raises(MetronomeError, match=says) as error:
        Placement.enter(PlacementConfig("cuda"), "float32")
    assert "\n" not in str(error.value) and dispatch.backend() is before


@pytest.mark.parametrize(
    "machine",
    [Machine(), Machine(cards=((8, 0), (12, 0))), Machine(cuda=None, hip="7.0", cards=((6, 0),))],
    ids=["H100", "two", "AMD"],
)
def test_control_a_gpu_that_works_passes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.install(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    gpu.check()


def test_a_process_takes_its_own_card_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    Machine(cards=((9, 0), (9, 0))).install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(gpu, "memory", lambda device: taken.append(device.index))
    gpu.take(1)
    assert taken == [1, 1]
    with pytest.raises(MetronomeError, match="has 3 processes on this machine, and torch sees 2 GPUs"):
        gpu.take(2)


@pytest.mark.parametrize("words", ["CUDA-capable device(s) is/are busy or unavailable", "out of memory"])
def test_a_card_that_another_process_has_is_said(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(device: int) -> None:
        raise cuda_error(words)

    Machine().install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(
        MetronomeError, match=r"GPU 0 cannot be had .*: `nvidia-smi` lists what else runs there"
    ) as error:
        gpu.take(0)
    assert f"(CUDA error: {words})" in str(error.value) and "\n" not in str(error.value)


def test_a_run_says_its_card_and_a_run_on_the_cpu_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("the driver was asked")

    for name in ("is_available", "init", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, asked)
    assert environment()["gpu"] is None
    Machine().install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=2**36))
    monkeypatch.setattr(dispatch, "device", lambda: torch.device("cuda", 0))
    found = environment()
    assert (found["gpu"], found["gpu_memory_bytes"], found["cuda"]) == ("Tesla V100-SXM2-32GB", 2**36, "13.0")
    assert found["gpu_driver"] == gpu.driver()


def test_what_others_hold_of_the_card_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gib, card = 2**30, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * gib)
    assert gpu.memory(card) == gpu.Memory(free=12 * gib, total=80 * gib, others=64 * gib)
    memory.check_room(10 * gib, "it", "lower x", card)
    says = r"it would take 11.00 GiB of memory, of which 10.80 GiB can be had on the GPU, which has 80.00 GiB \(other "
    with pytest.raises(
        MetronomeError, match=says + r"processes hold 64.00 GiB of it: `nvidia-smi` lists them\): lower x"
    ):
        memory.check_room(11 * gib, "it", "lower x", card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (75 * gib, 80 * gib))  # all that is used is ours
    with pytest.raises(MetronomeError, match=r"on the GPU, which has 80.00 GiB: lower x"):
        memory.check_room(90 * gib, "it", "lower x", card)


def fake_triton(version: str, lacking: str = "") -> ModuleType:
    module = ModuleType("triton")
    vars(module).update({name: None for name in library.USED if name != lacking}, __version__=version)
    return module


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "is not installed: `pip install triton`"),
        (fake_triton("3.5.1"), r"Triton 3.5.1 at None will not do: the kernels need 3.6 or newer"),
        (fake_triton("4.0.0", lacking="knobs"), r"Triton 4.0.0 at None, which lacks knobs, will not do"),
        (ModuleType("triton"), "Triton of no known version"),
    ],
    ids=["missing", "old", "lacking", "empty"],
)
def test_a_triton_that_will_not_do_is_one_clear_error(
    found: ModuleType | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.check()  # the control: the one that is installed
    if found is None:
        monkeypatch.setattr(sys, "meta_path", [])
        monkeypatch.delitem(sys.modules, "triton")
    else:
        monkeypatch.setitem(sys.modules, "triton", found)
    with pytest.raises(MetronomeError, match=says):
        dispatch._load("triton")


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0+git1", "4.0"])
def test_control_a_newer_triton_is_let_through(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", fake_triton(version))
    library.check()


@pytest.mark.parametrize("value", ["1", "true", "YES", "0", "", "2", "off"])
def test_the_interpreters_variable_is_read_as_triton_reads_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert startup.interpreted() == triton.knobs.runtime.interpret


def test_the_drivers_version_is_read_where_linux_says_it(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert gpu.driver(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"
    )
    assert gpu.driver(file) == "580.65.06"
    file.write_text("something else 1.2.3")
    assert gpu.driver(file) is None
