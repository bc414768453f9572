"""Re-scores a run's saved episodes: computes the learner's log-probs again, from the checkpoint that sampled them.

An episode that cannot be compared (`rl.audit.replay.comparable`) gets no log-probs and enters no count, because other
inputs are not a mismatch. First, every checkpoint of the run is compared with its manifest, including the optimizer's
state, from which a resumed run would go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.weights import checkpoint, manifest, packs
from rl.audit.diagnosis.diagnose import Diagnosis, explain
from rl.audit.document import Reason
from rl.audit.records import Records
from rl.audit.replay.comparable import incomparable, other_contract
from rl.step.batch import all_logprobs, collate
from rl.step.identity import Evidence, Mismatch, choices, compare, unequal
from rollout.record.episode import Episode, load_episodes
from rollout.turn.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class CheckedEpisode:
    """A saved episode and what the learner gives for its N choices, where it was re-scored: its sampled tokens and then
    its chunks of sound."""

    step: int
    episode: Episode
    why_not: tuple[Reason, str] | None = None  # why it cannot be compared; None if it can
    logprob: Tensor | None = None  # fp32 [N], the learner's; None where nothing was re-scored
    digest: Tensor | None = None  # int64 [N], the learner's row digests

    @property
    def state(self) -> str:
        """identical, different, not_comparable or not_rescored"""
        if self.why_not:
            return "not_comparable"
        if self.logprob is None:
            return "not_rescored"
        return "different" if bool((self.token_differs | self.row_differs).any()) else "identical"

    @property
    def token_differs(self) -> Tensor:
        """bool [N]: the log-prob's bits are not the learner's, or it is no finite number."""
        if self.logprob is None:
            return torch.zeros(len(choices([self.episode], "logprob")), dtype=torch.bool)
        return unequal(choices([self.episode], "logprob"), self.logprob)

    @property
    def row_differs(self) -> Tensor:
        """bool [N]: the digest of the whole row is not the learner's."""
        if self.digest is None:
            return torch.zeros(len(choices([self.episode], "digest")), dtype=torch.bool)
        return choices([self.episode], "digest") != self.digest

    @property
    def mismatch(self) -> Mismatch:
        if self.logprob is None or self.digest is None:
            return Mismatch.total([])
        logprob, digest = (choices([self.episode], name) for name in ("logprob", "digest"))
        return compare(logprob, self.logprob, digest, self.digest)


@dataclass(frozen=True, eq=False)
class CheckedStep:
    """The saved episodes of one step."""

    step: int
    episodes: list[CheckedEpisode]
    weights_digest: str | None  # of the checkpoint's weights, computed now; None if there is no usable checkpoint
    packs_digest: str | None = None  # of the packed copies of these weights, made now (`model.weights.packs`)
    diagnosis: Diagnosis | None = None  # of the step's first difference

    @property
    def mismatch(self) -> Mismatch:
        return Mismatch.total([one.mismatch for one in self.episodes])


def rescore(records: Records, at_most: int | None = None) -> Iterator[CheckedStep]:
    """Re-scores every step with saved episodes, in order. Adds gaps to ``records.gaps``, and checkpoints that are not
    as they were saved to ``records.damaged_checkpoints``. ``at_most``: most episodes to re-score, an equal share of
    each step and at least one; 0 for none. Raises ValueError for a negative number."""
    if at_most is not None and at_most < 0:
        raise ValueError(f"at_most is {at_most}, a number of episodes")
    check_checkpoints(records)
    _check_saved(records)
    share = at_most and max(1, at_most // max(1, len(records.episodes)))
    for step in sorted(records.episodes):
        episodes = _load(records, step)
        if not episodes or records.config is None:
            yield CheckedStep(step, [CheckedEpisode(step, e) for e in episodes], None)
            continue
        model = _policy(records, step)
        if model is None:
            checked = [CheckedEpisode(step, e, other_contract(e)) for e in episodes]
            yield CheckedStep(step, checked, None)
            continue
        digest = checkpoint.weights_digest(model)
        vocabulary = Vocabulary.of(model)
        layout = records.config.rollout.grammar(vocabulary, model.senses)
        temperature = records.config.rollout.temperature
        checked = [
            CheckedEpisode(step, e, incomparable(e, digest, temperature, layout, model.sound_steps)) for e in episodes
        ]
        places = [i for i, one in enumerate(checked) if one.why_not is None][:share]
        scored = _with_learner_logprobs(model, vocabulary, [checked[i] for i in places], records.config.rl.micro_batch)
        for i, one in zip(places, scored, strict=True):
            checked[i] = one
        left = sum(one.state == "not_rescored" for one in checked)
        if left:
            records.gaps.append(
                f"Step {step}: {left} of {len(checked)} saved episodes were not re-scored, to save time."
            )
        diagnosis = _diagnosis(model, checked, records.config.rl.micro_batch, records.gaps)
        yield CheckedStep(step, checked, digest, packs.digest(model), diagnosis)


def _diagnosis(
    model: InteractionModel, checked: Sequence[CheckedEpisode], micro_batch: int, gaps: list[str]
) -> Diagnosis | None:
    """Of the step's first difference, if there is one."""
    scored = [one for one in checked if one.logprob is not None and one.digest is not None]
    if all(one.state == "identical" for one in scored):
        return None
    evidence = Evidence(
        scored[0].step,
        [one.episode for one in scored],
        _text_first(scored, [one.logprob for one in scored if one.logprob is not None]),
        _text_first(scored, [one.digest for one in scored if one.digest is not None]),
        micro_batch,
    )
    diagnosis, failure = explain(model, evidence)
    gaps += [f"Step {evidence.step}: {failure}"] if failure else []
    return diagnosis


def _text_first(scored: Sequence[CheckedEpisode], values: Sequence[Tensor]) -> Tensor:
    """Of values of each episode's choices: those of all tokens, then those of all sound, as `Evidence` has them."""
    lengths = [len(one.episode.text.chunk) for one in scored]
    return torch.cat(
        [v[:n] for v, n in zip(values, lengths, strict=True)] + [v[n:] for v, n in zip(values, lengths, strict=True)]
    )


def _load(records: Records, step: int) -> list[Episode]:
    episodes: list[Episode] = []
    for file in records.episodes[step]:
        try:
            episodes += load_episodes(file)
        except MetronomeError as error:
            records.gaps.append(f"Step {step}: {error}")
    planned = records.config.rl.groups * records.config.rl.rollouts if records.config else 0
    if len(episodes) < planned:
        records.gaps.append(f"Step {step}: {len(episodes):,} of its {planned:,} episodes are there and can be read.")
    return episodes


def _check_saved(records: Records) -> None:
    """A gap where the recipe saves the episodes of steps that were taken, and they are not there."""
    every = records.config.rl.save_episodes_every if records.config else 0
    saved = [r["step"] for r in records.metrics if every and r["step"] % every == 0]
    if records.episodes and (gone := [step for step in saved if step not in records.episodes]):
        records.gaps.append(f"The run saved episodes of {len(gone)} more steps, which are gone: {gone[:6]}.")


def check_checkpoints(records: Records) -> None:
    """Compares every checkpoint with its manifest. Adds those that differ to ``records.damaged_checkpoints``, and those
    without a manifest to ``records.gaps``."""
    without = without_manifest(records)
    for step, folder in sorted(records.checkpoints.items()):
        if step in without:
            continue
        try:
            manifest.check(folder, recipe=(records.recipe_text, *records.earlier_recipes))
        except manifest.CheckpointError as error:
            records.damaged_checkpoints.append(f"The checkpoint of step {step} is not as the run saved it: {error}.")
    if without:
        names = ", ".join(records.checkpoints[step].name for step in without)
        records.gaps.append(f"Without a manifest, so that damage to their files is not seen: {names}.")


def without_manifest(records: Records) -> list[int]:
    """Steps whose checkpoints have no manifest."""
    return [step for step, path in sorted(records.checkpoints.items()) if not (path / manifest.MANIFEST).is_file()]


def _policy(records: Records, step: int) -> InteractionModel | None:
    """The model that sampled ``step``, from the run's checkpoint; None, and a gap, if there is none."""
    if step not in records.checkpoints:
        records.gaps.append(
            f"Step {step}: no checkpoint holds the weights that sampled its episodes; they were not re-scored."
        )
        return None
    try:
        return checkpoint.load(records.checkpoints[step] / "model").requires_grad_(False)
    except MetronomeError as error:
        records.gaps.append(f"Step {step}: {error}; its episodes were not re-scored.")
        return None


@torch.inference_mode()
def _with_learner_logprobs(
    model: InteractionModel, vocabulary: Vocabulary, seen: Sequence[CheckedEpisode], micro_batch: int
) -> Iterator[CheckedEpisode]:
    """By the row contract the number of episodes in a pass does not enter the result."""
    for first in range(0, len(seen), micro_batch):
        some = seen[first : first + micro_batch]
        batch = collate([one.episode for one in some], model.senses)
        (logprob, _, digest), sound = all_logprobs(model, batch, vocabulary.classes, some[0].episode.temperature)
        columns = [part.cpu().split([len(one.episode.text.chunk) for one in some]) for part in (logprob, digest)]
        if sound is not None:
            spoken = [0 if (v := one.episode.voice) is None else len(v.chunk) for one in some]
            more = (part.cpu().split(spoken) for part in (sound.logprob, sound.digest))
            columns = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(columns, more, strict=True)]
        for one, p, d in zip(some, *columns, strict=True):
            yield replace(one, logprob=p, digest=d)
