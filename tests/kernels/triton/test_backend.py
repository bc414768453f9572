"""The Triton backend behind `kernels.ops`: named in the contract, refused where nothing can run it, all compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import dispatch, ops
from kernels.errors import MetronomeError
from kernels.triton import backend, launch, tiles
from kernels.triton.specs import compile_specs
from tests.kernels.backend import DEVICE_VARIABLE, device
from tests.kernels.contract import normal


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    yield
    dispatch.use_backend("triton")  # one test leaves it


def test_contract_names_what_decides_bits() -> None:
    contract = dispatch.contract()
    assert contract["backend"] == "triton"
    assert (contract["architecture"] == "interpreter") == launch.INTERPRET
    assert contract["fp_fusion"] == "False" and contract["input_precision"] == "ieee"
    assert contract["tile, product bf16"] == "64.64.64.4.3"  # rows, columns, k, warps, stages
    assert contract["tile, attention fp32"] == "16.16.16.4.1"


OTHER = tiles.Tile(m=8, n=32, k=32, warps=2, stages=2)
DECIDES = {name: value for name, value in vars(tiles).items() if name.isupper() or name.endswith("_tile")}


@pytest.mark.parametrize("name", DECIDES)
def test_contract_id_follows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every constant and every choice of a tile in `tiles` is in the id, but for one that cannot change a bit."""
    before, value = dispatch.contract_id(), DECIDES[name]
    other = {bool: not value, int: 7, tiles.Tile: OTHER}.get(type(value), lambda _: OTHER)
    monkeypatch.setattr(tiles, name, other if name != "PRECISION" else type(value)("tf32"))
    assert (dispatch.contract_id() != before) == (name != "GATHER_ROWS")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The contract as on a card of sm_90 with torch for CUDA 13.0, without one."""
    if launch.INTERPRET:
        monkeypatch.setattr(backend, "INTERPRET", False)
        monkeypatch.setattr(backend, "instruction_set", lambda: "sm_90")
        monkeypatch.setattr("torch.version.cuda", "13.0")
    return monkeypatch


def fake_ptxas(path: Path, version: str) -> str:
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version[:4]}, V{version}'\necho 'Build 7_0'\n")
    path.chmod(0o755)
    return str(path)


def test_contract_id_follows_the_compiler_and_the_target(compiled: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changes = {
        "triton": ("triton.__version__", "0.0"),
        "cuda": ("torch.version.cuda", "12.8"),
        "architecture": ("kernels.triton.backend.instruction_set", lambda: "sm_80"),
    }
    before, ids = dispatch.contract(), {dispatch.contract_id()}
    assert dispatch.contract_id() in ids  # asked twice, it is one
    for name, (where, value) in changes.items():
        with compiled.context() as patched:
            patched.setattr(where, value)
            ids.add(dispatch.contract_id())
            found = dispatch.contract()
            assert {key for key in found if found[key] != before[key]} >= {name}
    for tool in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):  # which of the two is run, Triton decides
        compiled.setenv(tool, fake_ptxas(tmp_path / tool, "99.1.2"))
    assert dispatch.contract()["ptxas"] == "99.1.2 7_0"
    ids.add(dispatch.contract_id())
    assert len(ids) == 2 + len(changes)


def test_no_compiler_in_the_interpreters_contract() -> None:
    names = {"cuda", "ptxas"} & set(dispatch.contract())
    assert bool(names) != launch.INTERPRET


def test_a_ptxas_without_a_version_is_refused(compiled: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton takes its own where the named one does not say a release; one that then names no version is refused."""
    own = dispatch.contract()["ptxas"]
    silent = tmp_path / "ptxas"
    for text in ("exit 1", "echo nothing"):
        silent.write_text(f"#!/bin/sh\n{text}\n")
        silent.chmod(0o755)
        for tool in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
            compiled.setenv(tool, str(silent))
        assert dispatch.contract()["ptxas"] == own
        with compiled.context() as patched, pytest.raises(MetronomeError, match=r"version of ptxas.*for sm_\d+.*unset"):
            patched.setattr("triton.backends.nvidia.compiler.get_ptxas", lambda arch: SimpleNamespace(path=str(silent)))
            dispatch.contract_id()


@pytest.mark.parametrize(
    "name",
    ["TRITON_F32_DEFAULT", "TRITON_DEFAULT_FP_FUSION", "DISABLE_PTXAS_OPT", "DISABLE_LLVM_OPT", "DISABLE_MMA_V3",
     "PTXAS_OPTIONS", "TRITON_KERNEL_OVERRIDE", "TRITON_OVERRIDE_ARCH", "TRITON_LIBDEVICE_PATH", "TRITON_UNHEARD_OF"],
)  # fmt: skip
def test_settings_of_the_compiler_are_refused(name: str, compiled: pytest.MonkeyPatch) -> None:
    before = dispatch.contract_id()
    containers = "TRITON_CUPTI_PATH", "TRITON_SERVER_VERSION"
    for harmless in ("TRITON_CACHE_DIR", "TRITON_DISABLE_LINE_INFO", "MLIR_ENABLE_DUMP", *containers):
        compiled.setenv(harmless, "0")
    compiled.setenv(name, "")  # as good as unset
    assert dispatch.contract_id() == before
    compiled.setenv(name, "1")
    with pytest.raises(MetronomeError, match=f"{name}=1: such settings .* unset them"):
        dispatch.contract_id()


def test_packs_of_another_backend_are_refused() -> None:
    dispatch.use_backend("cpu")
    packed = ops.pack_linear(normal(1, 8, 16))
    dispatch.use_backend("triton")
    with pytest.raises(ValueError, match=r"made by another backend.*use_backend\('triton'\)"):
        ops.linear(normal(2, 3, 16).to(device()), packed)


def test_tensors_elsewhere_are_refused() -> None:
    x = normal(1, 8, 16).to(device())
    with pytest.raises(ValueError, match="swiglu: gate_up is on meta; the triton backend needs it on"):
        ops.swiglu(x.to("meta"))
    with pytest.raises(ValueError, match="rms_norm: weight is on meta"):
        ops.rms_norm(x, x[0].to("meta"), 1e-6)


def test_every_kernel_has_a_spec_for_compiling() -> None:
    """Names come once, every argument of a kernel has a type or a value, hints name arguments that have a type."""
    specs = compile_specs()
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        assert set(spec.signature) | set(spec.constexprs) == set(spec.fn.arg_names), spec.name
        assert not set(spec.signature) & set(spec.constexprs) and set(spec.divisible) <= set(spec.signature), spec.name


def test_every_launched_kernel_has_a_spec() -> None:
    """A kernel whose grid is launched somewhere in the package is compiled by the report."""
    import importlib
    import pkgutil

    import kernels.triton as package

    compiled = {spec.fn for spec in compile_specs()}
    for module in pkgutil.iter_modules(package.__path__):
        found = vars(importlib.import_module(f"kernels.triton.{module.name}"))
        missing = [name for name, fn in found.items() if name.endswith("_kernel") and fn not in compiled]
        assert not missing, f"{module.name}: no spec for {missing}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_refused_without_gpu_and_interpreter() -> None:
    hidden = {"TRITON_INTERPRET", DEVICE_VARIABLE, "METRONOME_BACKEND"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-c", "from kernels import dispatch; dispatch.use_backend('triton')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode and "the triton backend needs a GPU" in done.stderr
