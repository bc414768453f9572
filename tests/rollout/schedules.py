"""Random schedules of sessions that are opened, forked, appended to in parts, failed and closed, for every engine.

A schedule is drawn from its seed while one engine plays it, because its choices depend on the engine's state: sessions
are forked when their next chunk fills a page, and fork and origin then get their first chunk together, mostly with the
same audio. Other engines `play` the finished list of steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from kernels import ops
from kernels.layout import SPLIT_TOKENS
from model.backbone.transformer import InteractionModel
from rollout.engines.engine import Engine
from rollout.engines.session import Session
from rollout.seeds import session_key
from rollout.turn.grammar import AUDIO_ROWS, max_rows
from tests.support.episodes import unequal_fields
from tests.support.models import fresh_model
from tests.support.sessions import everything, record

SLOTS, WORDS, MOST_CHUNKS = 8, 3, 40
PATCHES, EVENT_WORDS = 4, 1  # of `everything`
MOST_ROWS = max_rows(WORDS, PATCHES + EVENT_WORDS)
SIZES = {
    "slots": SLOTS,
    "max_tokens": (MOST_CHUNKS + 1) * MOST_ROWS,
    "words_per_chunk": WORDS,
    "max_patches": PATCHES,
    "max_event_words": EVENT_WORDS,
}
FEW_PAGES = 32  # enough for the sessions that a schedule has open at a time, so that pages are reused often
SOUNDS = 3  # number of observations that are repeated, so that sessions that are not forks have common prefixes too


@dataclass(frozen=True)
class Step:
    """One call of an engine. ``sessions``: indices in order of creation (of a fork: its origin); ``sounds``: one for
    each (`everything`), in append and fail. A fail is an append in which call number ``at`` of the op ``op`` raises."""

    kind: str  # open, fork, append, fail, close
    sessions: tuple[int, ...] = ()
    sounds: tuple[int, ...] = ()
    op: str = ""
    at: int = 0


@dataclass
class Schedule:
    """The steps, and the sessions of the engine that they were drawn with."""

    seed: int
    temperature: float
    steps: list[Step] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)


def make_model(dtype: torch.dtype) -> InteractionModel:
    """Initial weights, but larger ones in the convolutions: with the initial ones a wrong window would have no
    effect."""
    model = fresh_model(dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith("conv1d.weight"):
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    model.requires_grad_(False)
    model.pack()
    return model


@contextmanager
def failing(op: str, at: int) -> Iterator[None]:
    """Call number ``at`` of an op of `kernels.ops` raises, once."""
    honest, calls = getattr(ops, op), 0

    def broken(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            raise FloatingPointError(f"call {at} of {op}")
        return honest(*args, **kwargs)

    setattr(ops, op, broken)
    try:
        yield
    finally:
        setattr(ops, op, honest)


def do(engine: Engine, schedule: Schedule, sessions: list[Session], step: Step) -> None:
    """Runs one step on an engine, whose sessions so far are ``sessions``."""
    group = [sessions[n] for n in step.sessions]
    if step.kind in ("open", "fork"):
        key = session_key(schedule.seed, "x", len(sessions))
        sessions.append(engine.open(key, schedule.temperature) if step.kind == "open" else engine.fork(group[0], key))
    elif step.kind == "close":
        engine.close(group[0])
    elif step.kind == "append":
        engine.append(group, [everything(n) for n in step.sounds])
    else:
        try:
            with failing(step.op, step.at):
                engine.append(group, [everything(n) for n in step.sounds])
        except FloatingPointError:
            return
        raise AssertionError(f"{step} did not fail")


def play(engine: Engine, schedule: Schedule, failures: bool = True) -> list[Session]:
    """Runs a schedule on ``engine``; returns its sessions. Without ``failures``, sessions of a fail are closed
    instead."""
    sessions: list[Session] = []
    for step in schedule.steps:
        if step.kind == "fail" and not failures:
            for n in step.sessions:
                engine.close(sessions[n])
        else:
            do(engine, schedule, sessions, step)
    return sessions


class Planner:
    """Draws a schedule while ``engine`` plays it."""

    def __init__(self, engine: Engine, seed: int, temperature: float) -> None:
        self.engine, self.rng, self.schedule = engine, random.Random(seed), Schedule(seed, temperature)
        self.fresh = SOUNDS + 1000 * seed

    def plan(self, steps: int) -> Schedule:
        for _ in range(steps):
            self.next()
        for n in self.open():
            self.step("close", n)
        return self.schedule

    def step(self, kind: str, *sessions: int, sounds: tuple[int, ...] = (), op: str = "", at: int = 0) -> None:
        step = Step(kind, sessions, sounds, op, at)
        do(self.engine, self.schedule, self.schedule.sessions, step)
        self.schedule.steps.append(step)

    def open(self) -> list[int]:
        return [n for n, session in enumerate(self.schedule.sessions) if not session.closed]

    def pages(self, spare: int = 0) -> int:
        """The most pages of the open sessions and of ``spare`` forks of the longest one, after their next chunk."""
        rows = [len(self.schedule.sessions[n].tokens) + MOST_ROWS for n in self.open()]
        return sum(-(-n // SPLIT_TOKENS) for n in rows + spare * [max(rows, default=0)])

    def room(self, forks: int) -> bool:
        return self.engine.free >= forks and self.pages(forks) <= FEW_PAGES

    def next(self) -> None:
        rng, open_now = self.rng, self.open()
        done = [n for n in open_now if self.schedule.sessions[n].chunks >= MOST_CHUNKS]
        if done or self.pages() > FEW_PAGES:
            self.step("close", rng.choice(done or open_now))
        elif not open_now or (rng.random() < 0.1 and self.room(1)):
            self.step("open")
        elif near := [n for n in open_now if self.at_the_end(n)]:
            self.branch(rng.choice(near))
        elif rng.random() < 0.05:
            self.step("close", rng.choice(open_now))
        elif rng.random() < 0.1 and self.room(1):
            self.fork(rng.choice(open_now))
        else:
            self.append(rng.sample(open_now, rng.randint(1, len(open_now))))

    def at_the_end(self, n: int) -> bool:
        """Whether its next chunk's audio and video take it over the end of a page."""
        session = self.schedule.sessions[n]
        return session.computed // SPLIT_TOKENS < (len(session.tokens) + AUDIO_ROWS + PATCHES - 1) // SPLIT_TOKENS

    def fork(self, origin: int) -> int:
        self.step("fork", origin)
        return len(self.schedule.sessions) - 1

    def branch(self, origin: int) -> None:
        """Forks of a session that is about to fill a page, and forks of forks, hear first when it does: with it, or
        after an attempt that failed, or without it."""
        rng, group, forks = self.rng, [origin], self.rng.randint(1, 3)
        while not self.room(forks):
            self.step("close", rng.choice([n for n in self.open() if n != origin]))
        for _ in range(forks):
            group.append(self.fork(rng.choice(group)))
        same = rng.randrange(SOUNDS)
        if rng.random() < 0.4:
            lost, op = group.pop(), rng.choice(["attention", "attention", "sample", "embedding_sum"])
            number = same
            if op == "embedding_sum":  # called only for a sound that nobody has heard
                number = self.fresh = self.fresh + 1
            self.step("fail", lost, sounds=(number,), op=op, at=rng.randint(1, 4) if op == "attention" else 1)
            same = number
            group.append(self.fork(origin))  # in place of what was lost
        if len(group) > 2 and rng.random() < 0.2:
            group.remove(origin)
        rng.shuffle(group)
        self.append(group, same)

    def append(self, group: list[int], same: int | None = None) -> None:
        rng = self.rng
        if same is None:
            same = rng.randrange(SOUNDS)
        alike = rng.random() < 0.7
        sounds = tuple(same if alike else rng.randrange(SOUNDS) for _ in group)
        self.step("append", *group, sounds=sounds)


def failed(schedule: Schedule) -> set[int]:
    """Sessions whose record ends inside a micro-turn."""
    return {n for step in schedule.steps if step.kind == "fail" for n in step.sessions}


def unequal(schedule: Schedule, sessions: list[Session]) -> list[int]:
    """The sessions that differ from the schedule's own in a token, a log-prob's bits, a row's digest or an action."""
    differs = []
    for n, (one, other) in enumerate(zip(schedule.sessions, sessions, strict=True)):
        if n in failed(schedule) or one.chunks == other.chunks == 0:
            continue
        a, b = map(record, (one, other))
        if unequal_fields(a, b):
            differs.append(n)
    return differs
