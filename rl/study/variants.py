"""What the matrix compares: our kernels and naive torch with one checkpoint's weights, and ways to compute log-probs.

A `Variant` is a model whose weights are packed for one backend; `active` runs the ops through that backend. `uncached`,
`beside_others` and `cached` each compute the log-prob and row digest of the same sampled tokens, so that any two of
their results can be compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from kernels import dispatch
from kernels.backend import Backend
from kernels.reference import naive
from model.backbone.state import SessionState
from model.backbone.transformer import InteractionModel
from model.inputs import Inputs
from model.weights import checkpoint
from rl.step.batch import choice_logprobs, collate
from rl.step.identity import Mismatch, compare
from rollout.engines.embedded import SessionEngine
from rollout.engines.engine import Engine
from rollout.engines.vllm.process import unavailable_reason
from rollout.record.episode import Episode
from rollout.turn.vocabulary import Vocabulary

DTYPES = (torch.float32, torch.bfloat16)
SPARE_SLOTS = 4
"""Slots of a session state beyond two for each episode: for the sessions that put its free pages into another order."""


def naive_torch() -> Backend:
    """`kernels.reference.naive` where the active backend's tensors lie: with that one's copies to and from there, and
    its update of weights."""
    active = dispatch.backend()
    names = ("DEVICE", "upload", "deferred", "fetch", "adamw")
    return cast(Backend, SimpleNamespace(**vars(naive) | {name: getattr(active, name) for name in names}))


@dataclass(frozen=True)
class Variant:
    """A model of one backend and dtype."""

    name: str  # "ours" or "naive torch"
    dtype: str  # "float32" or "bfloat16"
    model: InteractionModel
    vocabulary: Vocabulary
    backend: Backend

    @staticmethod
    def load(name: str, folder: Path, dtype: torch.dtype) -> Variant:
        """The checkpoint in ``folder`` as the variant ``name``; raises CheckpointError when it cannot be read."""
        backend = dispatch.backend() if name == "ours" else naive_torch()
        with dispatch.substituted(backend):
            model = checkpoint.load(folder, dtype)
        short = str(dtype).removeprefix("torch.")
        return Variant(name, short, model, Vocabulary.of(model), backend)

    def active(self) -> AbstractContextManager[None]:
        """A block in which the ops run on the variant's backend."""
        return dispatch.substituted(self.backend)


def load_variants(folder: Path, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Variant]:
    """Both backends with the checkpoint's weights, in each dtype."""
    return [Variant.load(name, folder, dtype) for dtype in dtypes for name in ("ours", "naive torch")]


Start = Callable[["Variant", int, int], AbstractContextManager[Engine]]
"""(variant, sessions at a time, longest context in tokens) -> an engine, closed at the end of the block."""


def session_engine(variant: Variant, slots: int, max_tokens: int) -> Engine:
    """The embedded engine with a variant's model; ``max_tokens``: longest context."""
    return SessionEngine(variant.model, variant.vocabulary, slots=slots, max_tokens=max_tokens)


def _session(variant: Variant, slots: int, max_tokens: int) -> AbstractContextManager[Engine]:
    return nullcontext(session_engine(variant, slots, max_tokens))


@contextmanager
def _vllm(variant: Variant, slots: int, max_tokens: int) -> Iterator[Engine]:
    """Ended afterwards: a process holds one vLLM at a time."""
    from rollout.engines.vllm.engine import VllmEngine

    engine = VllmEngine(variant.model, variant.vocabulary, slots=slots, max_tokens=max_tokens)
    try:
        yield engine
    finally:
        engine.core.close()


def engines(variant: Variant) -> dict[str, Start]:
    """The engines that can run a variant, by name. vLLM, where installed, runs only our kernels."""
    starts: dict[str, Start] = {"session": _session}
    if variant.name == "ours" and unavailable_reason() is None:
        starts["vllm"] = _vllm
    return starts


@dataclass(frozen=True)
class LogProbs:
    """Log-probs of the N sampled tokens of some episodes, one episode after another."""

    logprob: Tensor  # fp32 [N]
    digest: Tensor  # int64 [N] of each token's whole row of log-probs

    def against(self, other: LogProbs) -> Mismatch:
        """This compared with ``other``, which counts as the sampler's."""
        return compare(other.logprob, self.logprob, other.digest, self.digest)


def uncached(variant: Variant, episodes: Sequence[Episode], together: int = 1) -> LogProbs:
    """Computed without a cache, ``together`` episodes in one forward pass."""
    with torch.no_grad(), variant.active():
        parts = []
        for first in range(0, len(episodes), together):
            batch = collate(episodes[first : first + together], variant.model.senses)
            logprob, _, digest = choice_logprobs(
                variant.model, batch, variant.vocabulary.classes, episodes[0].temperature
            )
            parts.append((logprob, digest))
    logprobs, digests = zip(*parts, strict=True)
    return LogProbs(torch.cat(logprobs).cpu(), torch.cat(digests).cpu())


def beside_others(variant: Variant, episodes: Sequence[Episode]) -> LogProbs:
    """The first episode's log-probs, computed in one pass with the other episodes."""
    scored, n = uncached(variant, episodes, len(episodes)), len(episodes[0].text.sampled_at)
    return LogProbs(scored.logprob[:n], scored.digest[:n])


def joined(parts: Sequence[LogProbs]) -> LogProbs:
    """The parts' tokens, one part after another."""
    return LogProbs(torch.cat([p.logprob for p in parts]), torch.cat([p.digest for p in parts]))


@dataclass(frozen=True)
class Cuts:
    """How sessions are fed; all sessions in lockstep."""

    rows: int = 0  # rows of each session in a call; 0: all in one call
    micro_turns: bool = False  # cut where the sessions sampled instead of every ``rows`` rows
    fork_at: int = 0  # each session is replaced by a fork of it at this row; 0: no fork
    scattered: bool = False  # the cache's pages are taken in a shuffled order


def cached(variant: Variant, episodes: Sequence[Episode], cuts: Cuts) -> LogProbs:
    """Computed through the sessions' cache, fed as ``cuts`` says."""
    longest = max(int(e.text.sampled_at[-1]) for e in episodes)
    slots = 2 * len(episodes) + SPARE_SLOTS
    with torch.no_grad(), variant.active():
        model = variant.model
        state = SessionState(model.config, slots, longest, model.dtype, max_rows=len(episodes) * longest)
        if cuts.scattered:
            _scatter(state, longest)
        slot_of = [state.open() for _ in episodes]
        ends = [_ends(e, cuts) for e in episodes]
        hidden: list[list[Tensor]] = [[] for _ in episodes]
        inputs = Inputs.cat(episodes, model.senses)
        for call in range(max(map(len, ends))):
            turn = [e for e in range(len(episodes)) if call < len(ends[e])]
            spans = [(e, ends[e][call - 1] if call else 0, ends[e][call]) for e in turn]
            for e, first, _ in spans:
                if cuts.fork_at and first == cuts.fork_at:
                    slot_of[e] = state.fork(slot_of[e])
            lengths = [end - first for _, first, end in spans]
            segments = state.extend([slot_of[e] for e in turn], lengths)
            out = model(inputs.part(spans, segments), state)
            for e, rows in zip(turn, out.split(lengths), strict=True):
                hidden[e].append(rows)
        at = [(e.text.sampled_at - 1).to(model.device) for e in episodes]
        rows = torch.cat([torch.cat(h)[a] for h, a in zip(hidden, at, strict=True)])
        batch = collate(episodes, model.senses)
        logprob, _, digest = variant.vocabulary.classes.logprob(
            model.logits(rows), batch.target, batch.row_class, episodes[0].temperature
        )
    return LogProbs(logprob.cpu(), digest.cpu())


def _ends(episode: Episode, cuts: Cuts) -> list[int]:
    """Where each call's rows of an episode end; the last row is that of its last sampled token."""
    last = int(episode.text.sampled_at[-1])
    if cuts.micro_turns:
        return episode.text.sampled_at.tolist()
    marks = set(range(cuts.rows, last, cuts.rows)) if cuts.rows else set()
    if 0 < cuts.fork_at < last:
        marks.add(cuts.fork_at)
    return [*sorted(marks), last]


def _scatter(state: SessionState, rows: int) -> None:
    """Leaves the free pages in another order: sessions take some by turns and end in another order."""
    slots = [state.open() for _ in range(SPARE_SLOTS)]
    for _ in range(rows // 16):
        for slot in slots:
            state.extend([slot], [16])
    for slot in (slots[2], slots[0], slots[3], slots[1]):
        state.close(slot)
