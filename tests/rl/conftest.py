"""One world of one process for all tests that need DeepSpeed: it does not survive a second one in a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rl.learner import ranks


@pytest.fixture(scope="session")
def world() -> Iterator[None]:
    ranks.join()
    yield
    ranks.leave()
