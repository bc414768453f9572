"""A step that is refused is reported whatever else goes wrong: in its diagnosis, or in the audit that follows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rl.audit.records import read
from rl.environment import environment
from rl.folder import RunFolder
from rl.run import DIFFERENCE, Run
from rl.step.identity import Evidence, NotEqualError, check_identity
from rl.train import parse
from tests.support.episodes import some_episode

pytestmark = pytest.mark.usefixtures("world")


def refused() -> NotEqualError:
    episode = some_episode()
    n = len(episode.text.logprob)
    with pytest.raises(NotEqualError) as caught:
        check_identity(Evidence(3, [episode], torch.full((n,), -9.0), episode.text.digest, 1))
    return caught.value


def run(tmp_path: Path, audit: Any) -> Any:
    """As much of a run as explains a difference. Without a model no diagnosis can be made."""
    folder = RunFolder.create(tmp_path, "small", parse(["--name", "small"])[2])
    folder.write_json("environment.json", environment())
    return SimpleNamespace(model=None, folder=folder, audit=audit, tracker=SimpleNamespace(close=lambda: None))


def test_a_diagnosis_that_fails_does_not_hide_the_difference(tmp_path: Path) -> None:
    error, called = refused(), []
    explained = Run.explained(run(tmp_path, lambda: called.append(1)), error)
    assert isinstance(explained, NotEqualError) and explained.evidence is error.evidence and called == [1]
    assert str(explained).startswith(f"{error} The difference could not be explained (AttributeError: ")
    difference = json.loads((tmp_path / "small" / DIFFERENCE).read_text())
    assert difference["step"] == 3 and difference["mismatch"]["mismatch/num_unequal"] > 0
    stopped = read(tmp_path / "small").stopped
    assert stopped is not None and (stopped.step, stopped.diagnosis) == (3, None)


def test_an_audit_that_fails_does_not_hide_the_difference(tmp_path: Path) -> None:
    def fails() -> None:
        raise OSError("no space left")

    error = refused()
    explained = Run.explained(run(tmp_path, fails), error)
    assert str(explained).startswith(str(error))
    assert str(explained).endswith("The audit of the run failed, too (OSError: no space left).")
