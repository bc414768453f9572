"""Rollout workers: the learner's bits from any number of them, whatever happens to them, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.errors import MetronomeError
from model.backbone.state import ContextFull
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.tokenizer import load_tokenizer
from rollout.bench.workers import cpu_s
from rollout.engines.embedded import SessionEngine
from rollout.engines.workers import pool as workers
from rollout.engines.workers.pool import WorkerPool
from rollout.engines.workers.task import Setup
from rollout.play import Play, play
from rollout.record.episode import Episode
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import DEFAULT_FOLDER, SpeechBank
from tests.support.episodes import unequal_fields
from tests.support.models import fresh_model

ROOT = Path(__file__).resolve().parents[2]
SEED = 3


def setup(**changes: Any) -> Setup:
    usual = Setup(
        config=preset("tiny"),
        dtype=torch.float32,
        tokenizer=load_tokenizer(),
        speech_dir=str(DEFAULT_FOLDER),
        scenarios=ScenarioConfig(),
        slots=3,
        max_tokens=512,
        words_per_chunk=1,
    )
    return replace(usual, **changes)


def pool_of(
    model: InteractionModel, count: int, threads: int = 1, timeout_s: float = 300.0, **changes: Any
) -> WorkerPool:
    return WorkerPool(model, setup(**changes), workers=count, threads=threads, timeout_s=timeout_s)


def in_process(model: InteractionModel, plays: list[Play], seed: int = SEED, temperature: float = 1.0) -> list[Episode]:
    vocabulary = Vocabulary.build(model.vocab)
    engine = SessionEngine(model, vocabulary, slots=len(plays), max_tokens=512)
    return play(engine, plays, seed, temperature)


def differing(one: list[Episode], other: list[Episode]) -> set[str]:
    """Names of all fields in which some episode differs by a bit."""
    return {name for a, b in zip(one, other, strict=True) for name in unequal_fields(a, b)}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return fresh_model()


@pytest.fixture(scope="module")
def plays() -> list[Play]:
    bank = SpeechBank.open()
    items = [ScenarioConfig().scenario(family, "train", 11, bank) for family in ScenarioConfig().families]
    return [Play(item, rollout) for item in items for rollout in range(3)]


@pytest.fixture(scope="module")
def expected(model: InteractionModel, plays: list[Play]) -> list[Episode]:
    return in_process(model, plays)


@pytest.fixture(scope="module")
def pool(model: InteractionModel) -> Iterator[WorkerPool]:
    with closing(pool_of(model, 2)) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize(("count", "threads", "slots"), [(1, 2, 6), (3, 1, 1)])
def test_any_number_of_workers_threads_and_slots_gives_the_learners_bits(
    model: InteractionModel, plays: list[Play], expected: list[Episode], count: int, threads: int, slots: int
) -> None:
    with closing(pool_of(model, count, threads, slots=slots)) as pool:
        assert differing(pool.play(plays, SEED), expected) == set()
        assert [e.name for e in expected] == [f"{p.scenario.id}#{p.rollout}" for p in plays]


@pytest.mark.slow
def test_another_seed_temperature_or_weight_is_seen(
    pool: WorkerPool, model: InteractionModel, plays: list[Play], expected: list[Episode]
) -> None:
    assert differing(pool.play(plays, SEED), expected) == set()
    assert pool.play([], SEED) == []
    assert differing(pool.play(plays[1:2], SEED), expected[1:2]) == set()
    assert {"seed", "tokens", "text.logprob", "text.digest"} <= differing(pool.play(plays, SEED + 1), expected)

    greedy = pool.play(plays, SEED, 0.0)
    assert differing(greedy, in_process(model, plays, temperature=0.0)) == set()
    assert {"temperature", "tokens"} <= differing(greedy, expected)

    weight = model.layers[2].self_attn.o_proj.weight.detach()
    before = weight[0, 0].clone()
    try:
        weight[0, 0] = torch.nextafter(before, torch.tensor(torch.inf))
        model.repack()
        pool.publish()
        changed = pool.play(plays, SEED)
        assert {"weights_digest", "text.digest"} <= differing(changed, expected)
        assert differing(changed, in_process(model, plays)) == set()
    finally:
        weight[0, 0] = before
        model.repack()
    pool.publish()
    assert differing(pool.play(plays, SEED), expected) == set()


@pytest.mark.slow
def test_episodes_keep_their_order_though_the_first_share_comes_last(
    pool: WorkerPool, plays: list[Play], expected: list[Episode]
) -> None:
    first, second = pool.pids

    def delay_the_first() -> None:
        time.sleep(0.1)
        os.kill(first, signal.SIGSTOP)
        time.sleep(4)
        os.kill(first, signal.SIGCONT)

    start = time.perf_counter()
    with meanwhile(delay_the_first):
        episodes = pool.play(plays, SEED)
        assert time.perf_counter() - start > 4, "the delayed share was waited for"
    assert differing(episodes, expected) == set()
    assert pool.pids == [first, second]


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(pool: WorkerPool, plays: list[Play], expected: list[Episode]) -> None:
    hanging, other = pool.pids
    os.kill(hanging, signal.SIGSTOP)
    pool._workers[0]._timeout_s = 2
    assert differing(pool.play(plays, SEED), expected) == set()
    assert not alive(hanging) and pool.pids[1] == other and hanging not in pool.pids


@pytest.mark.alone
@pytest.mark.slow
def test_idle_workers_use_no_processor_and_waiting_for_them_uses_none(pool: WorkerPool, plays: list[Play]) -> None:
    pool.play(plays, SEED)
    torch.randn(2000, 2000) @ torch.randn(2000, 2000)  # the learner's threads have work, and then none
    time.sleep(0.5)
    before, mine = [cpu_s(pid) for pid in pool.pids], time.process_time()
    time.sleep(3)
    assert sum(cpu_s(pid) for pid in pool.pids) - sum(before) < 0.05  # a spinning thread would use 3 s
    assert time.process_time() - mine < 0.3

    start, mine = time.perf_counter(), time.process_time()
    while sum(cpu_s(pid) for pid in pool.pids) < sum(before) + 0.3:  # the control: working shows
        assert time.perf_counter() - start < 60
        pool.play(plays * 4, SEED)
    assert time.process_time() - mine < 0.1 * (time.perf_counter() - start)


def spoil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    (tmp_path / "spoil").write_text("".join(f"{kind}\n" for kind in kinds))
    monkeypatch.setenv("SPOIL", str(tmp_path / "spoil"))
    monkeypatch.setattr(workers, "PROGRAM", "from tests.rollout.spoiled_worker import main; main()")


@pytest.mark.slow
def test_a_worker_that_answers_garbage_is_replaced(
    model: InteractionModel,
    plays: list[Play],
    expected: list[Episode],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = ["half", "exit", "noise", "pickle", "bit", "order", "missing", "another"]
    spoil(tmp_path, monkeypatch, *(line for kind in kinds for line in (kind, "", "")))  # two tasks, one of them again
    with closing(pool_of(model, 2)) as pool:
        for kind in kinds:
            before = set(pool.pids)
            for worker in pool._workers:
                worker._timeout_s = 10 if kind == "half" else 300
            assert differing(pool.play(plays, SEED), expected) == set(), kind
            assert len(before & set(pool.pids)) == 1, kind


@pytest.mark.slow
def test_a_task_that_kills_every_worker_ends_with_an_error(
    model: InteractionModel, plays: list[Play], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(tmp_path, monkeypatch, *["killed"] * 9)
    monkeypatch.setattr(workers, "ATTEMPTS", 2)
    with closing(pool_of(model, 1)) as pool:
        with pytest.raises(MetronomeError, match=r"2 rollout workers .* timespeak/train/11#0 to .* killed by signal 9"):
            pool.play(plays, SEED)
        assert pool.pids == []
        with pytest.raises(RuntimeError, match="closed"):
            pool.play(plays, SEED, 1.0)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import nothing_of_this_name", "one was lost before it was ready; it ended with status 1"),
        ("import os; os.kill(os.getpid(), 9)", "5 in turn were lost before .* killed by signal 9"),
    ],
)
def test_workers_that_cannot_start_end_with_an_error(
    model: InteractionModel, program: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PROGRAM", program)
    with pytest.raises(MetronomeError, match=f"cannot start: {says}"):
        pool_of(model, 2)


def test_a_worker_that_never_gets_ready_ends_with_an_error(
    model: InteractionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PROGRAM", "import time; time.sleep(3600)")
    monkeypatch.setattr(workers, "ATTEMPTS", 2)
    with pytest.raises(MetronomeError, match=r"2 in turn .* gave no answer within 0\.5 s"):
        pool_of(model, 1, timeout_s=0.5)


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_learners(model: InteractionModel, plays: list[Play]) -> None:
    with pytest.raises(MetronomeError, match="nowhere"):
        pool_of(model, 1, speech_dir="nowhere")
    with closing(pool_of(model, 1, max_tokens=64)) as pool:
        with pytest.raises(ContextFull, match="of at most 64 tokens") as error:
            pool.play(plays, SEED)
        assert "In a rollout worker" in error.value.__notes__[0]


@pytest.mark.slow
def test_damaged_shared_weights_are_an_error(model: InteractionModel, plays: list[Play]) -> None:
    with closing(pool_of(model, 1)) as pool:
        size = os.fstat(pool._weights).st_size
        last = os.pread(pool._weights, 1, size - 1)
        os.pwrite(pool._weights, bytes([last[0] ^ 1]), size - 1)
        with pytest.raises(MetronomeError, match=f"digest .* published {pool.weights_digest}"):
            pool.play(plays, SEED)


@pytest.mark.slow
def test_a_worker_of_another_contract_is_an_error(model: InteractionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METRONOME_BACKEND", "reference")
    with pytest.raises(MetronomeError, match="computes under contract"):
        pool_of(model, 1)


LEARNER = """
import sys
from tests.rollout.test_workers import *

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
pool = pool_of(fresh_model(), 2)
bank = SpeechBank.open()
plays = [Play(ScenarioConfig().scenario(f, "train", 0, bank), 0) for f in ScenarioConfig().families]
print(*pool.pids, flush=True)
while True:
    pool.play(plays, 0)
    if sys.argv[1] == "raise":
        raise RuntimeError("a defect")
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["raise", "SIGINT", "SIGTERM", "SIGKILL"])
def test_however_the_learner_ends_its_workers_end_too(end: str) -> None:
    """With the last of them goes the weights' memory: a memory file lives no longer than those that have it open."""
    learner = subprocess.Popen(
        [sys.executable, "-c", LEARNER, end], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert learner.stdout is not None
    pids = [int(pid) for pid in learner.stdout.readline().split()]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    if end != "raise":
        time.sleep(1)  # in the middle of a task, or nearly so
        learner.send_signal(getattr(signal, end))
    _, said = learner.communicate(timeout=60)
    assert learner.returncode != 0
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
    assert said.count("Traceback") == (1 if end in ("raise", "SIGINT") else 0), "the workers say nothing"
