"""A recipe says where it runs; what cannot be is one clear error, before anything is loaded or written."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.placement import Placement, PlacementConfig
from rl.rollers import check_workers
from rl.train import parse


def test_the_default_is_the_cpu() -> None:
    config = parse([])[0]
    entered = Placement.enter(config.placement, config.model.dtype)
    assert entered == Placement(dispatch.backend().NAME, torch.device("cpu"), torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METRONOME_BACKEND", raising=False)
    before = dispatch.backend()
    with pytest.raises(MetronomeError, match=r"placement\.device is cuda, but torch"):
        Placement.enter(PlacementConfig("cuda"), "float32")
    assert dispatch.backend() is before


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
