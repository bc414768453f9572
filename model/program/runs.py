"""Folders of runs, whichever command makes them: what tells that a run has begun, and that one run writes into each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kernels.errors import MetronomeError
from model.program import ranks
from model.program.folders import locked

RECIPE = "config.yaml"
RESUMED = "resumed.jsonl"
"""A `Note` a line."""
RESULTS = ("metrics.jsonl", "summary.json", "checkpoints", "episodes", "tracking", "model", RESUMED)
"""What only a run that has begun has in its folder (``model``: a run of `reward.train`)."""


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """While the block runs, no other run writes into the folder: the first process locks it. Raises MetronomeError in
    every process when another run has."""
    with ExitStack() as held:
        refusal = None
        if ranks.rank() == 0:
            try:
                held.enter_context(locked(path))
            except MetronomeError as error:
                refusal = str(error)
        if said := ranks.gather(refusal)[0]:
            raise MetronomeError(said)
        yield


def check_free(path: Path) -> None:
    """Raises MetronomeError when the folder ``path`` holds results of a run, of `rl.train` or `reward.train`."""
    taken = [result for result in RESULTS if os.path.lexists(path / result)]
    if taken:
        raise MetronomeError(
            f"{path} already holds results of a run ({taken[0]}); go on with it by --resume, or choose another --name, "
            "or move the folder away"
        )
