"""Settings of every test process: no network, no GPU guessed, the same examples from hypothesis each time."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

from rollout.world.speech import SpeechBank

# derandomize: a failure seen once is seen again; no deadline: the first call of an op may load libraries.
settings.register_profile("metronome", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("metronome")


@pytest.fixture(scope="session")
def bank() -> SpeechBank:
    """The shipped recordings."""
    return SpeechBank.open()


@pytest.fixture(scope="session")
def world() -> Iterator[None]:
    """One world of one process for all tests that need DeepSpeed: it does not survive a second one in a process."""
    from model.program import ranks  # here, because most tests need no DeepSpeed

    ranks.join()
    yield
    ranks.leave()
