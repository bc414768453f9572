"""The embedded engine: persistent sequences that hear 200 ms at a time and answer each micro-turn, in this process.

A `SessionEngine` owns the weights' packed copies, the KV pages and the convolution windows of all its sessions; a
`Session` is one growing sequence. ``append`` takes one observation for any subset of the open sessions, at whatever
positions they are (continuous batching), prefills the new rows in one forward pass and decodes until every session has
ended its micro-turn. By the row contract of `kernels.ops` the batch that a session is part of cannot change its bits.

A fork shares its origin's memory and computation for as long as the two say and hear the same: the row of log-probs is
computed once and every session draws its own token from it by its own key. Where tokens or sound differ they part, and
only then is memory copied.

Knows nothing of scenarios or rewards. Not here: self audio and video rows (their place in a micro-turn is before the
mode token; they come with the voice and the video tower).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.backbone.state import SessionState
from model.backbone.transformer import InteractionModel
from model.inputs import Inputs
from model.senses.audio import HOP, WINDOW, DMel
from model.weights import checkpoint
from rollout.engines.session import Session, check_append, check_temperature
from rollout.seeds import token_key
from rollout.turn.action import Action
from rollout.turn.grammar import Grammar, row_class
from rollout.turn.observation import Observation
from rollout.turn.vocabulary import Vocabulary


class SessionRecipe(Protocol):
    """What of a recipe says how long a session is and what it may say."""

    @property
    def max_tokens(self) -> int: ...

    @property
    def words_per_chunk(self) -> int: ...


class SessionEngine:
    """Embedded engine: sessions of one model in this process.

    slots: sessions open at once; max_tokens: context of each (memory for all is allocated here, once);
    words_per_chunk: most text tokens a micro-turn may say (after the last one the turn ends by itself);
    keep_hidden: whether a session's record holds the hidden state that each token was sampled from (for heads on it).
    """

    def __init__(
        self,
        model: InteractionModel,
        vocabulary: Vocabulary,
        *,
        slots: int,
        max_tokens: int,
        words_per_chunk: int = 1,
        keep_hidden: bool = False,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.dmel = DMel.build()
        self.grammar = Grammar(vocabulary, words_per_chunk)
        self.keep_hidden = keep_hidden
        max_rows = slots * self.grammar.max_rows
        self.state = SessionState(model.config, slots, max_tokens, model.dtype, max_rows=max_rows)
        self.weights_digest = checkpoint.weights_digest(model)
        self._sharing = [0] * slots  # open sessions in each slot
        self._open = 0
        self._rows = 0  # that went through the model
        self._no_codes = torch.empty(0, model.config.audio_config.n_mel_bins, dtype=torch.uint8)

    @staticmethod
    def of(model: InteractionModel, recipe: SessionRecipe, slots: int) -> SessionEngine:
        """An engine for ``slots`` sessions as the recipe has them, in the model's own vocabulary."""
        return SessionEngine(
            model,
            Vocabulary.build(model.vocab),
            slots=slots,
            max_tokens=recipe.max_tokens,
            words_per_chunk=recipe.words_per_chunk,
        )

    @property
    def free(self) -> int:
        return self.state.slots - self._open  # a fork needs no slot yet, but may from the next token on

    def publish(self) -> None:
        """Takes over the model's new weights. Every session must be closed: its keys belong to the old ones."""
        if self._open:
            raise MetronomeError(f"weights were changed under {self._open} open sessions; close them before publishing")
        self.model.repack()
        self.weights_digest = checkpoint.weights_digest(self.model)

    def open(self, key: int, temperature: float = 1.0) -> Session:
        """A new session that has heard nothing. Raises ValueError for a temperature that is no number from 0 on,
        MetronomeError when every slot is taken."""
        check_temperature(temperature)
        self._check_free()
        return self._register(
            Session(
                slot=self.state.open(),
                key=key,
                temperature=temperature,
                weights_digest=self.weights_digest,
                tokens=[self.vocabulary.bos],
                last_samples=torch.zeros(WINDOW - HOP),
            )
        )

    def fork(self, session: Session, key: int) -> Session:
        """A session with the same past and temperature and another key; from here on it equals a separate session's
        bits. Costs nothing until the two differ. Raises MetronomeError when every slot is taken."""
        session.check_open()
        self._check_free()
        return self._register(session.forked(session.slot, key))

    def close(self, session: Session) -> None:
        """Gives the slot back. Closing twice is an error; the session's record stays readable."""
        session.check_open()
        session.closed = True
        self._open -= 1
        self._sharing[session.slot] -= 1
        if not self._sharing[session.slot]:
            self.state.close(session.slot)

    @torch.inference_mode()
    def append(self, sessions: Sequence[Session], observations: Sequence[Observation]) -> list[Action]:
        """One micro-turn of each session; see `rollout.engines.engine.Engine.append`, also for the errors."""
        check_append(sessions, observations, self.grammar.max_rows, self.state.max_tokens)
        if any(self._sharing[s.slot] > 1 for s in sessions):
            self._unshare(sessions, [o.audio.numpy().tobytes() for o in observations])
        heard = {s.slot: (s.last_samples, o.audio) for s, o in zip(sessions, observations, strict=True)}
        samples = torch.cat([part for sound in heard.values() for part in sound]).view(len(heard), -1)
        codes = self.dmel.stream_codes(samples)  # on the host: a code never depends on a device
        try:
            rest, rows = samples[:, -(WINDOW - HOP) :].unbind(), codes.unbind()
            place = {slot: i for i, slot in enumerate(heard)}
            for session in sessions:
                row = place[session.slot]
                session.add_observation(rest[row], rows[row], self.grammar.observed)
            return self._sample_turns(sessions, codes.flatten(0, 1))
        except BaseException:
            for session in sessions:
                self.close(session)
            raise

    def stats(self) -> dict[str, float | int]:
        return {
            "sessions_open": self._open,
            "sessions_free": self.free,
            "slots_used": self.state.open_slots,
            "rows": self._rows,
        }

    def _check_free(self) -> None:
        if not self.free:
            raise MetronomeError(
                f"all {self.state.slots} slots are open; close a session or make the engine with more slots"
            )

    def _register(self, session: Session) -> Session:
        self._sharing[session.slot] += 1
        self._open += 1
        return session

    def _sample_turns(self, sessions: Sequence[Session], codes: Tensor) -> list[Action]:
        """The micro-turn after its audio ``codes`` [4 x slots, 80]: all that is sampled."""
        sampled: list[list[int]] = [[] for _ in sessions]
        going = list(range(len(sessions)))
        while going:
            kind = row_class(len(sampled[going[0]]))  # equal for all that go on
            tokens = self._sample_next([sessions[i] for i in going], codes, kind)
            codes = self._no_codes
            for i, token in zip(going, tokens, strict=True):
                sampled[i].append(token)
            going = [i for i in going if not self.grammar.is_over(sampled[i])]
        for session, its in zip(sessions, sampled, strict=True):
            session.end_turn(self.grammar.read(its), self.grammar.forced(its))
        return [session.actions[-1] for session in sessions]

    def _sample_next(self, sessions: Sequence[Session], codes: Tensor, row_class: int) -> list[int]:
        """Runs the unfed tokens, once for each slot; samples and books the next token of every session."""
        by_slot = {s.slot: s for s in sessions}  # one session of those that share a slot
        unfed = [s.tokens[s.computed :] for s in by_slot.values()]
        lengths = [len(tokens) for tokens in unfed]
        segments = self.state.extend(list(by_slot), lengths)
        self._rows += segments.rows
        tokens = torch.tensor([t for part in unfed for t in part])
        hidden = self.model(Inputs.of(tokens, codes, segments, self.vocabulary.audio), self.state)
        if len(by_slot) == 1:
            hidden = hidden[-1:]
        elif segments.rows > len(by_slot):
            hidden = hidden[self._on_device([end - 1 for end in accumulate(lengths)])]
        logits = self.model.logits(hidden)
        if len(by_slot) < len(sessions):
            place = {slot: i for i, slot in enumerate(by_slot)}
            rows = self._on_device([place[s.slot] for s in sessions])
            hidden, logits = hidden[rows], logits[rows]
        keys = torch.tensor([token_key(s.key, s.chunks, len(s.tokens)) for s in sessions])
        classes, temperatures = torch.full((len(sessions),), row_class), [s.temperature for s in sessions]
        sampled, logprob, digest = self.vocabulary.classes.sample_rows(logits, keys, classes, temperatures)
        drawn = sampled.tolist()
        for session, t, p, d in zip(sessions, drawn, logprob.tolist(), digest.tolist(), strict=True):
            session.computed = len(session.tokens)
            session.record_token(t, row_class, p, d)
        if self.keep_hidden:
            for session, row in zip(sessions, hidden.unbind(), strict=True):
                session.hidden.append(row)
        if len(by_slot) < len(sessions):
            self._unshare(sessions, drawn)
        return drawn

    def _on_device(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows).to(self.model.device, non_blocking=True)

    def _unshare(self, sessions: Sequence[Session], kinds: Sequence[int | bytes]) -> None:
        """Sessions that share a slot go on apart where ``kinds`` differ: the first kind keeps the slot, if all of the
        slot's sessions are here, and each other kind gets a copy."""
        here = Counter(s.slot for s in sessions)
        whole = {slot for slot, count in here.items() if count == self._sharing[slot]}
        slots: dict[tuple[int, int | bytes], int] = {}
        for session, kind in zip(sessions, kinds, strict=True):
            origin = session.slot
            if (origin, kind) not in slots:
                slots[origin, kind] = origin if origin in whole else self.state.fork(origin)
                whole.discard(origin)
            session.slot = slots[origin, kind]
            self._sharing[origin] -= 1
            self._sharing[session.slot] += 1
