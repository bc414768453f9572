"""The rollout loop: simulated users of scenarios talk to sessions of an engine; each conversation becomes an
episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.errors import MetronomeError
from rollout.engines.engine import Engine
from rollout.engines.session import Session
from rollout.record.episode import Episode
from rollout.seeds import session_key
from rollout.turn.action import Action
from rollout.world.base import Scenario, User


@dataclass(frozen=True)
class Play:
    """A rollout that is to be made."""

    scenario: Scenario
    rollout: int  # index within the scenario's group


@dataclass
class _Running:
    """A rollout that is being made."""

    index: int  # of its play
    user: User
    session: Session
    last_action: Action | None = None  # what the user hears next


def play(engine: Engine, plays: Sequence[Play], seed: int, temperature: float = 1.0) -> list[Episode]:
    """One episode for each play, in order, each to its scenario's last chunk. ``seed``: the run's, which keys the
    sampling. As many sessions run at once as the engine has free; one that ends is replaced by the next play at once.

    Rollouts of one scenario that start at the same time are forks of one session, which an engine may compute once as
    long as their inputs and tokens agree. By the row contract of `kernels.ops` neither that nor the number of sessions
    changes a bit. Raises what the engine raises, and MetronomeError when others hold all of its sessions."""
    waiting = list(enumerate(plays))[::-1]
    running: list[_Running] = []
    done: dict[int, Episode] = {}
    while waiting or running:
        started: dict[str, Session] = {}
        while waiting and engine.free:
            index, item = waiting.pop()
            name = item.scenario.id
            key = session_key(seed, name, item.rollout)
            session = engine.fork(started[name], key) if name in started else engine.open(key, temperature)
            started.setdefault(name, session)
            running.append(_Running(index, item.scenario.user(), session))
        if not running:
            raise MetronomeError(f"{len(waiting)} rollouts wait for a session, but others hold all; close some first")
        observations = [one.user.next_chunk(one.last_action) for one in running]
        for one, action in zip(running, engine.append([one.session for one in running], observations), strict=True):
            one.last_action = action
        unfinished = []
        for one in running:
            item = plays[one.index]
            if one.session.chunks < item.scenario.chunks:
                unfinished.append(one)
                continue
            engine.close(one.session)
            done[one.index] = one.session.episode(
                scenario=item.scenario.id,
                rollout=item.rollout,
                seed=seed,
                facts=one.user.facts().to_json(),
            )
        running = unfinished
    return [done[index] for index in range(len(plays))]
