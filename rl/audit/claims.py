"""What a run's folder says of the run, and where it contradicts itself: summary, records, recipe and checkpoints.

A run claims to have finished by its summary. Then its records must go to the last step, and the summary's final weights
and counts must be those of the records. A checkpoint's weights must have the digest that was recorded at its step.
Each process saves the episodes that it played, each of them once, under the contract that environment.json names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kernels.errors import MetronomeError
from model.weights import checkpoint
from rl.audit.records import COUNTS, Records, rank_of
from rollout.record.episode import Episode


def claimed_steps(records: Records) -> int | None:
    """The number of steps that a finished run must have: the recipe's, or fewer where its watch stopped it. None if the
    run has not finished or the number is unknown."""
    if not records.summary:
        return None
    stopped = records.summary.get("overoptimisation/step")
    if records.config and records.config.source.watch.stop and type(stopped) is int:
        return stopped
    return records.planned_steps


def final_weights(records: Records) -> str | None:
    """The digest of the final weights by the run's summary; None if it names none."""
    digest = records.summary.get("weights_digest")
    return None if digest is None else str(digest)


def contradictions(records: Records) -> list[str]:
    """Between the summary and the records, in sentences."""
    if not records.summary:
        return []
    sentences, have = [], len(records.metrics)
    last, final = (records.metrics or [{}])[-1].get("weights_digest"), final_weights(records)
    if last and final and last != final:
        sentences.append(f"The run's summary names the final weights {final}; its last record says {last}.")
    steps = claimed_steps(records)
    if steps is None:
        steps = records.metrics[-1]["step"] + 1 if records.metrics else 0
    if have != steps:
        sentences.append(f"By its summary the run finished, but there are records of {have:,} of its {steps:,} steps.")
        return sentences
    for name in COUNTS:
        counted = sum(record[name] for record in records.metrics)
        if name in records.summary and records.summary[name] != counted:
            sentences.append(
                f"The run's summary has {records.summary[name]!r} as {name}; its records have {counted} together."
            )
    return sentences


def of_episodes(records: Records, step: int, episodes: Sequence[Episode]) -> list[str]:
    """What the saved ``episodes`` of ``step`` contradict, in sentences: one that comes twice would count twice."""
    sentences, processes = [], records.processes
    files = [file.name for file in records.episodes.get(step, ())]
    if processes and (strange := [name for name in files if rank_of(name) >= processes]):
        sentences.append(f"{strange[0]} is of a process that the run, of {processes}, does not have.")
    names = Counter(episode.name for episode in episodes)
    if twice := [name for name, count in names.items() if count > 1]:
        sentences.append(f"Step {step}: the episode {twice[0]} was saved {names[twice[0]]} times.")
    planned = records.config.rl.groups * records.config.rl.rollouts if records.config else None
    if planned is not None and len(episodes) > planned:
        sentences.append(f"Step {step}: {len(episodes):,} episodes were saved, and the recipe plays {planned:,}.")
    contracts = {episode.contract_id for episode in episodes} - {records.contract_id}
    if records.contract_id is not None and contracts:
        sentences.append(
            f"environment.json names the contract {records.contract_id}; of step {step}, episodes are of contract "
            f"{sorted(contracts)[0]}."
        )
    return sentences


def other_weights(records: Records, step: int, digest: str | None) -> str | None:
    """A sentence when the checkpoint of ``step`` holds weights of another ``digest`` than the run recorded; None when
    it does not, or one of the two is unknown."""
    recorded = records.weights_digest_before(step)
    if digest is None or recorded in (None, digest):
        return None
    return f"The checkpoint of step {step} holds weights {digest}; the run recorded {recorded}."


def checkpoint_digests(records: Records) -> dict[int, str]:
    """Step -> digest of the weights in its checkpoint, computed now. Adds those that cannot be read to the gaps."""
    digests = {}
    for step, folder in sorted(records.checkpoints.items()):
        try:
            digests[step] = checkpoint.weights_digest(checkpoint.load(folder / "model", pack=False))
        except MetronomeError as error:
            records.gaps.append(f"Step {step}: {error}.")
    return digests
