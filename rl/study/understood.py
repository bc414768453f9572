"""How well a run's policy is understood, before and after: words said aloud on held-out scenarios, by a recogniser.

    python -m rl.study.understood --run runs/NAME [--steps '[0, 100]'] --json FILE

Each checkpoint plays the same scenarios with the same seeds, at the temperature of training. Words of which at least as
much was heard as of the lexicon's sound (*whole*, `reward.voice.listener`) are counted by whether the recogniser takes
them for themselves, with the closed grammar of the family's words and in free decoding, which has 130,000 words and
understands about a half of the recordings themselves. The error of level is that of a word's loudest chunk. It needs
pocketsphinx (``pip install -e '.[voice]'``).
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.study.understood")

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table

from kernels.errors import MetronomeError
from model.placement import PlacementConfig
from model.program.files import write_json
from model.program.outputs import OutputFile
from model.program.ranges import Distinct, FilePath, Length, Some, Steps
from model.program.recipe import read_recipe
from model.voice.sound import render
from model.weights import checkpoint
from reward.score import score
from reward.source import listeners
from reward.voice.listener import ITERATIONS, Listener, Word, sounds
from rl.config import TrainConfig
from rl.stored import opened
from rollout.engines.embedded import SessionEngine
from rollout.play import Play, play
from rollout.record.episode import Episode
from rollout.world.speech import SpeechBank


@dataclass(frozen=True)
class UnderstoodConfig:
    """The recipe of `rl.study.understood`."""

    run: FilePath  # folder of the run whose policies speak, by that run's recipe
    json: Annotated[str, OutputFile()]  # for the results
    steps: Annotated[tuple[Steps, ...], Length(0, 100), Distinct()] = ()  # checkpoints; the first and newest by default
    scenarios: Some = 96  # held-out, of each family in which something is said aloud
    free: bool = True  # decode freely, too, which takes ten times as long
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    trust_families: bool = False  # import families that are not shipped; importing executes their module


@dataclass(frozen=True)
class Share:
    """A mean over words, with half of its 95 % interval: scenarios are drawn, words come with them."""

    mean: float
    interval: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} ± {self.interval:.1%}"

    @staticmethod
    def of(values: Sequence[Sequence[float]]) -> Share | None:
        """``values``: those of each scenario's words. A ratio of sums: Cochran 1977, Sampling Techniques, eq. 6.4."""
        count = sum(map(len, values))
        if not count:
            return None
        mean = math.fsum(x for one in values for x in one) / count
        squares = math.fsum((math.fsum(one) - mean * len(one)) ** 2 for one in values)
        wider = len(values) / max(1, len(values) - 1)
        return Share(mean, 1.96 * math.sqrt(squares * wider) / count)


@dataclass(frozen=True)
class Row:
    """One checkpoint on one family."""

    step: int
    family: str
    weights_digest: str
    score: Share | None  # by the rules
    words: int  # of which something was heard
    whole: int
    understood: Share | None  # of the whole words, with the closed grammar
    of_all: Share | None  # of all words, those that the user interrupted and those whose last chunks are too soft, too
    free: Share | None  # of the whole words, in free decoding; None: not asked for
    level_error_db: Share | None  # mean absolute error of whole words; None where the family asks for no level
    by_word: dict[str, tuple[int, int]]  # word -> (times whole, times understood)
    confused: dict[str, int]  # "said: understood as" -> times


def measure(step: int, digest: str, episodes: Sequence[Episode], config: TrainConfig, ear: Listener, free: bool) -> Row:
    """Of the episodes of one family."""
    family = episodes[0].family
    scores = [[score(family, e.facts, e.actions, config.scenarios).value] for e in episodes]
    words = [ear.words(e.actions) for e in episodes]
    whole = [[w for w in of_one if w.whole] for of_one in words]
    freely = [_freely(e, of_one, ear) for e, of_one in zip(episodes, whole, strict=True)] if free else []
    errors = [
        [abs(w.level_db - target) for w in of_one]
        for e, of_one in zip(episodes, whole, strict=True)
        if (target := e.facts.get("target_db")) is not None
    ]
    all_whole = [w for of_one in whole for w in of_one]
    times, right = Counter(w.word for w in all_whole), Counter(w.word for w in all_whole if w.right)
    return Row(
        step,
        family,
        digest,
        Share.of(scores),
        sum(map(len, words)),
        len(all_whole),
        Share.of([[float(w.right) for w in of_one] for of_one in whole]),
        Share.of([[float(w.right) for w in of_one] for of_one in words]),
        Share.of(freely),
        Share.of(errors),
        {word: (times[word], right[word]) for word in sorted(times)},
        dict(Counter(f"{w.word}: {w.understood or 'nothing'}" for w in all_whole if not w.right).most_common()),
    )


def _freely(episode: Episode, whole: Sequence[Word], ear: Listener) -> list[float]:
    starts = {word.start: word.word for word in whole}
    return [
        float(ear.recogniser.free(render(sound, ITERATIONS)) == (starts[utterance.start],))
        for utterance, sound in sounds(episode.actions, ear.audible_db)
        if utterance.start in starts
    ]


def table(rows: Sequence[Row]) -> Table:
    out = Table(
        *("step", "family", "score", "words", "understood", "whole words", "understood", "freely", "level, dB off"),
        title="Words said aloud, held-out scenarios",
    )
    for row in rows:
        level = row.level_error_db
        out.add_row(
            *(str(row.step), row.family, str(row.score), str(row.words), str(row.of_all or "-"), str(row.whole)),
            *(str(row.understood or "-"), str(row.free or "-")),
            f"{level.mean:.2f} ± {level.interval:.2f}" if level else "-",
        )
    return out


def main(arguments: list[str] | None = None) -> None:
    given = read_recipe("rl.study.understood", "How well a policy is understood.", UnderstoodConfig, arguments).config
    config, folder = opened(given.run, given.placement, given.trust_families)
    ears = listeners(config.scenarios)
    steps = given.steps or tuple(sorted({0, folder.latest_checkpoint()[0]}))
    paths = [folder.checkpoint_path(step) / "model" for step in steps]
    for step, path in zip(steps, paths, strict=True):
        if not path.is_dir():
            raise MetronomeError(f"steps: {given.run} has no checkpoint of step {step}")
    bank = SpeechBank.open(config.speech_dir)
    rows = []
    for step, path in zip(steps, paths, strict=True):
        engine = SessionEngine.of(checkpoint.load(path, keep_weights=False), config.rollout, given.scenarios)
        for name, ear in ears.items():
            items = [config.scenarios.scenario(name, "held_out", i, bank) for i in range(given.scenarios)]
            episodes = play(engine, [Play(item, 0) for item in items], config.seed, config.rollout.temperature)
            rows.append(measure(step, engine.weights_digest, episodes, config, ear, given.free))
    console = Console(highlight=False)
    console.print(table(rows))
    last = rows[-1]
    console.print(
        f"Step {last.step}, {last.family}: {len(last.by_word)} words; fewest understood: "
        + ", ".join(f"{w} {r}/{n}" for w, (n, r) in sorted(last.by_word.items(), key=lambda x: x[1][1] / x[1][0])[:8])
    )
    write_json(
        Path(given.json), {"run": given.run, "scenarios": given.scenarios, "rows": [asdict(row) for row in rows]}
    )
    print(f"written to {given.json}")
