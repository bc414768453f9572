"""The verdict of everything that compares bits: the audit of a run, the comparison of two runs, the invariance matrix,
the baseline and the fingerprint.

A verdict that rests on nothing is one of its own, and has an exit status of its own: a command that compared nothing
has not found equality.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What a comparison found. In the order of exit statuses (0, 1, 2, 3) with ``--fail-on mismatch``."""

    IDENTICAL = "identical"
    DIFFERENT = "different"
    NOT_COMPARABLE = "not_comparable"
    NOTHING_COMPARED = "nothing_compared"

    @staticmethod
    def of(compared: int, unequal: int, conflicts: int = 0) -> Verdict:
        """The verdict on ``compared`` things of which ``unequal`` differ. ``conflicts``: things that cannot be compared
        or contradict each other. A difference outweighs these, and these outweigh that nothing was compared."""
        if unequal:
            return Verdict.DIFFERENT
        if conflicts:
            return Verdict.NOT_COMPARABLE
        return Verdict.IDENTICAL if compared else Verdict.NOTHING_COMPARED

    @property
    def words(self) -> str:
        """For people: "not comparable"."""
        return self.value.replace("_", " ")

    @property
    def status(self) -> int:
        """The exit status that ``--fail-on mismatch`` asks for."""
        return list(Verdict).index(self)


@dataclass(frozen=True)
class Finding:
    """A verdict and what it rests on. Example: ``Finding(Verdict.IDENTICAL, "0 of 276 tokens differ.")``."""

    verdict: Verdict
    headline: str  # in one or two sentences, with counts

    def __str__(self) -> str:
        return f"{self.verdict.words}: {self.headline}"


STATUSES = (
    "exit status 1 when bits differ, 2 when what was given cannot be compared, 3 when nothing was compared; 0 otherwise"
)


def add_fail_on(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--fail-on mismatch``."""
    parser.add_argument("--fail-on", choices=["mismatch"], help=STATUSES)


def leave(verdict: Verdict, fail_on: str | None) -> None:
    """Raises SystemExit with the verdict's status where ``--fail-on`` was given and the status is not 0."""
    if fail_on and verdict.status:
        sys.exit(verdict.status)
