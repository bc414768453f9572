"""A streaming session's record: tokens, dMel codes, actions, log-probs. Every engine (`rollout.engines.engine`) fills
the same one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from model.backbone.state import ContextFull
from model.config import MEL_CHANNELS
from model.program.ranges import TEMPERATURE
from model.senses.audio import HOP, WINDOW
from model.senses.video import CHANNELS, NO_VIDEO, Frames
from model.voice.config import BANDS, FRAMES
from model.voice.mel import self_codes
from rollout.record.episode import TEXT, VOICE, Episode, Stream
from rollout.record.growing import Growing
from rollout.turn.action import CHUNK_FRAMES, Action
from rollout.turn.grammar import Grammar
from rollout.turn.observation import Observation, check_observation


@dataclass(frozen=True, eq=False, slots=True)
class Spoken:
    """A chunk of sound that was sampled."""

    position: int  # that of the row after the one whose hidden state gave it
    chunk: int
    logprob: float  # of the chain, nats
    digest: int  # of the chain's distributions
    x: Tensor  # fp32 [K + 1, NUMBERS], the chain (`model.voice.chain`)

    @property
    def sound(self) -> Tensor:
        """fp32 [FRAMES, BANDS], the end of the chain."""
        return self.x[-1].view(FRAMES, BANDS)


@dataclass(eq=False)
class Session:
    """One open sequence. The model has computed ``tokens[:computed]``; the rest are prefilled with the next chunk. A
    session is equal to itself only: by that its engine knows it (`check_own`)."""

    slot: int  # in the engine's state; sessions that have the same past may share it
    key: int  # 64-bit sampling key (rollout.seeds.session_key)
    temperature: float
    weights_digest: str
    tokens: list[int]
    last_samples: Tensor  # fp32 [800], end of the audio so far: the next chunk's first dMel window begins with it
    computed: int = 0  # tokens whose rows were computed
    chunks: int = 0  # micro-turns that have ended
    whole_tokens: int = 0  # tokens when the last of them ended
    heard: int = 0  # chunks that were observed
    sound: Growing = field(default_factory=Growing)  # dMel codes, CHUNK_FRAMES * 80 a chunk
    pixels: Growing = field(default_factory=Growing)  # of all frames
    shown: list[tuple[int, int, int, int]] = field(default_factory=list)  # as `Frames.sizes`
    events: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)  # (chunk, its texts) where there are some
    contexts: list[int] = field(default_factory=lambda: [0])  # index of the first token of each context
    actions: list[Action] = field(default_factory=list)  # one a chunk
    sampled: list[tuple[int, int, int]] = field(default_factory=list)  # (position, row class, chunk) a sampled token
    logprob: list[float] = field(default_factory=list)
    digest: list[int] = field(default_factory=list)
    spoken: list[Spoken] = field(default_factory=list)  # the chunks of sound that were sampled
    own: Tensor | None = None  # uint8 [CHUNK_FRAMES, 80]: dMel codes of the last chunk's, which is to be heard next
    hidden: list[Tensor] = field(default_factory=list)  # [D] a sampled token, if the engine keeps them
    closed: bool = False

    @staticmethod
    def begin(slot: int, key: int, temperature: float, weights_digest: str, bos: int) -> Session:
        """An empty session, before its first chunk; ``bos``: the token that every session begins with."""
        return Session(slot, key, temperature, weights_digest, [bos], torch.zeros(WINDOW - HOP))

    def forked(self, slot: int, key: int) -> Session:
        """A copy of the record so far with its own slot and sampling key."""
        lists: dict[str, Any] = {f.name: list(v) for f in fields(self) if isinstance(v := getattr(self, f.name), list)}
        return replace(self, slot=slot, key=key, sound=self.sound.copy(), pixels=self.pixels.copy(), **lists)

    def record_token(self, token: int, row_class: int, logprob: float, digest: int) -> None:
        """Adds one sampled token: its class (`model.logprob`), log-prob in nats and digest of the log-prob row."""
        self.sampled.append((len(self.tokens), row_class, self.chunks))
        self.logprob.append(logprob)
        self.digest.append(digest)
        self.tokens.append(token)

    def add_observation(self, last_samples: Tensor, codes: Tensor, observation: Observation, grammar: Grammar) -> None:
        """Adds one chunk's observed rows: dMel ``codes`` uint8 [CHUNK_FRAMES, 80] of its audio, and its video and
        events; ``last_samples`` fp32 [800] is the end of its audio. Frames are copied: a client may use its memory
        again."""
        frames, k = observation.frames, self.heard
        self.last_samples = last_samples
        self.sound.append(codes)
        if len(frames):
            self.pixels.append(frames)
            self.shown.append((k, *frames.shape[:3]))
        if observation.events:
            self.events.append((k, observation.events))
        self.heard += 1
        self.tokens += grammar.observed(frames, observation.events, self.own is not None)
        self.own = None

    @property
    def codes(self) -> Tensor:
        """uint8 [chunks that were observed, CHUNK_FRAMES, 80]; a copy."""
        return self.codes_since(0)

    def codes_since(self, chunk: int) -> Tensor:
        """`codes` of the chunks from ``chunk`` on."""
        count = (self.heard - chunk) * CHUNK_FRAMES * MEL_CHANNELS
        return self.sound.tail(count).view(-1, CHUNK_FRAMES, MEL_CHANNELS)

    def frames_since(self, chunk: int) -> list[tuple[int, Tensor]]:
        """(chunk, its frames uint8 [F, H, W, 3]) of each chunk with video from ``chunk`` on; copies."""
        first = bisect_left(self.shown, (chunk, 0, 0, 0))
        sizes = [n * height * width * CHANNELS for _, n, height, width in self.shown[first:]]
        parts = self.pixels.tail(sum(sizes)).split(sizes) if sizes else ()
        return [(k, part.view(*shape, CHANNELS)) for (k, *shape), part in zip(self.shown[first:], parts, strict=True)]

    def own_since(self, chunk: int) -> list[tuple[int, Tensor]]:
        """(chunk, dMel codes uint8 [CHUNK_FRAMES, 80]) of the model's own sound in each chunk from ``chunk`` on in
        which it hears, or will hear, some."""
        heard = [one for one in self.spoken if one.chunk + 1 >= chunk]
        return [(one.chunk + 1, self_codes(one.sound[None])[0]) for one in heard]

    @property
    def rows(self) -> int:
        """Tokens of the present context."""
        return len(self.tokens) - self.contexts[-1]

    @property
    def cached(self) -> int:
        """Those of them whose rows were computed."""
        return max(0, self.computed - self.contexts[-1])

    def end_summary(self, sampled: Sequence[int], grammar: Grammar) -> None:
        """Ends the present context, whose summary was ``sampled`` last, and begins the next."""
        if sampled[-1] != grammar.vocabulary.end:
            self.tokens.append(grammar.vocabulary.end)
        self.contexts.append(len(self.tokens))
        self.computed = len(self.tokens)
        self.tokens += grammar.begin_context(sampled)

    def record_voice(self, x: Tensor, logprob: float, digest: int) -> None:
        """Adds the chunk of sound that was sampled after all tokens of the micro-turn."""
        self.spoken.append(Spoken(len(self.tokens), self.chunks, logprob, digest, x))
        self.own = self_codes(self.spoken[-1].sound[None])[0]

    def end_turn(self, action: Action) -> None:
        """Ends the micro-turn, of which all tokens were written."""
        self.actions.append(action)
        self.chunks += 1
        self.whole_tokens = len(self.tokens)

    def episode(self, *, scenario: str, rollout: int, seed: int, facts: dict[str, Any]) -> Episode:
        """The record so far as an `Episode`. Raises ValueError if there is no micro-turn yet, and if an error
        interrupted one or the summary before it."""
        if not self.chunks:
            raise ValueError("the session has had no micro-turn yet; there is no episode")
        if len(self.tokens) > self.whole_tokens:
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
            codes=self.codes.flatten(0, 1),
            frames=Frames(self.pixels.all(), torch.tensor(self.shown)) if self.shown else NO_VIDEO,
            events=dict(self.events),
            contexts=torch.tensor(self.contexts),
            streams={TEXT: text} | ({VOICE: _voice(self.spoken)} if self.spoken else {}),
        )


def _voice(spoken: Sequence[Spoken]) -> Stream:
    return Stream(
        sampled_at=torch.tensor([s.position for s in spoken]),
        row_class=torch.zeros(len(spoken), dtype=torch.int64),
        chunk=torch.tensor([s.chunk for s in spoken]),
        logprob=torch.tensor([s.logprob for s in spoken], dtype=torch.float32),
        digest=torch.tensor([s.digest for s in spoken]),
        payload=torch.stack([s.x for s in spoken]),
    )


def check_key(key: int) -> None:
    """Raises ValueError unless the key is a whole number of 64 bits: an ``int``, no number of another library."""
    if type(key) is not int or not 0 <= key < 2**64:
        raise ValueError(f"a session's key is a whole number (int) from 0 to 2**64 - 1, not {_shown(key)}")


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature is a plain number within `TEMPERATURE`."""
    if type(temperature) not in (int, float) or TEMPERATURE.problem(temperature):
        raise ValueError(f"open: temperature is {_shown(temperature)}: give {TEMPERATURE!r}; 0 is greedy")


def check_own(session: Session, opened: Collection[Session]) -> None:
    """Raises ValueError for a session that is closed, or that is none of those which the engine has ``opened``: another
    engine's, or a copy."""
    if not isinstance(session, Session):
        raise ValueError(f"an engine's methods take its sessions, not {type(session).__name__}")
    if session.closed:
        raise ValueError("the session is closed; open or fork another")
    if session not in opened:
        raise ValueError("the session is not this engine's own: only the engine that opened it can use it")


def check_turn(
    session: Session, observation: Observation, opened: Collection[Session], grammar: Grammar, max_tokens: int
) -> None:
    """What `Engine.check` checks. ``opened``: the engine's open sessions; a context has ``max_tokens`` rows."""
    check_own(session, opened)
    check_observation(observation, grammar)
    if grammar.summary is None and max_tokens - session.cached < grammar.max_rows:
        raise ContextFull(
            f"session in slot {session.slot} holds {session.cached} of at most {max_tokens} tokens; another "
            f"micro-turn may need {grammar.max_rows}. Close it, or make the engine with more max_tokens"
        )


def check_append(
    check: Callable[[Session, Observation], None], sessions: Sequence[Session], observations: Sequence[Observation]
) -> None:
    """Checks the arguments of `Engine.append`, before any session is changed, and raises what it says. ``check``: the
    engine's own (`Engine.check`)."""
    if len(observations) != len(sessions):
        raise ValueError(f"append: {len(observations)} observations for {len(sessions)} sessions")
    if len({id(session) for session in sessions}) != len(sessions):
        raise ValueError("append: a session comes twice in one call")
    for session, observation in zip(sessions, observations, strict=True):
        check(session, observation)


def _shown(value: object) -> str:
    """A value of any type, for an error's one line."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return f"{type(value).__name__} {str(value)[:40]!r}" if not isinstance(value, int | float) else str(value)
