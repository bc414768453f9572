"""A streaming session's record: what it heard, said and sampled, whichever engine (`rollout.engines.engine`) holds
it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from model.backbone.state import ContextFull
from rollout.record.episode import TEXT, Episode, Stream
from rollout.turn.action import Action
from rollout.turn.observation import Observation, check_senses


@dataclass
class Session:
    """One open sequence. ``tokens[:fed]`` have been through the model; the rest go in with the next chunk."""

    slot: int  # in the engine's state; sessions that have the same past may share it
    key: int  # 64-bit sampling key (rollout.seeds.session_key)
    temperature: float
    weights_digest: str
    tokens: list[int]
    past: Tensor  # fp32 [800], the samples before the next chunk, to which its first frame reaches back
    fed: int = 0
    chunks: int = 0
    codes: list[Tensor] = field(default_factory=list)  # uint8 [CHUNK_FRAMES, 80] a chunk
    actions: list[Action] = field(default_factory=list)  # one a chunk
    sampled: list[tuple[int, int, int]] = field(default_factory=list)  # (position, row class, chunk) a sampled token
    logprob: list[float] = field(default_factory=list)
    digest: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)  # [D] a sampled token, if the engine keeps them
    closed: bool = False

    def forked(self, slot: int, key: int) -> Session:
        """A copy of the record so far, to go on by itself."""
        lists: dict[str, Any] = {f.name: list(v) for f in fields(self) if isinstance(v := getattr(self, f.name), list)}
        return replace(self, slot=slot, key=key, **lists)

    def check_open(self) -> None:
        if self.closed:
            raise ValueError("the session is closed; open or fork another")

    def book(self, token: int, row_class: int, logprob: float, digest: int) -> None:
        """Adds one sampled token to the record."""
        self.sampled.append((len(self.tokens), row_class, self.chunks))
        self.logprob.append(logprob)
        self.digest.append(digest)
        self.tokens.append(token)

    def hear(self, past: Tensor, codes: Tensor, rows: list[int]) -> None:
        """Adds one chunk's observed ``rows``: ``past`` [800] are its last samples, ``codes`` uint8 [CHUNK_FRAMES,
        80]."""
        self.past = past
        self.codes.append(codes)
        self.tokens += rows

    def end_turn(self, action: Action, forced: list[int]) -> None:
        """Ends the micro-turn with the rows that are not sampled."""
        self.tokens += forced
        self.actions.append(action)
        self.chunks += 1

    def episode(self, *, scenario: str, rollout: int, seed: int, facts: dict[str, Any]) -> Episode:
        """The record so far, as the learner and the rewards read it. ValueError after a micro-turn that failed."""
        if len(self.codes) > self.chunks:
            raise ValueError(f"the session was closed by an error inside chunk {self.chunks}; it is no whole episode")
        positions, row_class, chunk = (list(column) for column in zip(*self.sampled, strict=True))
        text = Stream(
            sampled_at=torch.tensor(positions),
            row_class=torch.tensor(row_class),
            chunk=torch.tensor(chunk),
            logprob=torch.tensor(self.logprob, dtype=torch.float32),
            digest=torch.tensor(self.digest),
        )
        return Episode(
            scenario=scenario,
            rollout=rollout,
            seed=seed,
            temperature=self.temperature,
            contract_id=dispatch.contract_id(),
            weights_digest=self.weights_digest,
            facts=facts,
            actions=tuple(self.actions),
            tokens=torch.tensor(self.tokens),
            codes=torch.cat(self.codes),
            streams={TEXT: text},
        )


def check_temperature(temperature: float) -> None:
    """What every engine refuses before it opens a session."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"open: temperature is {temperature}; it must be a number >= 0 (0 is greedy)")


def check_append(
    sessions: Sequence[Session], observations: Sequence[Observation], most_rows: int, max_tokens: int
) -> None:
    """What every engine refuses before a session has moved: observations that do not pair with the sessions or that the
    model has no sense for, a session that is closed or comes twice, and one whose context of ``max_tokens`` rows has no
    room for a micro-turn of ``most_rows``."""
    if len(observations) != len(sessions):
        raise ValueError(f"append: {len(observations)} observations for {len(sessions)} sessions")
    for observation in observations:
        check_senses(observation)
    if len({id(session) for session in sessions}) != len(sessions):
        raise ValueError("append: a session comes twice in one call")
    for session in sessions:
        session.check_open()
        if max_tokens - session.fed < most_rows:
            raise ContextFull(
                f"session in slot {session.slot} holds {session.fed} of at most {max_tokens} tokens; another "
                f"micro-turn may need {most_rows}. Close it, or make the engine with more max_tokens"
            )
