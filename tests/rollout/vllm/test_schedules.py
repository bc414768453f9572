"""vLLM against the embedded engine through random schedules, and the faults that these have found.

What one step of vLLM does with pages is the danger: it registers a page in the prefix cache before the page is written,
so a fork, or a session that is computed again after a preemption, may begin behind a page which another sequence fills
in the same step, or which a step that failed never wrote. Both were faults once; each is put back here and found.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rollout.engines.embedded import SessionEngine
from rollout.turn.vocabulary import Vocabulary
from tests.rollout.schedules import FEW_PAGES, SIZES, Planner, make_model, play, unequal

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm")

from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402

from rollout.engines.vllm import pages  # noqa: E402
from rollout.engines.vllm.engine import VllmEngine  # noqa: E402

SCHEDULES, STEPS = 4, 100
SMALL_STEP = 24


class Planned:
    """A model, and schedules as the embedded engine played them with it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model = make_model(dtype)
        self.vocabulary = Vocabulary.build(self.model.vocab)
        self.schedules = []
        for seed in range(SCHEDULES):
            temperature = (1.0, 0.2)[seed % 2]  # at the low one forks stay alike for long
            engine = SessionEngine(self.model, self.vocabulary, **SIZES)
            self.schedules.append(Planner(engine, seed, temperature).plan(STEPS))

    def vllm(self, **options: object) -> VllmEngine:
        return VllmEngine(self.model, self.vocabulary, **SIZES, **options)


@pytest.fixture(scope="module")
def fp32() -> Planned:
    return Planned(torch.float32)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def planned(request: pytest.FixtureRequest, fp32: Planned) -> Planned:
    return fp32 if request.param == "float32" else Planned(torch.bfloat16)


@dataclass
class Seen:
    """What vLLM did: sequences that began behind a page filled in the same step, and preemptions."""

    same_step: int = 0
    preempted: int = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Seen:
    caplog.set_level(logging.CRITICAL, logger="vllm")  # it prints all requests of a step that fails
    seen, plan = Seen(), pages.plan

    def counted(starts: list[int], offsets: list[int], table: Tensor) -> pages.Rows:
        rows = plan(starts, offsets, table)
        seen.same_step += int(torch.isin(rows.before[rows.behind], rows.filled).sum())
        return rows

    monkeypatch.setattr(pages, "plan", counted)
    return seen


@contextmanager
def preempting(engine: VllmEngine, seed: int, seen: Seen) -> Iterator[None]:
    """Now and then vLLM throws the pages of some running sequences away, those that came last, in the middle of turns
    and of prefills; not for ever, since in small steps nobody would get to the end of a past that is computed again."""
    client, rng, left = engine.core.client, random.Random(seed), 60
    scheduler, honest = client.engine_core.scheduler, client.get_output

    def disturbed() -> object:
        nonlocal left
        output = honest()
        if scheduler.running and left and rng.random() < 0.3:
            for _ in range(min(left, rng.randint(1, len(scheduler.running)))):
                scheduler._preempt_request(scheduler.running.pop(), time.monotonic(), drop_stale_output=True)
                left -= 1
                seen.preempted += 1
            scheduler.prev_step_scheduled_req_ids.clear()
        return output

    client.get_output = disturbed
    try:
        yield
    finally:
        del client.get_output


def differing(planned: Planned, seen: Seen, preempt: bool = False, **options: object) -> list[tuple[int, int]]:
    """(seed, session) of all that vLLM, in this process, makes other bits of."""
    differing, engine = [], None
    try:
        for schedule in planned.schedules:
            engine = planned.vllm(**options)
            if preempt:
                with preempting(engine, schedule.seed, seen):
                    sessions = play(engine, schedule)
            else:
                sessions = play(engine, schedule)
            differing += [(schedule.seed, n) for n in unequal(schedule, sessions)]
            assert engine.free == SIZES["slots"]
    finally:
        if engine is not None:
            engine.core.close()
    return differing


def test_cached(fp32: Planned, seen: Seen) -> None:
    assert differing(fp32, seen, pages=FEW_PAGES) == []
    assert seen.same_step > SCHEDULES


def test_cached_preempted_and_in_small_steps(planned: Planned, seen: Seen) -> None:
    assert differing(planned, seen, preempt=True, pages=FEW_PAGES, prefill_tokens=SMALL_STEP) == []
    assert seen.same_step > SCHEDULES
    assert seen.preempted > 10 * SCHEDULES


def test_cached_and_preempted(fp32: Planned, seen: Seen) -> None:
    assert differing(fp32, seen, preempt=True, pages=FEW_PAGES) == []
    assert seen.same_step > SCHEDULES
    assert seen.preempted > 5 * SCHEDULES


def test_uncached_preempted_and_in_small_steps(fp32: Planned, seen: Seen) -> None:
    options = {"prefix_cache": False, "prefill_tokens": SMALL_STEP}
    assert differing(fp32, seen, preempt=True, pages=FEW_PAGES, **options) == []
    assert seen.same_step == 0
    assert seen.preempted > 10 * SCHEDULES


def test_worker_process(fp32: Planned) -> None:
    """It ends with a step that fails, so here none does."""
    engine = None
    for schedule in fp32.schedules[:2]:
        engine = fp32.vllm(worker_process=True, prefill_tokens=SMALL_STEP, pages=FEW_PAGES)
        assert unequal(schedule, play(engine, schedule, failures=False)) == []
    assert engine is not None
    engine.core.close()


def test_windows_read_before_they_are_written_are_found(
    fp32: Planned, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control, and the first fault: every sequence read its windows before the step's fills."""
    plan = pages.plan
    monkeypatch.setattr(pages, "plan", lambda *step: (rows := plan(*step)) and replace(rows, behind=rows.behind[:0]))
    assert len(differing(fp32, Seen())) > SCHEDULES


def test_pages_of_a_step_that_failed_are_found(fp32: Planned, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control, and the second fault: forks of what failed began behind pages that nobody had written."""
    monkeypatch.setattr(KVCacheManager, "evict_blocks", lambda manager, ids: None)
    assert len(differing(fp32, seen)) > 0
