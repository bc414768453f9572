"""A recipe says where it runs; what cannot be is one clear error, before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.placement import Placement, PlacementConfig
from rl import fingerprint
from rl.audit import command as audit
from rl.rollers import check_workers
from rl.study import baseline, matrix
from rl.train import parse
from rollout.bench import __main__ as bench
from rollout.bench import graph, latency


def test_the_default_is_the_cpu() -> None:
    config = parse([])[0]
    entered = Placement.enter(config.placement, config.model.dtype)
    assert entered == Placement(dispatch.backend().NAME, torch.device("cpu"), torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METRONOME_BACKEND", raising=False)
    before = dispatch.backend()
    with pytest.raises(MetronomeError, match="finds no GPU"):
        Placement.enter(PlacementConfig("cuda"), "float32")
    assert dispatch.backend() is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("command", "given"),
    [
        (fingerprint, ["--json", "OUT"]),
        (matrix, ["--checkpoint", "x", "--out", "OUT"]),
        (baseline, ["--checkpoint", "x", "--out", "OUT"]),
        (bench, ["--json", "OUT"]),
        (latency, ["--json", "OUT"]),
        (graph, ["--json", "OUT"]),
    ],
)
def test_commands_without_a_recipe_have_an_option_for_it(
    command: ModuleType, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("METRONOME_BACKEND", raising=False)
    arguments = [str(tmp_path / "out") if one == "OUT" else one for one in given]
    assert command.parser().parse_args(arguments).device == "cpu"
    with pytest.raises(MetronomeError, match="finds no GPU"):
        command.main([*arguments, "--device", "cuda"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("METRONOME_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert command.parser().parse_args(arguments).device == "cuda"


def test_a_comparison_computes_nowhere(tmp_path: Path) -> None:
    with pytest.raises(MetronomeError, match="compared by their files"):
        audit.main(["--compare", str(tmp_path), str(tmp_path), "--device", "cpu"])


def test_a_backend_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METRONOME_BACKEND", "reference")
    with pytest.raises(MetronomeError, match="METRONOME_BACKEND=reference works on the CPU"):
        Placement.enter(PlacementConfig("cuda"), "float32")
    monkeypatch.setattr(dispatch, "device", lambda: torch.device("cuda"))
    with pytest.raises(MetronomeError, match=r"works on a GPU: give --placement\.device cuda"):
        Placement.enter(PlacementConfig(), "float32")


def test_workers_on_a_gpu_are_refused() -> None:
    config = parse(["--placement.device", "cuda", "--rollout.workers", "2"])[0]
    with pytest.raises(MetronomeError, match="on a GPU episodes are sampled in the learner's process"):
        check_workers(config)
    check_workers(parse(["--rollout.workers", "2"])[0])
