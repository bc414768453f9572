"""Recordings, noise, the user's audio, the expert's actions, dMel codes and mel values have the same bits with every
library held back and by the definitions; each way is a process of its own. Settings one by one are the matter of
`tests/integration/test_one_digest.py`."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest
from torch.nn import functional as F

from model.senses.audio import DMel
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.seeds import generator
from rollout.turn.observation import stack_audio
from rollout.world.sound import NOISES, amplitude, noise
from rollout.world.speech import SpeechBank
from tests.support.settings import SETTINGS, run

LIBRARIES = ("MKL compatible", "torch without vectors", "numpy without its vector code", "glibc without FMA")
WAYS = {
    "libraries held back": {name: value for key in LIBRARIES for name, value in SETTINGS[key].items()},
    "the definitions": {"METRONOME_BACKEND": "reference"},
}


def digests(first_seed: int = 0) -> dict[str, str]:
    """One digest a stage, of some of each."""
    bank, dmel = SpeechBank.open(), DMel.build()
    config = ScenarioConfig()
    items = [config.in_turn(i, "train", first_seed + i, bank) for i in range(12)]
    plays = [enact(item, config.expert(item, generator("same bits", i))) for i, item in enumerate(items)]
    heard = [stack_audio(observed) for observed, _, _ in plays]
    measured = [dmel.codes_and_mels(F.pad(audio.view(1, -1), (800, 0))) for audio in heard]
    constants = [dmel.window, dmel.roots, dmel.weight, dmel.edges]
    return {
        "recordings": _sha(*(clip.samples for clip in bank.clips)),
        "noises": _sha(*(noise(name, split) for split in NOISES for name in NOISES[split])),
        "amplitudes": _sha(np.array([amplitude(db / 7) for db in range(-300, 300)])),
        "user's audio": _sha(*(audio.numpy() for audio in heard)),
        "actions": hashlib.sha256(repr([actions for _, actions, _ in plays]).encode()).hexdigest(),
        "constants": _sha(*(table.numpy() for table in constants)),
        "codes": _sha(*(codes.numpy() for codes, _ in measured)),
        "mel values": _sha(*(mel.numpy() for _, mel in measured)),
    }


def _sha(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def in_process() -> dict[str, str]:
    return digests()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_same_bits(way: str, in_process: dict[str, str]) -> None:
    done = run(["-W", "ignore", "-m", "tests.rollout.test_same_bits"], WAYS[way])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == in_process


def test_control_other_scenarios_have_other_bits(in_process: dict[str, str]) -> None:
    other = digests(first_seed=1)
    changed = {stage for stage in in_process if other[stage] != in_process[stage]}
    assert changed == {"user's audio", "actions", "codes", "mel values"}


if __name__ == "__main__":
    json.dump(digests(), sys.stdout)
