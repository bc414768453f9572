"""The page's own identity check; that it ends with `rl.train`'s weights is in tests/integration/test_one_digest.py."""

from __future__ import annotations

import pytest
import torch

from kernels.errors import MetronomeError
from rl import minimal
from rl.consistency import check_minimal
from rl.step.gradient import Gradient
from rl.train import parse
from rollout.record.episode import Episode, concatenate
from tests.support.episodes import some_episode


@pytest.mark.parametrize(
    "given",
    [
        ["--resume"],
        ["--rollout.engine", "vllm"],
        ["--rollout.workers", "1"],
        ["--tracking.trackers", "[tensorboard]"],
        ["--rl.reference_weight", "0.1"],
        ["--model.dtype", "bfloat16"],
        ["--source.models", "[m]"],
    ],
)
def test_what_it_leaves_out_is_refused(given: list[str]) -> None:
    config, resume, _ = parse(given)
    with pytest.raises(MetronomeError, match=f"{given[0][2:]} is .*, which rl.minimal leaves out") as error:
        check_minimal(config, resume)
    assert "\n" not in str(error.value)
    config, resume, _ = parse(["--rl.checkpoint_every", "3", "--eval.scenarios", "1"])  # the control
    check_minimal(config, resume)


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
