"""Streaming sessions: a persistent sequence that hears 200 ms at a time and answers each micro-turn.

A `SessionEngine` owns the weights' packed copies, the KV pages and the convolution windows of all its sessions; a
`Session` is one growing sequence. ``append`` takes one chunk of audio for any subset of the open sessions, at whatever
positions they are (continuous batching), prefills the new rows in one forward pass and decodes until every session has
ended its micro-turn. By the row contract of `kernels.ops` the batch a session rides in cannot change its bits.

Knows nothing of scenarios or rewards. Not here: self audio and video rows (their place in a micro-turn is before the
mode token; they come with the voice and the video tower).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.errors import MetronomeError
from model import checkpoint
from model.audio import HOP, WINDOW, DMel
from model.logprob import FIRST_TEXT, MODE, NEXT_TEXT
from model.state import ContextFull, SessionState
from model.transformer import InteractionModel
from rollout.chunk import CHUNK_FRAMES, CHUNK_SAMPLES, Action
from rollout.episode import Episode
from rollout.sampler import token_key
from rollout.vocabulary import Vocabulary


@dataclass
class Session:
    """One open sequence. ``tokens[:fed]`` have been through the model; the rest go in with the next chunk."""

    slot: int
    key: int  # 64-bit sampling key (rollout.sampler.session_key)
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

    def hear(self, past: Tensor, codes: Tensor, audio: int) -> None:
        """Adds one chunk's audio rows: ``past`` [800] are its last samples, ``codes`` uint8 [CHUNK_FRAMES, 80]."""
        self.past = past
        self.codes.append(codes)
        self.tokens += [audio] * CHUNK_FRAMES

    def act(self, action: Action) -> None:
        """Ends the micro-turn."""
        self.actions.append(action)
        self.chunks += 1

    def episode(self, *, scenario: str, rollout: int, seed: int, facts: dict[str, Any]) -> Episode:
        """The record so far, as the learner and the rewards read it."""
        positions, row_class, chunk = (list(column) for column in zip(*self.sampled, strict=True))
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
            sampled_at=torch.tensor(positions),
            row_class=torch.tensor(row_class),
            chunk=torch.tensor(chunk),
            logprob=torch.tensor(self.logprob, dtype=torch.float32),
            digest=torch.tensor(self.digest),
        )


def hear(sessions: Sequence[Session], chunks: Tensor, dmel: DMel, audio: int) -> Tensor:
    """Every session hears its chunk, fp32 [S, 3200]; ``audio`` is the audio token. Returns the dMel codes uint8
    [S, CHUNK_FRAMES, 80]."""
    samples = torch.cat((torch.stack([s.past for s in sessions]), chunks), 1)
    codes = dmel.continued(samples)
    for i, session in enumerate(sessions):
        session.hear(samples[i, -(WINDOW - HOP) :], codes[i], audio)
    return codes


def check_append(sessions: Sequence[Session], chunks: Tensor, most_rows: int, max_tokens: int) -> None:
    """What every engine refuses before a session has moved: a wrong shape or dtype, a closed session, and one whose
    context of ``max_tokens`` rows has no room for a micro-turn of ``most_rows``."""
    if chunks.shape != (len(sessions), CHUNK_SAMPLES) or chunks.dtype != torch.float32:
        raise ValueError(
            f"append: chunks must be float32 [{len(sessions)}, {CHUNK_SAMPLES}], not {chunks.dtype} "
            f"{list(chunks.shape)}"
        )
    for session in sessions:
        session.check_open()
    for session in sessions:
        if max_tokens - session.fed < most_rows:
            raise ContextFull(
                f"session in slot {session.slot} holds {session.fed} of at most {max_tokens} tokens; one more "
                f"micro-turn may need {most_rows}. Close it, or make the engine with more max_tokens"
            )


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
        temperature: float = 1.0,
        words_per_chunk: int = 1,
        keep_hidden: bool = False,
    ) -> None:
        if temperature < 0 or words_per_chunk < 1:
            raise ValueError(f"need temperature >= 0 and words_per_chunk >= 1, got {temperature}, {words_per_chunk}")
        self.model = model
        self.vocabulary = vocabulary
        self.dmel = DMel.build()
        self.temperature = temperature
        self.words_per_chunk = words_per_chunk
        self.keep_hidden = keep_hidden
        self.most_rows = CHUNK_FRAMES + 2 + words_per_chunk  # of one micro-turn: unfed tokens, audio, words
        self.state = SessionState(model.config, slots, max_tokens, model.dtype, max_rows=slots * self.most_rows)
        self.weights_digest = checkpoint.weights_digest(model)

    @property
    def free(self) -> int:
        return self.state.free_slots

    def publish(self) -> None:
        """Takes over the model's new weights. Every session must be closed: its keys belong to the old ones."""
        if self.state.open_slots:
            raise MetronomeError(
                f"weights were changed under {self.state.open_slots} open sessions; close them before publishing"
            )
        self.model.repack()
        self.weights_digest = checkpoint.weights_digest(self.model)

    def open(self, key: int) -> Session:
        """A new session that has heard nothing. Raises MetronomeError when every slot is taken."""
        return Session(
            slot=self.state.open(),
            key=key,
            temperature=self.temperature,
            weights_digest=self.weights_digest,
            tokens=[self.vocabulary.bos],
            past=torch.zeros(WINDOW - HOP),
        )

    def fork(self, session: Session, key: int) -> Session:
        """A session with the same past and another key; what it does from here on equals a separate session's bits."""
        session.check_open()
        return session.forked(self.state.fork(session.slot), key)

    def close(self, session: Session) -> None:
        """Gives the slot back. Closing twice is an error; the session's record stays readable."""
        session.check_open()
        self.state.close(session.slot)
        session.closed = True

    @torch.inference_mode()
    def append(self, sessions: Sequence[Session], chunks: Tensor) -> list[Action]:
        """One micro-turn of each session: hears ``chunks`` fp32 [S, 3200] (16 kHz), returns what each did.

        Raises ValueError for a wrong shape, dtype or a closed session, ContextFull when a sequence would outgrow its
        context; then no session has moved."""
        check_append(sessions, chunks, self.most_rows, self.state.max_tokens)
        codes = hear(sessions, chunks, self.dmel, self.vocabulary.audio)
        hidden = self._feed(sessions, codes.flatten(0, 1))
        listen = self.vocabulary.listen
        mode = self._sample(sessions, hidden, MODE)
        words: list[list[int]] = [[] for _ in sessions]
        speaking = [i for i, token in enumerate(mode) if token != listen]
        while speaking:
            said = len(words[speaking[0]])  # equal for all that still speak
            now = [sessions[i] for i in speaking]
            hidden = self._feed(now, None)
            tokens = self._sample(now, hidden, NEXT_TEXT if said else FIRST_TEXT)
            goes_on = []
            for i, token in zip(speaking, tokens, strict=True):
                if token == self.vocabulary.end:
                    continue
                words[i].append(token)
                if said + 1 == self.words_per_chunk:
                    sessions[i].tokens.append(self.vocabulary.end)  # the turn is full: forced, not sampled
                else:
                    goes_on.append(i)
            speaking = goes_on
        actions = [
            Action(self.vocabulary.modes[m], tuple(self.vocabulary.words[w] for w in said))
            for m, said in zip(mode, words, strict=True)
        ]
        for session, action in zip(sessions, actions, strict=True):
            session.act(action)
        return actions

    def stats(self) -> dict[str, float | int]:
        return {"sessions_open": self.state.open_slots, "sessions_free": self.state.free_slots}

    def _feed(self, sessions: Sequence[Session], codes: Tensor | None) -> Tensor:
        """Runs every session's unfed tokens; returns the hidden state of each one's last row, [S, D]."""
        lengths = [len(s.tokens) - s.fed for s in sessions]
        tokens = torch.tensor([t for s in sessions for t in s.tokens[s.fed :]])
        segments = self.state.extend([s.slot for s in sessions], lengths)
        if codes is None:
            codes = torch.empty(0, self.model.config.audio_config.n_mel_bins, dtype=torch.uint8)
        hidden = self.model(tokens, codes, segments, self.state)
        for session, length in zip(sessions, lengths, strict=True):
            session.fed += length
        return hidden[segments.offset[1:] - 1]

    def _sample(self, sessions: Sequence[Session], hidden: Tensor, row_class: int) -> list[int]:
        """Samples one token for each session and books it."""
        keys = torch.tensor([token_key(s.key, s.chunks, len(s.tokens)) for s in sessions])
        classes = torch.full((len(sessions),), row_class)
        token, logprob, digest = self.vocabulary.classes.sample(
            self.model.logits(hidden), keys, classes, self.temperature
        )
        tokens = token.tolist()
        for session, t, p, d in zip(sessions, tokens, logprob.tolist(), digest.tolist(), strict=True):
            session.book(t, row_class, p, d)
        if self.keep_hidden:
            for session, row in zip(sessions, hidden, strict=True):
                session.hidden.append(row)
        return tokens
