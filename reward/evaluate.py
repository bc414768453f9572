"""How good reward models are: on held-out pairs, and on rollouts of a policy that they never saw.

    python -m reward.evaluate --config configs/reward_evaluate.yaml --json runs/reward_evaluation.json

Prints and writes, for each axis: the share of held-out pairs put in the right order, by family, source and size of
corruption (a pair of equal scores counts half); the expected calibration error, after a temperature fitted on one half
of the held-out conversations and reported on the other (the temperature is then stored with the model), and how many
pairs each of these figures rests on; Spearman's rank correlation of episode scores with the rule's; and what scoring
costs beside rolling out. A reliability plot lies beside the JSON file, which names the digests of pairs, policy and
models. A failure leaves the models as they were.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("reward.evaluate")

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from kernels import dispatch
from kernels.errors import MetronomeError
from model.context import ContextConfig
from model.placement import Placement, PlacementConfig
from model.program.files import whole_folder, write_json
from model.program.folders import locked
from model.program.outputs import OutputFile, check_folder
from model.program.ranges import Distinct, EventWords, FilePath, Length, Patches, Seed, Some, Tokens, Words
from model.program.recipe import read_recipe
from model.weights import checkpoint
from model.weights.finite import check_finite
from reward.learned.calibrate import COUNTING, Reliability, fit_temperature, halves, plot, reliability, right
from reward.learned.model import RewardModel, check_silent, episode_scores
from reward.learned.preference import Preference, check_words, distinct, from_row, load_preferences, origin_of
from reward.learned.trainable import stretch_scores
from reward.pairs import SESSIONS, PolicyRecipe
from reward.score import score
from rollout.engines.embedded import SessionEngine
from rollout.play import Play, play
from rollout.scenarios.registry import ScenarioConfig
from rollout.seeds import preference_seed
from rollout.turn.grammar import check_context
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import SpeechBank

FIRST_UNSEEN_SCENARIO = 5_000_000
"""Index of the first held-out scenario to roll out. `reward.pairs` uses smaller indices, so no pair contains it."""
PAIRS_PER_CALL = 64
"""How many pairs are scored in one call. Pairs that share a conversation then share its forward pass."""

Report = dict[str, float | int | str | None]
"""Result by name; None where it is undefined."""


@dataclass(frozen=True)
class UnseenPolicy:
    """Rollouts of a policy on held-out scenarios, on which learned and rule scores are correlated."""

    policy: PolicyRecipe = field(default_factory=lambda: PolicyRecipe("runs/quickstart/checkpoints/step_000080/model"))
    scenarios: Some = 96  # of each family
    max_tokens: Tokens = 512
    words_per_chunk: Words = 1  # most words that a micro-turn may say
    max_patches: Patches = 0  # most video patches that it may see
    max_event_words: EventWords = 0  # most words of text events that it may read
    context: ContextConfig = field(default_factory=ContextConfig)  # its policy at the context limit


@dataclass(frozen=True)
class EvaluateConfig:
    """The recipe of `reward.evaluate`."""

    json: Annotated[str, OutputFile(beside=(".png",))]  # for the results; the reliability plot gets its name with .png
    models: Annotated[tuple[FilePath, ...], Length(1, 100), Distinct()] = ("runs/reward_shared/model",)
    pairs: FilePath = "runs/reward_pairs"
    seed: Seed = 0
    speech_dir: FilePath | None = None
    scenarios: ScenarioConfig = field(default_factory=ScenarioConfig)
    unseen: UnseenPolicy = field(default_factory=UnseenPolicy)
    placement: PlacementConfig = field(default_factory=PlacementConfig)


def main(arguments: list[str] | None = None) -> None:
    config = read_recipe("reward.evaluate", "Evaluate reward models.", EvaluateConfig, arguments).config
    unseen = config.unseen
    longest = config.scenarios.most_chunks, unseen.words_per_chunk, unseen.max_patches + unseen.max_event_words
    check_context("unseen.max_tokens", unseen.max_tokens, *longest)
    Placement.enter(config.placement, "float32")
    with ExitStack() as held:
        for folder in sorted({os.path.realpath(one) for one in config.models}):
            held.enter_context(locked(Path(folder)))
        run(config)


def run(config: EvaluateConfig) -> None:
    """Evaluates the models, writes the results, and stores the models' temperatures last."""
    path = Path(config.json)
    # Everything that the work needs is read and checked before it begins.
    models = load_models(config.models)
    pairs = {axis: held_out(config.pairs, axis, model) for model in models.values() for axis in model.axes}
    policy = checkpoint.load(config.unseen.policy.checkpoint, keep_weights=False)
    check_silent(policy, "unseen.policy")
    for model in models.values():
        Vocabulary.of(policy).check_same(model.backbone, model.name)
    check_words(Path(config.pairs), Vocabulary.of(policy))
    engine = SessionEngine.of(policy, config.unseen, SESSIONS)
    bank = SpeechBank.open(config.speech_dir)
    report: Report = {
        "contract_id": dispatch.contract_id(),
        "counting": COUNTING,
        "pairs": origin_of(Path(config.pairs)).digest,
        "policy": engine.weights_digest,
    }
    curves: dict[str, Reliability] = {}
    for model in models.values():
        report[f"model/{'_and_'.join(model.axes)}"] = checkpoint.weights_digest(model)
        for axis in model.axes:
            difference = compare(model, axis, pairs[axis])
            report |= {f"{axis}/{name}": value for name, value in accuracies(pairs[axis], difference).items()}
            fitted = halves(pairs[axis])
            report |= {f"{axis}/pairs_fitted": int(fitted.sum()), f"{axis}/pairs_ece": int((~fitted).sum())}
            model.temperature[axis] = fit_temperature(difference[fitted])
            curves[axis] = reliability(difference[~fitted], model.temperature[axis])
            report[f"{axis}/temperature"] = model.temperature[axis]
            report[f"{axis}/ece_before"] = reliability(difference[~fitted], 1.0).error
            report[f"{axis}/ece"] = curves[axis].error
    report |= dict(on_rollouts(config, engine, bank, list(models.values())))
    with ExitStack() as stack:  # the models take their places last, and only when all else is written
        for folder, model in models.items():
            model.write(stack.enter_context(whole_folder(folder)), folder.name)
        plot(path.with_suffix(".png"), curves)
        write_json(path, report)
    for name, value in report.items():
        print(f"{name:48s} {'undefined' if value is None else f'{value:.4f}' if isinstance(value, float) else value}")
    print(f"written to {path} and {path.with_suffix('.png')}")


def load_models(folders: Sequence[str]) -> dict[Path, RewardModel]:
    """The models by folder. Raises MetronomeError unless there is one, each is named once, in a folder that can be
    written, and no axis is scored by two."""
    if not folders:
        raise MetronomeError("models names no reward model: give the folders that `reward.train` wrote")
    models: dict[Path, RewardModel] = {}
    owner: dict[str, str] = {}
    for folder in folders:
        place = Path(folder).resolve()
        if place in models:
            raise MetronomeError(f"models names {folder} twice: give each reward model once")
        models[place] = RewardModel.load(folder)
        check_folder("models", place.parent)  # the model is written anew, beside itself
        for axis in models[place].axes:
            if axis in owner:
                raise MetronomeError(
                    f"models: {owner[axis]} and {folder} both score {axis}: evaluate one of them at a time"
                )
            owner[axis] = folder
    return models


def held_out(folder: str, axis: str, model: RewardModel) -> list[Preference]:
    """All held-out pairs of an axis. Raises MetronomeError when ``folder`` holds no usable pairs, or too few to fit a
    temperature and report it."""
    rows = load_preferences(Path(folder), "held_out", [axis], model.backbone.senses)
    pairs = [from_row(row) for row in rows]
    fitted = halves(pairs)
    if fitted.all() or not fitted.any():
        raise MetronomeError(
            f"{folder}: all held-out pairs of {axis} share conversations or scenarios; two sets that share none are "
            "needed, to fit a temperature and to report it. Make pairs of more scenarios"
        )
    return pairs


def compare(model: RewardModel, axis: str, pairs: Sequence[Preference]) -> NDArray[np.float64]:
    """For each pair the model's score of the chosen stretch minus that of the rejected one, fp64 [P]. Raises
    NotFiniteError when one is not finite."""
    batches = [pairs[i : i + PAIRS_PER_CALL] for i in range(0, len(pairs), PAIRS_PER_CALL)]
    found = torch.cat([differences(model, axis, batch) for batch in batches])
    check_finite(model.name, [(f"differences of {axis} scores", found)], "train it anew")
    return found.double().numpy()


def differences(model: RewardModel, axis: str, pairs: Sequence[Preference]) -> torch.Tensor:
    """Score of the chosen stretch minus score of the rejected one on ``axis``, fp32 [P]. A conversation that is in
    several pairs is scored once."""
    stretches = [*(p.chosen for p in pairs), *(p.rejected for p in pairs)]
    conversations, indices = distinct(stretches)
    first, end = torch.tensor([s.first for s in stretches]), torch.tensor([s.end for s in stretches])
    scores = stretch_scores(
        model.score(conversations), indices, first, end, torch.full_like(first, model.axes.index(axis))
    )
    chosen, rejected = scores.chunk(2)
    return chosen - rejected


def accuracies(pairs: Sequence[Preference], difference: NDArray[np.float64]) -> dict[str, float | int]:
    """For all pairs and for each group that `groups_of` names: ``accuracy<group>``, the share of pairs in the right
    order, a pair of equal scores counting half (`reward.learned.calibrate.right`); ``pairs<group>``, their number;
    ``ties<group>``, how many have equal scores, of all pairs and of groups that have some. A group without a pair is
    left out; ``difference`` fp64 [P]."""
    places: dict[str, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        for group in groups_of(pair):
            places[group].append(i)
    value, tied = right(difference), difference == 0
    groups = sorted(places.items())
    shares: dict[str, float | int] = {f"accuracy{group}": float(value[at].mean()) for group, at in groups}
    shares |= {f"pairs{group}": len(at) for group, at in groups}
    return shares | {f"ties{group}": int(tied[at].sum()) for group, at in groups if tied[at].any() or not group}


def groups_of(pair: Preference) -> Iterator[str]:
    """The groups in which a pair's accuracy is reported, as suffixes of metric names; "" is the group of all pairs."""
    yield ""
    yield f"/family/{pair.family}"
    yield f"/source/{pair.source}"
    if pair.size_ms:
        yield f"/source/{pair.source}/{abs(pair.size_ms)}_ms"
    if pair.source == "shift" and abs(pair.size_ms) >= 400:
        yield "/shift_of_400_ms_or_more"


def on_rollouts(
    config: EvaluateConfig, engine: SessionEngine, bank: SpeechBank, models: Sequence[RewardModel]
) -> Iterator[tuple[str, float | int | str | None]]:
    """Yields (name, value): Spearman's rank correlation of learned with rule episode scores, over all episodes and in
    each family, and the time of scoring in this process: ms an episode, and as a fraction of the rollout's time. Where
    a correlation is undefined its value is None, and a second entry says why."""
    unseen = config.unseen
    first = preference_seed(0, FIRST_UNSEEN_SCENARIO)
    items = config.scenarios.of_each(unseen.scenarios, "held_out", bank, first)
    start = time.perf_counter()
    episodes = play(engine, [Play(item, 0) for item in items], config.seed, unseen.policy.temperature)
    rollout_s = (time.perf_counter() - start) / len(episodes)
    yield "unseen_episodes", len(episodes)
    yield "speed/rollout_ms_an_episode", 1000 * rollout_s
    rule = [score(e.family, e.facts, e.actions, config.scenarios).rewards for e in episodes]
    for model in models:
        start = time.perf_counter()
        scores = episode_scores(model.score(episodes))
        score_s = (time.perf_counter() - start) / len(episodes)
        check_finite(model.name, [("episode scores", scores)], "train it anew")
        name = "_and_".join(model.axes)
        yield f"speed/score_ms_an_episode/{name}", 1000 * score_s
        yield f"speed/score_of_rollout/{name}", score_s / rollout_s
        for i, axis in enumerate(model.axes):
            on_axis = [e for e, rewards in enumerate(rule) if axis in rewards]  # of families that have the axis
            learned = scores[on_axis, i].double().numpy()
            ruled = np.array([float(rule[e][axis].sum(dtype=np.float64)) for e in on_axis])
            yield from correlation(f"{axis}/spearman", learned, ruled)
            families = np.array([episodes[e].family for e in on_axis])
            for name in dict.fromkeys(families.tolist()):
                of_it = families == name
                yield from correlation(f"{axis}/spearman/family/{name}", learned[of_it], ruled[of_it])


def correlation(
    name: str, learned: NDArray[np.float64], ruled: NDArray[np.float64]
) -> Iterator[tuple[str, float | str | None]]:
    """Yields (name, Spearman's rank correlation) of E episodes' scores, both [E]; where it is undefined (name, None)
    and (name/undefined, why)."""
    why = "fewer than two episodes" if len(learned) < 2 else ""
    for scores, whose in ((learned, "learned"), (ruled, "rules'")):
        if not why and (scores == scores[0]).all():
            why = f"the {whose} scores of all {len(scores)} episodes are equal"
    yield name, None if why else float(spearmanr(learned, ruled).statistic)
    if why:
        yield f"{name}/undefined", why
