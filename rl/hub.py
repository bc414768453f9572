"""Sends a run's checkpoints to a repository of the Hugging Face hub, if the recipe says so. It never costs the run
anything: each is sent by a process of its own (`rl.push`), and whatever goes wrong there is one line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from model.program.ranges import Range

NOT_HANDED_ON = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "METRONOME_BACKEND", "TORCHELASTIC_ERROR_FILE")
"""What the environment says of a learner, and not of a process that it starts to send files."""
ENDING_S = 30.0
"""So long after its own time limit a sending process is killed."""


@dataclass(frozen=True)
class RepoName:
    """In a recipe's types: the name of a repository, with its owner."""

    def __repr__(self) -> str:
        return "owner/name"

    def problem(self, value: Any) -> str | None:
        """As `model.program.ranges.Limit.problem`."""
        try:
            validate_repo_id(value)
        except HFValidationError:
            return "give owner/name, as the hub writes it: up to 96 letters, digits, '-', '_' and '.'"
        return None if "/" in value else "give owner/name: whose repository is it?"


Repo = Annotated[str, RepoName()]
Limit = Annotated[int, Range(1, 86_400)]


@dataclass(frozen=True)
class HubConfig:
    """The part of a run's recipe that names a repository of the hub."""

    repo: Repo | None = None  # owner/name; made if it is not there. None: nothing is sent
    private: bool = True  # of a repository that is made
    every: Literal["final", "checkpoint"] = "final"  # the last checkpoint when the run has ended, or each
    timeout_s: Limit = 3600  # longest time for one checkpoint; the run waits at its end only


class Sender:
    """Owns the process that sends a checkpoint of a run; one at a time."""

    def __init__(
        self, config: HubConfig, run: Path, say: Callable[[str], None], program: Sequence[str] = ("-m", "rl.push")
    ) -> None:
        """``say``: prints a line; ``program``: what Python runs to send one."""
        self._config, self._run, self._say, self._program = config, run, say, program
        self._sending: tuple[int, subprocess.Popen[bytes], IO[bytes]] | None = None  # step, process, what it says

    def saved(self, step: int) -> None:
        """A checkpoint is there. Sends it, unless the recipe wants the last one only; one that comes while another is
        being sent is left out, and said so."""
        if self._config.repo is None or self._config.every != "checkpoint":
            return
        self._report()
        if self._sending is not None:
            self._say(f"Hub: step {step} is not sent, because step {self._sending[0]} still is")
            return
        self._start(step)

    def ended(self, step: int) -> None:
        """The run has ended with the checkpoint of ``step``. Sends it again where it was sent before: its card has the
        last scores now."""
        if self._config.repo is not None:
            self._report(wait=True)
            self._start(step)
            self._report(wait=True)

    def _start(self, step: int) -> None:
        assert self._config.repo is not None
        limit = ["--timeout-s", str(self._config.timeout_s), *([] if self._config.private else ["--public"])]
        of_run = ["--run", str(self._run.resolve()), "--step", str(step)]
        command = [sys.executable, *self._program, *of_run, "--repo", self._config.repo, *limit]
        kept = {name: value for name, value in os.environ.items() if name not in NOT_HANDED_ON}
        try:
            said = tempfile.TemporaryFile()  # noqa: SIM115, closed in `_report`
        except OSError as error:  # as where the folder for temporary files is full
            self._failed(step, str(error))
            return
        try:
            process = subprocess.Popen(command, env=kept, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        except OSError as error:
            said.close()
            self._failed(step, str(error))
            return
        self._sending = step, process, said

    def _report(self, wait: bool = False) -> None:
        """Says how the sending ended, if it has; ``wait``: for its end, within the time limit."""
        if self._sending is None:
            return
        step, process, said = self._sending
        try:
            status = process.wait(self._config.timeout_s + ENDING_S if wait else 0)
        except subprocess.TimeoutExpired:
            if not wait:
                return
            process.kill()
            status = process.wait()
        said.seek(0)
        last = (said.read().decode(errors="replace").strip().splitlines() or [""])[-1]
        said.close()
        self._sending = None
        if status:
            self._failed(step, last.removeprefix("error: ") or f"the process ended with status {status}")
        else:
            self._say(f"Hub: {last}")

    def _failed(self, step: int, why: str) -> None:
        self._say(
            f"Hub: step {step} was not sent, and the run is as it would be without ({why}). To send it later: python "
            f"-m rl.push --run {self._run} --step {step} --repo {self._config.repo}"
        )
