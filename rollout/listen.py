"""Renders an episode as a stereo WAV of 16 kHz: left the user, right the model's voice.

    python -m rollout.listen --episode runs/voice/episodes/step_000040.rank_0.safetensors#3 --out x.wav

``FILE#N`` is the N-th episode of the file, from 0 (`rollout.show FILE --list` names them); a file with one needs no
number. What the model samples in chunk k is heard from the beginning of chunk k + 1, 200 ms a chunk, as it is streamed:
30 ms late. The user's side is the scenario's user played again, by the recipe of the run whose folder contains the
file; `rollout.heard` says what is done where that fails.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rollout.listen")

import argparse
import re
import sys
from pathlib import Path

from torch import Tensor

from kernels.errors import MetronomeError
from model.program.arguments import Parser
from model.program.files import write_whole
from model.program.outputs import output_file
from model.program.reading import one_line
from model.senses.audio import SAMPLE_RATE_HZ
from rollout.heard import Heard, both_sides, encoded, user_sound
from rollout.record.episode import Episode, load_episodes
from rollout.scenarios.registry import shipped_only
from rollout.scenarios.stored import stored_world
from rollout.world.speech import SpeechBank

_NUMBERED = re.compile(r"(.+)#([0-9]{1,6})", re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    """The command. Raises MetronomeError for a file that cannot be read or an episode that it does not have."""
    given = parser().parse_args(arguments)
    with shipped_only("--trust-families", unless=given.trust_families) as refused:
        carry_out(given)
    for line in refused.values():
        print(line, file=sys.stderr)


def parser() -> Parser:
    """The command line's options."""
    parser = Parser("rollout.listen", "Renders an episode as a stereo WAV: left the user, right the model's voice.")
    parser.add_argument("--episode", required=True, metavar="FILE#N", help="the N-th episode of a run's file, from 0")
    parser.add_argument("--out", required=True, type=output_file(ending=".wav"), metavar="FILE.wav", help="the sound")
    parser.add_argument("--trust-families", action="store_true", help="import the modules of the run's own families")
    return parser


def carry_out(given: argparse.Namespace) -> None:
    """Writes the sound and prints what it is."""
    file, episode = find(given.episode)
    run = file.resolve().parent.parent
    try:
        heard = both_sides(episode, lambda e: user_of(run, e))
    except ValueError as error:
        raise MetronomeError(f"{file}: {error}. Roll the episodes out again, or delete the file.") from error
    write_whole(given.out, encoded(heard, format="WAV", subtype="PCM_16"))
    seconds = len(heard.user) / SAMPLE_RATE_HZ
    print(one_line(f"{given.out}: {episode.name}, {seconds:.2f} s of stereo at 16 kHz."))
    for line in statement(heard):
        print(one_line(line))


def find(text: str) -> tuple[Path, Episode]:
    """(the file, the episode) that ``FILE#N`` or ``FILE`` names."""
    numbered = None if Path(text).is_file() else _NUMBERED.fullmatch(text)
    file = Path(numbered[1] if numbered else text)
    episodes = load_episodes(file)
    if numbered is None and len(episodes) != 1:
        raise MetronomeError(f"--episode {text}: the file holds {len(episodes)} episodes; name one: {file}#0")
    number = int(numbered[2]) if numbered else 0
    if number >= len(episodes):
        raise MetronomeError(f"--episode {text}: the file holds {len(episodes)} episodes, counted from 0")
    return file, episodes[number]


def user_of(run: Path, episode: Episode) -> Tensor:
    """As `user_sound`, by the recipe of the run in the folder ``run``."""
    world = stored_world(run)
    return user_sound(episode, world.scenarios, SpeechBank.open(world.speech_dir))


def statement(heard: Heard) -> list[str]:
    """What the sides are, in a line each."""
    lines = ["Left, the user: what the model heard, played again; its dMel codes are the episode's."]
    if heard.rough:
        lines = [f"Left, the user: rough, rebuilt from dMel codes by Griffin-Lim, because {heard.rough}."]
    if heard.voice is None:
        return [*lines, "Right: silent, the episode has no sound of the model."]
    lines.append(
        "Right, the model's voice: what is sampled in chunk k is heard from the beginning of chunk k + 1, 30 ms late."
    )
    return lines + [f"{heard.clipped} of its samples were beyond full scale, and are clipped."] * bool(heard.clipped)
