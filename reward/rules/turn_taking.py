"""The rule scorer of turn_taking: reply after the turn, not before; finish it, or stop when interrupted.

What is due, for each turn of the user:
- the *onset*: the first word of the reply, in a window of a few chunks after the turn's last chunk;
- then, if the user interrupts, the *stop*: silence within a few chunks of the interruption's first;
- or else the *reply*: an utterance of the right length, nearly all of its words right.

A reply is due only where it began in the window. An utterance that begins anywhere else (in a pause, over
the user, too late, a second time) counts as spurious once, and each further chunk of it has a negative reward. What the
end of the episode cuts off is not due.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from model.program.ranges import Few, FewPair, Range
from reward.rules.content import right_places, says, word_credit
from reward.rules.timing import Run, graded, response_latency_s, runs, stop_latency_s, take_over
from reward.score import EventRewards, Reward
from rollout.scenarios.family import Family
from rollout.scenarios.turn_taking import (
    FAMILY,
    REPLY,
    Turn,
    TurnTakingConfig,
    TurnTakingExpert,
    TurnTakingFacts,
    TurnTakingScenario,
    turn_taking,
)
from rollout.scenarios.verdict import CONTENT, TIMING, Event, Outcome, Score, assemble
from rollout.turn.action import CHUNK_MS, Action, speak
from rollout.world.base import Script, User


@dataclass(frozen=True)
class TurnTakingReward(EventRewards):
    """Rewards, and the windows in chunks of 200 ms after the end of a turn or the start of an interruption."""

    trailing: Reward = -0.4  # each further chunk of an utterance that should not have begun
    reply_word: Reward = 0.3  # each word of a reply after its first: plus if right, minus if wrong
    onset: FewPair = (1, 3)  # first and last chunk, after the end of the turn, in which a reply may begin
    prompt_onset: Few = 2  # the last chunk whose onset earns the full reward and is in the tight window
    stop: Few = 2  # last chunk, after the interruption's first, in which the model may fall silent
    prompt_stop: Few = 1  # the last chunk in which falling silent earns the full reward and is in the tight window
    reply_chunks: FewPair = (5, 7)  # length of a reply that nobody interrupts
    reply_words: Annotated[int, Range(1, len(REPLY))] = 5  # words of the reply that must be right, each in its place


@dataclass(frozen=True)
class TurnTakingSettings(TurnTakingConfig):
    """The family's part of a recipe."""

    reward: TurnTakingReward = field(default_factory=TurnTakingReward)


def score_turn_taking(facts: TurnTakingFacts, actions: Sequence[Action], settings: TurnTakingSettings) -> Score:
    """Scores one episode; ``actions`` [chunks]."""
    rule = settings.reward
    return assemble(
        _events(facts, actions, rule, last_onset=rule.onset[1], last_stop=rule.stop),
        _events(facts, actions, rule, last_onset=rule.prompt_onset, last_stop=rule.prompt_stop),
        facts.chunks,
        (TIMING, CONTENT),
    )


def _events(
    facts: TurnTakingFacts, actions: Sequence[Action], rule: TurnTakingReward, last_onset: int, last_stop: int
) -> list[Event]:
    """``last_onset``: last chunk of the onset's window after the turn's end; ``last_stop``: of the stop's, after its
    start."""
    events: list[Event] = []
    spoken = runs(actions)
    replies: set[Run] = set()
    for turn, following in _with_following(facts.turns):
        first, last = turn.end + rule.onset[0], turn.end + last_onset
        reply = next((run for run in spoken if first <= run.start <= last), None)
        if reply is not None:
            replies.add(reply)
            events.append(_onset(reply, turn, facts, actions, rule))
            events.extend(_reply_words(reply, following, facts, actions, rule))
        elif last < facts.chunks:
            events.append(Event(last, "onset", Outcome.MISSED, first, {TIMING: rule.miss}))
        if following is not None and following.interrupts:
            interrupted = next(run for run in spoken if run.start < following.start <= run.end)
            events.extend(_stop(interrupted, following.start, last_stop, rule))
        elif reply is not None:
            events.extend(_reply(reply, facts, actions, rule))
    barge_ins = [turn.start for turn in facts.turns if turn.interrupts]
    for run in spoken:
        if run not in replies:
            events.extend(_spurious(run, barge_ins, rule))
    return events


def _with_following(turns: Sequence[Turn]) -> list[tuple[Turn, Turn | None]]:
    return list(zip(turns, (*turns[1:], None), strict=True))


def _onset(reply: Run, turn: Turn, facts: TurnTakingFacts, actions: Sequence[Action], rule: TurnTakingReward) -> Event:
    right = says(actions[reply.start], facts.reply[:1])
    late = max(0, reply.start - turn.end - rule.prompt_onset)
    return Event(
        chunk=reply.start,
        kind="onset",
        outcome=Outcome.HIT if right else Outcome.WRONG,
        due=turn.end + rule.onset[0],
        rewards={
            TIMING: rule.hit * graded(late, rule.onset[1] - rule.prompt_onset, rule.edge),
            CONTENT: word_credit(right, rule.right_words, rule.wrong_words),
        },
    )


def _reply_words(
    reply: Run, following: Turn | None, facts: TurnTakingFacts, actions: Sequence[Action], rule: TurnTakingReward
) -> list[Event]:
    """Credit for each later word at its place, as long as the user listens."""
    end = min(reply.end, reply.start + len(facts.reply))
    if following is not None and following.interrupts:
        end = min(end, following.start)
    return [
        Event(
            k,
            "word",
            Outcome.SHAPING,
            rewards={
                CONTENT: word_credit(
                    says(actions[k], [facts.reply[k - reply.start]]), rule.reply_word, -rule.reply_word
                )
            },
        )
        for k in range(reply.start + 1, end)
    ]


def _stop(run: Run, interruption: int, last_stop: int, rule: TurnTakingReward) -> list[Event]:
    """Whether ``run`` ended soon enough after the user began to speak over it in chunk ``interruption``."""
    silent = run.end - interruption  # chunks from the interruption to the first silent chunk
    if silent <= last_stop:
        late = max(0, silent - rule.prompt_stop)
        credit = rule.hit * graded(late, rule.stop - rule.prompt_stop, rule.edge)
        return [Event(run.end, "stop", Outcome.HIT, interruption + rule.prompt_stop, {TIMING: credit})]
    missed = interruption + last_stop
    return [
        Event(missed, "stop", Outcome.MISSED, interruption + rule.prompt_stop, {TIMING: rule.miss}),
        *_overrun(range(missed + 1, run.end), rule),
    ]


def _overrun(chunks: range, rule: TurnTakingReward) -> list[Event]:
    return [Event(k, "overrun", Outcome.SHAPING, rewards={TIMING: rule.spurious}) for k in chunks]


def _reply(reply: Run, facts: TurnTakingFacts, actions: Sequence[Action], rule: TurnTakingReward) -> list[Event]:
    """An uninterrupted reply: long enough, not too long, and the right words. Judged at the first silent chunk after
    it."""
    shortest, longest = rule.reply_chunks
    judged = min(reply.end, facts.chunks - 1)
    due = reply.start + len(facts.reply)
    if reply.chunks > longest:
        missed = reply.start + longest
        return [
            Event(missed, "reply", Outcome.MISSED, due, {TIMING: rule.miss}),
            *_overrun(range(missed + 1, reply.end), rule),
        ]
    if reply.chunks < shortest:
        cut_off = reply.end == facts.chunks
        return [] if cut_off else [Event(judged, "reply", Outcome.MISSED, due, {TIMING: rule.miss})]
    said = [" ".join(action.words) for action in actions[reply.start : reply.end]]
    right = right_places(said, facts.reply) >= rule.reply_words
    credit = rule.hit * graded(reply.chunks - len(facts.reply), longest - len(facts.reply), rule.edge)
    return [Event(judged, "reply", Outcome.HIT if right else Outcome.WRONG, due, {TIMING: credit})]


def _spurious(run: Run, barge_ins: Sequence[int], rule: TurnTakingReward) -> list[Event]:
    """An utterance that should not have begun. Chunks after a barge-in on it are judged as the stop, not here again."""
    end = min([run.end, *(start for start in barge_ins if run.start < start <= run.end)])
    return [
        Event(run.start, "speech", Outcome.SPURIOUS, rewards={TIMING: rule.spurious}),
        *(Event(k, "speech", Outcome.SHAPING, rewards={TIMING: rule.trailing}) for k in range(run.start + 1, end)),
    ]


@dataclass(frozen=True)
class FloorItems:
    """One episode's items of Full-Duplex-Bench, to be pooled over episodes: rates by `take_over_rate`, latencies by
    their mean."""

    pause_takes: tuple[bool, ...]  # for each pause: whether speech that began in it took the floor
    turn_takes: tuple[bool, ...]  # for each turn: whether speech that began after it took the floor
    response_latency_s: tuple[float, ...]  # for each turn after which the model took the floor
    stop_latency_s: tuple[float, ...]  # for each interruption


def floor_items(facts: TurnTakingFacts, actions: Sequence[Action]) -> FloorItems:
    """Pause handling, turn taking and user interruption of one episode; ``actions`` [chunks]."""
    spoken = runs(actions)

    def takes(run: Run) -> bool:
        words = sum(len(action.words) for action in actions[run.start : run.end])
        return take_over(run.chunks * CHUNK_MS / 1000, words)

    pause_takes = [
        any(first <= run.start <= last and takes(run) for run in spoken)
        for turn in facts.turns
        for first, last in turn.pauses
    ]
    turn_takes: list[bool] = []
    response: list[float] = []
    stop: list[float] = []
    for turn, following in _with_following(facts.turns):
        until = facts.chunks if following is None else following.start
        taken = next((run for run in spoken if turn.end < run.start < until and takes(run)), None)
        turn_takes.append(taken is not None)
        if taken is not None:
            response.append(response_latency_s(turn.end, taken.start))
        if following is not None and following.interrupts:
            run = next(run for run in spoken if run.start < following.start <= run.end)
            stop.append(stop_latency_s(following.start, run))
    return FloorItems(tuple(pause_takes), tuple(turn_takes), tuple(response), tuple(stop))


def _repeats_the_first_word(scenario: TurnTakingScenario, user: User) -> Script:
    return lambda k: speak(REPLY[0])


TURN_TAKING = Family(
    name=FAMILY,
    axes=(TIMING, CONTENT),
    settings=TurnTakingSettings,
    make=turn_taking,
    facts=TurnTakingFacts.from_json,
    expert=lambda scenario, user, rng, settings: TurnTakingExpert(scenario, user, rng, settings).act,
    score=score_turn_taking,
    words=lambda facts: facts.reply,
    hacks={"repeats a word": _repeats_the_first_word},
)
