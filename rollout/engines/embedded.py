"""The embedded engine: streaming sessions in this process, 200 ms of audio in and one action out per micro-turn.

A `SessionEngine` owns the KV pages and convolution windows of all its sessions; a `Session` is one growing sequence.
``append`` takes one observation for each of any subset of the open sessions, whatever their positions (continuous
batching), prefills the new rows in one forward pass and decodes until every session has ended its micro-turn. By the
row contract of `kernels.ops` a session's bits do not depend on what else is in the batch.

A fork shares a slot, that is memory and computation, with its origin as long as their inputs and tokens are the same:
the row of log-probs is computed once, and each session samples from it with its own key. When sampled tokens or audio
differ, the state is copied (copy on write).

A model with a voice samples a chunk of sound in every micro-turn in which it speaks, from the hidden state of the
turn's last row, and hears it in the next one.

Knows nothing of scenarios or rewards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from kernels import ops
from kernels.errors import MetronomeError
from model.backbone.state import SessionState
from model.backbone.transformer import InteractionModel
from model.context import STOP, ContextConfig
from model.inputs import Inputs
from model.logprob import NEXT_TEXT
from model.senses.audio import HOP, WINDOW, DMel
from model.senses.video import Patches
from model.voice.chain import draw
from model.weights import checkpoint
from rollout.engines.session import Session, check_append, check_key, check_own, check_temperature, check_turn
from rollout.seeds import VOICE_STREAM, token_key
from rollout.turn.action import Action
from rollout.turn.grammar import NO_LIMIT, Grammar, context_chunks
from rollout.turn.observation import Observation
from rollout.turn.summary import Summary
from rollout.turn.vocabulary import Vocabulary


class SessionRecipe(Protocol):
    """The fields of a recipe that `SessionEngine.of` reads; see `SessionEngine`."""

    @property
    def max_tokens(self) -> int: ...

    @property
    def words_per_chunk(self) -> int: ...

    @property
    def max_patches(self) -> int: ...

    @property
    def max_event_words(self) -> int: ...

    @property
    def context(self) -> ContextConfig: ...


@dataclass(frozen=True, slots=True)
class _Heard:
    """What the observed rows of one call hold, by slot."""

    codes: Tensor  # uint8 [4 * slots, 80] of the users' sound
    patches: Patches
    own: Tensor  # uint8 [B, 80] of the model's own


class SessionEngine:
    """Sessions of one model in this process; implements `rollout.engines.engine.Engine`.

    slots: how many sessions can be open; max_tokens: context of each, in rows (memory for all is allocated at once);
    words_per_chunk, max_patches, max_event_words: the most words that a micro-turn may say, video patches that it may
    see and words of text events that it may read;
    context: the policy at the context limit, of which policy summary is carried out here (the others are the model's);
    keep_hidden: whether sessions record the hidden state that each token was sampled from (for value heads and such).
    """

    def __init__(
        self,
        model: InteractionModel,
        vocabulary: Vocabulary,
        *,
        slots: int,
        max_tokens: int,
        words_per_chunk: int = 1,
        max_patches: int = 0,
        max_event_words: int = 0,
        keep_hidden: bool = False,
        context: ContextConfig = STOP,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.dmel = DMel.build()
        summary = Summary.of(context, vocabulary)
        senses = model.senses
        self.grammar = Grammar(
            vocabulary, words_per_chunk, max_patches, max_event_words, senses.patch, summary, senses.own
        )
        if summary is not None and summary.budget > max_tokens:
            raise MetronomeError(f"context.budget is {summary.budget}, but max_tokens is {max_tokens}; give as many")
        self.keep_hidden = keep_hidden
        max_rows = slots * self.grammar.most_new_rows
        self.state = SessionState(model.config, slots, max_tokens, model.dtype, max_rows=max_rows)
        self.weights_digest = checkpoint.weights_digest(model)
        self._sharing = [0] * slots  # number of open sessions in each slot
        self._opened: set[Session] = set()  # those that are open
        self._rows = 0  # rows computed so far
        no_codes = torch.empty(0, model.config.audio_config.n_mel_bins, dtype=torch.uint8)
        self._nothing = _Heard(no_codes, Patches.none(senses.patch), no_codes)

    @staticmethod
    def of(model: InteractionModel, recipe: SessionRecipe, slots: int) -> SessionEngine:
        """An engine with the recipe's sizes and the model's vocabulary, with room for ``slots`` sessions."""
        return SessionEngine(
            model,
            Vocabulary.of(model),
            slots=slots,
            max_tokens=recipe.max_tokens,
            words_per_chunk=recipe.words_per_chunk,
            max_patches=recipe.max_patches,
            max_event_words=recipe.max_event_words,
            context=recipe.context,
        )

    @property
    def free(self) -> int:
        # Open sessions, not slots: a fork shares a slot at first, but may need one of its own from the next token on.
        return self.state.slots - len(self._opened)

    @property
    def max_chunks(self) -> int:
        if self.grammar.summary is not None:
            return NO_LIMIT
        return context_chunks(self.state.max_tokens, self.grammar.words_per_chunk, self.grammar.extra)

    def publish(self) -> None:
        """See `Engine.publish`. Sessions must be closed because their KV cache was computed with the old weights."""
        if self._opened:
            raise MetronomeError(
                f"weights were changed under {len(self._opened)} open sessions; close them before publishing"
            )
        if self.model.packed_digest is None:  # else whoever changed the weights packed them anew
            self.model.repack()
        self.weights_digest = checkpoint.weights_digest(self.model)

    def open(self, key: int, temperature: float = 1.0) -> Session:
        """See `Engine.open`."""
        check_key(key)
        check_temperature(temperature)
        self._check_free()
        slot = self.state.open()
        return self._register(Session.begin(slot, key, temperature, self.weights_digest, self.vocabulary.bos))

    def fork(self, session: Session, key: int) -> Session:
        """See `Engine.fork`. Costs nothing until origin and fork differ."""
        check_key(key)
        check_own(session, self._opened)
        self._check_free()
        return self._register(session.forked(session.slot, key))

    def close(self, session: Session) -> None:
        """See `Engine.close`."""
        check_own(session, self._opened)
        session.closed = True
        self._opened.remove(session)
        self._sharing[session.slot] -= 1
        if not self._sharing[session.slot]:
            self.state.close(session.slot)

    def check(self, session: Session, observation: Observation) -> None:
        """See `Engine.check`."""
        check_turn(session, observation, self._opened, self.grammar, self.state.max_tokens)

    @torch.inference_mode()
    def append(self, sessions: Sequence[Session], observations: Sequence[Observation]) -> list[Action]:
        """See `Engine.append`."""
        check_append(self.check, sessions, observations)
        try:
            self._summarise([s for s in sessions if self.grammar.needs_summary(s.rows)])
        except BaseException:
            for session in sessions:
                self.close(session)
            raise
        if any(self._sharing[s.slot] > 1 for s in sessions):
            self._unshare(sessions, [_identity(o, s.own) for s, o in zip(sessions, observations, strict=True)])
        own = [s.own for s in {s.slot: s for s in sessions}.values() if s.own is not None]
        of_slot = {s.slot: (s.last_samples, o) for s, o in zip(sessions, observations, strict=True)}
        samples = torch.cat([part for last, o in of_slot.values() for part in (last, o.audio)]).view(len(of_slot), -1)
        codes = self.dmel.stream_codes(samples)  # on the host: a code never depends on a device
        patches = [Patches.cut(o.frames, self.model.senses.patch) for _, o in of_slot.values()]
        try:
            last_samples, chunk_codes = samples[:, -(WINDOW - HOP) :].unbind(), codes.unbind()
            index = {slot: i for i, slot in enumerate(of_slot)}
            for session, observation in zip(sessions, observations, strict=True):
                i = index[session.slot]
                session.add_observation(last_samples[i], chunk_codes[i], observation, self.grammar)
            heard = _Heard(codes.flatten(0, 1), Patches.cat(patches), torch.cat([self._nothing.own, *own]))
            return self._sample_turns(sessions, heard)
        except BaseException:
            for session in sessions:
                self.close(session)
            raise

    def stats(self) -> dict[str, float | int]:
        return {
            "sessions_open": len(self._opened),
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
        self._opened.add(session)
        return session

    def _summarise(self, sessions: Sequence[Session]) -> None:
        """Has each session write a summary, and begins its next context with it."""
        if not sessions:
            return
        assert self.grammar.summary is not None
        if any(self._sharing[s.slot] > 1 for s in sessions):
            self._unshare(sessions, [b""] * len(sessions))  # from those that go on in the old context
        for session in sessions:
            session.tokens += self.grammar.summary.request
        sampled: list[list[int]] = [[] for _ in sessions]
        unfinished = list(range(len(sessions)))
        while unfinished:
            kinds = [NEXT_TEXT] * len(unfinished)
            tokens = self._sample_next([sessions[i] for i in unfinished], self._nothing, kinds)
            for i, token in zip(unfinished, tokens, strict=True):
                sampled[i].append(token)
            unfinished = [i for i in unfinished if not self.grammar.summary_is_over(sampled[i])]
        for session, summary in zip(sessions, sampled, strict=True):
            session.end_summary(summary, self.grammar)
        for slot in {session.slot for session in sessions}:
            self.state.restart(slot)

    def _sample_turns(self, sessions: Sequence[Session], heard: _Heard) -> list[Action]:
        """Samples the rest of each session's micro-turn, in which it ``heard`` so much."""
        sampled: list[list[int]] = [[] for _ in sessions]
        unfinished = list(range(len(sessions)))
        while unfinished:
            kinds = [self.grammar.row_class(sampled[i]) for i in unfinished]
            tokens = self._sample_next([sessions[i] for i in unfinished], heard, kinds)
            heard = self._nothing
            for i, token in zip(unfinished, tokens, strict=True):
                sampled[i].append(token)
            unfinished = [i for i in unfinished if not self.grammar.is_over(sampled[i])]
        actions = [self.grammar.read(turn) for turn in sampled]
        for session, turn in zip(sessions, sampled, strict=True):
            session.tokens += self.grammar.forced(turn)
        if self.grammar.voice:
            speaking = [i for i, action in enumerate(actions) if action.speaks]
            for i, sound in zip(speaking, self._sample_sound([sessions[i] for i in speaking]), strict=True):
                actions[i] = replace(actions[i], sound=sound)
        for session, action in zip(sessions, actions, strict=True):
            session.end_turn(action)
        return actions

    def _sample_sound(self, sessions: Sequence[Session]) -> list[Tensor]:
        """Samples and records a chunk of sound for each session, from the hidden state of its last row: fp32 [FRAMES,
        BANDS] each."""
        if not sessions:
            return []
        head = self.model.voice_head
        assert head is not None
        keys = [token_key(s.key, s.chunks, len(s.tokens), VOICE_STREAM) for s in sessions]
        with ops.deferred():
            hidden, _, place = self._compute(sessions, self._nothing)
            hidden = hidden if place is None else hidden[place]
            chains = draw(head, hidden, torch.tensor(keys))
            x, logprob = ops.fetch(chains.x, chains.logprob)
        for session, chain, p, d in zip(sessions, x, logprob.tolist(), chains.digest.tolist(), strict=True):
            session.computed = len(session.tokens)
            session.record_voice(chain.clone(), p, d)
        return [session.spoken[-1].sound for session in sessions]

    def _compute(
        self, sessions: Sequence[Session], heard: _Heard, *more: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Computes the rows that are missing in the cache, once for each slot. Returns the hidden states [S, D] of each
        slot's last row, ``more`` beside the kernels, and each session's place among the slots (None: its own)."""
        by_slot = {s.slot: s for s in sessions}  # one session of those that share a slot
        new_tokens = [s.tokens[s.computed :] for s in by_slot.values()]
        lengths = [len(tokens) for tokens in new_tokens]
        segments = self.state.extend(list(by_slot), lengths)
        self._rows += segments.rows
        tokens = torch.tensor([t for part in new_tokens for t in part])
        inputs = Inputs.of(tokens, heard.codes, heard.patches, segments, self.model.senses, own=heard.own)
        last, of_session = self._rows_to_sample(sessions, by_slot, lengths)
        placed = self.model.place(inputs, self.state, *more, *last, *of_session)
        indices = placed.more[len(more) :]
        hidden = self.model(placed, self.state)
        if last:
            hidden = hidden[indices[0]]
        elif segments.rows > 1 == len(by_slot):
            hidden = hidden[-1:]
        return hidden, placed.more[: len(more)], indices[-1] if of_session else None

    def _sample_next(self, sessions: Sequence[Session], heard: _Heard, row_classes: Sequence[int]) -> list[int]:
        """Computes the rows that are missing; samples and records every session's next token, of its row class."""
        keys = torch.tensor([token_key(s.key, s.chunks, len(s.tokens)) for s in sessions])
        temperatures = [s.temperature for s in sessions]
        with ops.deferred():  # the host waits once, in fetch, and what went wrong before that is raised there
            hidden, (keys, classes), place = self._compute(sessions, heard, keys, torch.tensor(row_classes))
            logits = self.model.logits(hidden)
            if place is not None:
                hidden, logits = hidden[place], logits[place]
            sample = self.vocabulary.classes.sample_rows
            sampled, logprob, digest = ops.fetch(*sample(logits, keys, classes, temperatures))
        drawn: list[int] = sampled.tolist()
        records = zip(sessions, drawn, row_classes, logprob.tolist(), digest.tolist(), strict=True)
        for session, t, row_class, p, d in records:
            session.computed = len(session.tokens)
            session.record_token(t, row_class, p, d)
        if self.keep_hidden:
            for session, row in zip(sessions, hidden.unbind(), strict=True):
                session.hidden.append(row)
        if place is not None:
            self._unshare(sessions, drawn)
        return drawn

    def _rows_to_sample(
        self, sessions: Sequence[Session], by_slot: Mapping[int, Session], lengths: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(the last row of each slot, unless they are the pass's last rows; each session's slot as its place in
        ``by_slot``, unless each has its own), as lists of one or no index tensor."""
        last, of_session = [], []
        if 1 < len(by_slot) < sum(lengths):
            last = [torch.tensor([end - 1 for end in accumulate(lengths)])]
        if len(by_slot) < len(sessions):
            index = {slot: i for i, slot in enumerate(by_slot)}
            of_session = [torch.tensor([index[s.slot] for s in sessions])]
        return last, of_session

    def _unshare(self, sessions: Sequence[Session], inputs: Sequence[int | bytes]) -> None:
        """Separates sessions that share a slot and have different ``inputs`` (next token, or audio as bytes): sessions
        of the first input keep the slot, if all of the slot's sessions are in this call; those of each other input get
        a copy of it."""
        in_call = Counter(s.slot for s in sessions)
        reusable = {slot for slot, count in in_call.items() if count == self._sharing[slot]}
        slots: dict[tuple[int, int | bytes], int] = {}
        for session, value in zip(sessions, inputs, strict=True):
            origin = session.slot
            if (origin, value) not in slots:
                slots[origin, value] = origin if origin in reusable else self.state.fork(origin)
                reusable.discard(origin)
            session.slot = slots[origin, value]
            self._sharing[origin] -= 1
            self._sharing[session.slot] += 1


def _identity(observation: Observation, own: Tensor | None) -> bytes:
    """Bytes that are equal for equal observations and equal own sound (codes, or None) only."""
    frames = observation.frames
    shown = f"{tuple(frames.shape)}{observation.events}{own is None}".encode()
    said = b"" if own is None else own.numpy().tobytes()
    return observation.audio.numpy().tobytes() + shown + said + frames.numpy().tobytes()
