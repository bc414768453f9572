"""Plays scenarios against an engine, as many at once as it has slots, and returns the episodes in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.engines.engine import Engine
from rollout.engines.session import Session
from rollout.record.episode import Episode
from rollout.seeds import session_key
from rollout.turn.action import Action
from rollout.world.base import Scenario, User


@dataclass(frozen=True)
class Play:
    """One rollout to make: scenario and index within its group."""

    scenario: Scenario
    rollout: int


@dataclass
class _Live:
    place: int  # index into the plays, so that results keep their order
    user: User
    session: Session
    heard: Action | None = None


def play(engine: Engine, plays: Sequence[Play], seed: int, temperature: float = 1.0) -> list[Episode]:
    """Rolls every play out to its scenario's last chunk, at ``temperature``. A session that ends makes room for the
    next play at once.

    Rollouts of one scenario that begin together are forks of one session, which an engine may compute once for as long
    as they hear and say the same. By the row contract the result does not depend on that, nor on how many run
    together."""
    waiting = list(enumerate(plays))[::-1]
    live: list[_Live] = []
    done: dict[int, Episode] = {}
    while waiting or live:
        begun: dict[str, Session] = {}
        while waiting and engine.free:
            place, item = waiting.pop()
            name = item.scenario.id
            key = session_key(seed, name, item.rollout)
            session = engine.fork(begun[name], key) if name in begun else engine.open(key, temperature)
            begun.setdefault(name, session)
            live.append(_Live(place, item.scenario.user(), session))
        observations = [one.user.next_chunk(one.heard) for one in live]
        for one, action in zip(live, engine.append([one.session for one in live], observations), strict=True):
            one.heard = action
        going = []
        for one in live:
            item = plays[one.place]
            if one.session.chunks < item.scenario.chunks:
                going.append(one)
                continue
            engine.close(one.session)
            done[one.place] = one.session.episode(
                scenario=item.scenario.id,
                rollout=item.rollout,
                seed=seed,
                facts=one.user.facts().to_json(),
            )
        live = going
    return [done[place] for place in range(len(plays))]
