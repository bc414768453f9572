"""What the model card of a run's checkpoint says (`model.weights.card`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from model.program.reading import parse_yaml
from model.weights.card import Facts, Score
from rl.evaluate import INTERVAL, WATCHED, HeldOut
from rl.folder import RunFolder

GREEDY = "greedy"
"""Name of the mean at temperature 0 (`rl.run.Run.examine`)."""
NO_FAMILY = (WATCHED, GREEDY, INTERVAL)

TRANSFORMERS = """\
from transformers import AutoModelForMultimodalLM, AutoTokenizer

folder = "."  # this folder, or a repository of the hub
model = AutoModelForMultimodalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""
OURS = """\
from model.weights import checkpoint
from rollout.turn.vocabulary import Vocabulary

model = checkpoint.load(".")  # this folder
vocabulary = Vocabulary.of(model)"""
"""Python that loads a checkpoint."""


def facts(
    folder: RunFolder,
    step: int,
    digest: str,
    contract: str,
    before: HeldOut,
    after: Mapping[str, Any] | None = None,
) -> Facts:
    """``step``: finished steps; ``digest``: of the weights; ``contract``: id of the run's; ``before``: as the run's
    `rl.resume.Progress` has it; ``after``: the summary of a run that is finished."""
    recipe = parse_yaml(folder.recipe) or {}
    scores = list(_scores("after warm start", before.score, recipe, "scenarios"))
    during = [record for record in folder.metrics() if "eval/held_out" in record and record["step"] < step]
    if after is not None:
        scores += _scores("after RL", _means(after, "eval/after"), recipe, "scenarios")
    elif during:
        when = f"after {during[-1]['step'] + 1} steps"
        scores += _scores(when, _means(during[-1], "eval/held_out"), recipe, "during")
    return Facts(
        title=folder.path.name,
        summary=f"A policy for conversations in micro-turns of 200 ms, after {step} steps of exactly on-policy RL: "
        "each token that it learnt from was sampled with the very log-probability of which the gradient was taken, bit "
        "for bit. The weights are of Inkling's architecture.",
        identity={"step": str(step), "weights digest": digest, "contract": contract},
        recipe=folder.recipe,
        loading=OURS,
        with_transformers=TRANSFORMERS,
        scores=scores,
    )


def _means(record: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """By family, the mean of all under ``""``, as in `HeldOut`."""
    return {name.removeprefix(prefix).lstrip("/"): value for name, value in record.items() if name.startswith(prefix)}


def _scores(when: str, means: Mapping[str, float], recipe: Mapping[str, Any], many: str) -> Iterator[Score]:
    """``many``: the field of the recipe's ``eval`` that says over how many scenarios of each family."""
    families = [name for name in means if name and not name.endswith("_tight") and name not in NO_FAMILY]
    each = recipe.get("eval", {}).get(many)
    for name in (one for one in ("", *families, GREEDY) if one in means):
        count = each and each * (1 if name in families else len(families))
        within = None if name else means.get(INTERVAL)
        yield Score(f"held out, {when}" + (f", {name}" if name else ""), means[name], count, within)
