"""The page's own identity check; that it ends with `rl.train`'s weights is in tests/integration/test_one_digest.py."""

from __future__ import annotations

import pytest
import torch

from rl import minimal
from rl.step.gradient import Gradient
from rollout.record.episode import Episode, concatenate
from tests.support.episodes import some_episode


def gradient(episode: Episode) -> Gradient:
    return Gradient((), concatenate([episode], "logprob"), torch.zeros(1), concatenate([episode], "digest"))


def test_equal_bits_pass_and_one_other_bit_does_not() -> None:
    episode = some_episode()
    minimal.check([episode], gradient(episode))
    for name in ("logprob", "digest"):
        learned = gradient(episode)
        getattr(learned, name).view(torch.uint8)[0] ^= 1
        with pytest.raises(RuntimeError, match=f"not the same function: {name} differs"):
            minimal.check([episode], learned)
