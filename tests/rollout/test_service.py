"""The service's rules, each with the request that breaks it; no client's input reaches another's session; and memory
that stays flat over ten thousand sessions."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.errors import MetronomeError
from model.backbone.state import ContextFull
from model.backbone.transformer import InteractionModel
from rollout.bench.overhead import heap_bytes
from rollout.engines.embedded import SessionEngine
from rollout.engines.service import Busy, Client, Duplicate, Ended, Late, OutOfOrder, Refused, Service
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.grammar import context_rows
from rollout.turn.observation import MissingSenseError, Observation
from rollout.turn.vocabulary import Vocabulary
from tests.support.models import fresh_model
from tests.support.sessions import sound

MAX_CHUNKS = 12
RECORD = ("tokens", "sampled", "logprob", "digest", "actions")


@pytest.fixture(scope="module")
def model() -> InteractionModel:
    return fresh_model()


@pytest.fixture
def make(model: InteractionModel) -> Callable[..., Service]:
    def build(slots: int = 3, idle_chunks: int = 4) -> Service:
        engine = SessionEngine(
            model, Vocabulary.build(model.vocab), slots=slots, max_tokens=context_rows(MAX_CHUNKS, 1)
        )
        return Service(engine, max_chunks=MAX_CHUNKS, idle_chunks=idle_chunks)

    return build


def record(client: Client) -> list[object]:
    return [getattr(client.session, name) for name in RECORD]


def test_clients_hear_what_they_offered(make: Callable[..., Service]) -> None:
    """As the engine alone would have it; what the others do changes nothing."""
    service = make()
    a, b = service.open(1), service.open(2)
    buffer = torch.empty(CHUNK_SAMPLES)
    for k in range(4):
        buffer.copy_(sound(k).audio)
        service.offer(a, k, Observation(buffer))
        buffer.zero_()  # the caller's own, to use again
        if k % 2:
            service.offer(b, k, sound(100 + k))
        assert list(service.tick()) == [a, b]
    alone = make().engine
    silence = Observation(torch.zeros(CHUNK_SAMPLES))
    heard = {1: [sound(k) for k in range(4)], 2: [sound(100 + k) if k % 2 else silence for k in range(4)]}
    for client, (key, chunks) in zip((a, b), heard.items(), strict=True):
        session = alone.open(key)
        for chunk in chunks:
            alone.append([session], [chunk])
        assert record(client) == record(Client(session))
        assert torch.equal(torch.cat(client.session.codes), torch.cat(session.codes))
    assert record(a) != record(b)


def test_late_chunks_are_refused_and_silence_was_heard(make: Callable[..., Service]) -> None:
    service = make()
    client, other = service.open(1), service.open(1)
    service.offer(other, 0, sound(0))
    service.tick()
    with pytest.raises(Late, match="chunk 0 comes late: silence was heard in its place; chunk 1 is due"):
        service.offer(client, 0, sound(0))
    service.offer(client, 1, sound(1))
    service.tick()
    assert client.session.chunks == 2
    assert not torch.equal(client.session.codes[0], other.session.codes[0])  # the control: who was in time was heard
    with pytest.raises(Late):
        service.offer(client, 0, sound(0))


def test_chunks_twice_or_out_of_order_are_refused(make: Callable[..., Service]) -> None:
    service = make()
    client = service.open(1)
    with pytest.raises(OutOfOrder, match="chunk 1 does not come in order: chunk 0 is due"):
        service.offer(client, 1, sound(1))
    with pytest.raises(OutOfOrder):
        service.offer(client, -1, sound(1))
    service.offer(client, 0, sound(0))
    with pytest.raises(Duplicate, match="chunk 0 comes twice; it waits to be heard"):
        service.offer(client, 0, sound(9))
    service.tick()
    with pytest.raises(Duplicate, match="chunk 0 comes twice; it was heard"):
        service.offer(client, 0, sound(9))
    single = make()
    twin = single.open(1)
    single.offer(twin, 0, sound(0))
    single.tick()
    assert record(client) == record(twin)  # nothing refused was heard


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        (replace(sound(0), audio=torch.full((CHUNK_SAMPLES,), torch.nan)), "not finite"),
        (replace(sound(0), audio=sound(0).audio / 0), "not finite"),
        (replace(sound(0), events=("hello",)), "no rows for them"),
        (replace(sound(0), frames=torch.zeros(1, 8, 8, 3, dtype=torch.uint8)), "no vision tower"),
        (Observation(torch.full((CHUNK_SAMPLES,), 2.4e16)), "size 2.4e\\+16; full scale is 1"),
        (Observation(torch.full((CHUNK_SAMPLES,), -32768.0)), "size 32768; full scale is 1"),
        (Observation(torch.zeros(CHUNK_SAMPLES, requires_grad=True)), "without a gradient"),
        (Observation(torch.zeros(CHUNK_SAMPLES, device="meta")), "on the CPU"),
        (Observation(torch.nn.Parameter(torch.zeros(CHUNK_SAMPLES), requires_grad=False)), "this Parameter"),
        (torch.zeros(CHUNK_SAMPLES), "hears observations of 200 ms, not torch.float32"),
        (None, "not NoneType"),
    ],
)
def test_what_cannot_be_heard_concerns_its_own_client(
    make: Callable[..., Service], chunk: Observation, says: str
) -> None:
    service = make()
    client, other = service.open(1), service.open(2)
    with pytest.raises((ValueError, MissingSenseError), match=says):
        service.offer(client, 0, chunk)
    service.offer(client, 0, sound(0))
    assert list(service.tick()) == [client, other]


def test_more_clients_than_room_are_told_so(make: Callable[..., Service]) -> None:
    service = make(slots=2)
    first, _ = service.open(1), service.open(2)
    with pytest.raises(Busy, match="all 2 sessions are open"):
        service.open(3)
    service.close(first)
    service.open(3)
    assert issubclass(Busy, Refused) and issubclass(Refused, MetronomeError)


def test_silent_and_old_sessions_are_closed_and_say_so(make: Callable[..., Service]) -> None:
    service = make(idle_chunks=4)
    idle, busy = service.open(1), service.open(2)
    for k in range(MAX_CHUNKS):
        service.offer(busy, k, sound(k))
        if k == 2:
            service.offer(idle, k, sound(k))  # which begins its count anew
        assert (idle in service.tick()) == (k <= 6)
    with pytest.raises(Ended, match="no chunk came for 4 ticks"):
        service.offer(idle, 7, sound(0))
    with pytest.raises(Ended, match="limit of 12 chunks"):
        service.offer(busy, MAX_CHUNKS, sound(0))
    assert idle.session.closed and busy.session.closed
    assert service.clients == [] and service.engine.free == 3
    assert service.tick() == {}


def test_a_closed_session_stays_closed(make: Callable[..., Service]) -> None:
    service = make()
    client = service.open(1)
    service.close(client)
    for again in (lambda: service.close(client), lambda: service.offer(client, 0, sound(0))):
        with pytest.raises(Ended, match="its client closed it"):
            again()


def test_an_engine_error_ends_the_sessions_it_touched(
    make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make()
    clients = [service.open(k) for k in range(3)]
    service.tick()
    with monkeypatch.context() as patch:
        patch.setattr(service.engine.model, "logits", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            service.tick()
    assert service.engine.free == 3 and service.clients == []
    with pytest.raises(Ended, match="the engine failed"):
        service.offer(clients[0], 1, sound(0))
    fresh = service.open(1)
    service.offer(fresh, 0, sound(0))
    assert list(service.tick()) == [fresh]


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "3", None, float("nan")])
@pytest.mark.parametrize("name", ["max_chunks", "idle_chunks"])
def test_limits_must_be_numbers_that_limit(make: Callable[..., Service], name: str, wrong: Any) -> None:
    limits: dict[str, Any] = {"max_chunks": 1, "idle_chunks": 1}
    engine = make().engine
    Service(engine, **limits)
    with pytest.raises(ValueError, match=f"{name} is .* at least 1"):
        Service(engine, **limits | {name: wrong})


def test_sessions_longer_than_the_engine_has_room_for_are_refused(make: Callable[..., Service]) -> None:
    engine = make().engine
    assert engine.max_chunks == MAX_CHUNKS
    Service(engine, max_chunks=MAX_CHUNKS)
    with pytest.raises(ValueError, match=f"max_chunks is {MAX_CHUNKS + 1}, .* has room for {MAX_CHUNKS}"):
        Service(engine, max_chunks=MAX_CHUNKS + 1)


class Odd:
    """Whatever a client may send as a key, a temperature or a chunk's number."""

    WHOLE = (
        True,
        False,
        None,
        "1",
        b"1",
        1.0,
        float("nan"),
        1j,
        np.int64(1),
        np.uint64(1),
        torch.tensor(1),
        [1],
        (),
        {},
    )
    KEYS = (*WHOLE, -1, 2**64, -(10**5000), 10**5000)
    NUMBERS = (*WHOLE, 2**63, 10**5000)
    TEMPERATURES = (*WHOLE[:5], *WHOLE[6:], np.float64(1), -0.1, 1e-7, 1e7, float("inf"), 10**400, 1e-320)


def test_what_is_no_key_or_temperature_opens_nothing(make: Callable[..., Service]) -> None:
    service = make()
    other = service.open(2**64 - 1, 1e-6)
    for key in Odd.KEYS:
        with pytest.raises(ValueError, match="key is a whole number"):
            service.open(key)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="key is a whole number"):
            service.engine.fork(other.session, key)  # type: ignore[arg-type]
    for temperature in Odd.TEMPERATURES:
        with pytest.raises(ValueError, match="temperature is"):
            service.open(1, temperature)  # type: ignore[arg-type]
    assert service.engine.free == 2 and service.clients == [other]
    hottest = service.open(0, 1e6)  # the control
    assert list(service.tick()) == [other, hottest]
    assert all(bool(torch.tensor(client.session.logprob).isfinite().all()) for client in (other, hottest))


def test_what_is_no_number_of_a_chunk_is_refused(make: Callable[..., Service]) -> None:
    service = make()
    client = service.open(1)
    for number in Odd.NUMBERS:
        with pytest.raises(ValueError, match="number is a whole number"):
            service.offer(client, number, sound(0))  # type: ignore[arg-type]
    for number in (-1, 1, 2**63 - 1, -(2**63) + 1):
        with pytest.raises(OutOfOrder):
            service.offer(client, number, sound(0))
    service.offer(client, 0, sound(0))  # the control
    assert list(service.tick()) == [client] and not client.missed


def test_another_services_client_is_refused(make: Callable[..., Service]) -> None:
    service, other = make(), make()
    client, stranger = service.open(1), other.open(1)
    for wrong in (stranger, Client(client.session), client.session, None, torch.zeros(2)):
        for use in (lambda one: service.offer(one, 0, sound(0)), service.close):
            with pytest.raises(Refused, match="no such client"):
                use(wrong)
    assert not client.ended and not stranger.ended
    service.offer(client, 0, sound(0))
    other.offer(stranger, 0, sound(0))  # the control: each where it was opened
    service.close(client)
    other.close(stranger)


def test_a_session_that_cannot_go_on_ends_alone(make: Callable[..., Service]) -> None:
    """One whose context is full, although the service's limit is not reached, and one that was closed behind its
    back."""
    service = make()
    full, closed, other = (service.open(key) for key in range(3))
    service.tick()
    full.session.computed = context_rows(MAX_CHUNKS, 1) - 1
    service.engine.close(closed.session)
    with pytest.raises(ContextFull):
        service.offer(full, 1, sound(1))
    service.offer(other, 1, sound(1))
    assert list(service.tick()) == [other] and not other.ended
    assert "another micro-turn may need" in full.ended and "closed" in closed.ended
    assert service.engine.free == 2 and full.session.closed


def test_all_are_told_when_the_engine_can_close_none(
    make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make()
    clients = [service.open(k) for k in range(3)]
    monkeypatch.setattr(service.engine, "append", lambda *_: 1 / 0)
    monkeypatch.setattr(service.engine, "close", lambda *_: [][0])
    with pytest.raises(IndexError):
        service.tick()
    assert all("ZeroDivisionError" in client.ended for client in clients)


SAMPLES = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(-100, 100, width=32),
    st.floats(width=32),
    st.sampled_from([100.0, -100.0, 100.00001, 1e16, 2.4e16, 3.4e38, float("inf"), float("nan"), 1e-45, -0.0]),
)
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: x,
    "strided": lambda x: x.repeat_interleave(2)[::2],
    "expanded": lambda x: x[:1].expand(CHUNK_SAMPLES),
    "negative view": lambda x: torch.complex(x, -x).conj().imag,
    "gradient": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "fp64": lambda x: x.double(),
    "fp16": lambda x: x.half(),
    "int32": lambda x: x.nan_to_num().int(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.cfloat(),
    "short": lambda x: x[1:],
    "empty": lambda x: x[:0],
    "two channels": lambda x: x.view(2, -1),
    "batch": lambda x: x[None],
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "array": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "nothing": lambda x: None,
}


FORM = st.sampled_from(["plain", "strided", "expanded"]) | st.sampled_from(sorted(FORMS))


class Crowd:
    """A client that sends anything, between two that send sound."""

    def __init__(self, service: Service) -> None:
        self.service, self.k = service, 0
        self.quiet = (service.open(1), service.open(2))
        self.wild: Client | None = None

    def tick(self, wild: Any = None) -> bool:
        """One tick; whether the wild client's chunk was taken."""
        taken = False
        for n, client in enumerate(self.quiet):
            self.service.offer(client, self.k, sound(100 * n + self.k))
        if wild is not None:
            if self.wild is None or self.wild.ended:
                self.wild = self.service.open(3)
            due = self.wild.session.chunks
            try:
                self.service.engine.check(self.wild.session, wild)
                taken = True
            except (ValueError, MetronomeError):
                with pytest.raises((ValueError, MetronomeError)):
                    self.service.engine.append([self.wild.session], [wild])  # what it refuses, …
                with pytest.raises((ValueError, MetronomeError)):
                    self.service.offer(self.wild, due, wild)  # … the service refuses
            else:
                self.service.offer(self.wild, due, wild)
        self.service.tick()
        self.k += 1
        return taken


def test_whatever_is_offered_changes_no_other_client(make: Callable[..., Service]) -> None:
    taken = []

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(
        st.lists(
            st.tuples(FORM, st.lists(SAMPLES, min_size=1, max_size=3), st.sampled_from([False, False, False, True])),
            min_size=3,
            max_size=3,
        )
    )
    def offer(chunks: list[tuple[str, list[float], bool]]) -> None:
        crowd, alone = Crowd(make()), Crowd(make())
        for form, samples, typed in chunks:
            audio = FORMS[form](torch.tensor(samples).repeat(CHUNK_SAMPLES)[:CHUNK_SAMPLES])
            try:
                chunk: Any = Observation(audio, events=("hello",) * typed)
            except ValueError:
                chunk = Observation(torch.zeros(CHUNK_SAMPLES))
                object.__setattr__(chunk, "audio", audio)  # as if it had been changed after it was made
            taken.append(crowd.tick(chunk))
            alone.tick()
        for one, other in zip(crowd.quiet, alone.quiet, strict=True):
            assert not one.ended and record(one) == record(other)
            assert torch.equal(torch.cat(one.session.codes), torch.cat(other.session.codes))
        assert record(crowd.quiet[0]) != record(crowd.quiet[1])  # the control: records can differ

    offer()
    assert 10 < sum(taken) < len(taken) - 10, "both answers were given"


def resident_bytes() -> int:
    pages = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert pages is not None
    return 1024 * int(pages[1])


@pytest.mark.slow
def test_ten_thousand_sessions_leave_no_trace(make: Callable[..., Service]) -> None:
    """Opened, some chunks long, closed by their client, by idleness or by their length. Exact are bytes in use and live
    objects; what the process holds of the system may drift by fragments. The control keeps one session in a hundred."""
    service = make(slots=50, idle_chunks=2)
    kept: list[Client] = []

    def serve(sessions: int, keep_every: int = 0) -> tuple[int, int, int]:
        opened = 0
        while opened < sessions:
            while service.engine.free:
                client = service.open(opened)
                opened += 1
                if keep_every and opened % keep_every == 0:
                    kept.append(client)
            for _ in range(2):
                for client in service.clients[::2]:
                    service.offer(client, client.session.chunks, sound(client.session.key % 7))
                service.tick()
            for client in service.clients[::3]:
                service.close(client)
        while service.clients:
            service.close(service.clients[0])
        del client
        gc.collect()
        return heap_bytes(), len(gc.get_objects()), resident_bytes()

    before = serve(1000)
    after = serve(10_000)
    heap, objects, resident = (b - a for a, b in zip(before, after, strict=True))
    assert heap < 100_000 and objects < 100 and resident < 16 << 20, (heap, objects, resident)
    assert service.engine.free == 50 and service.engine.stats()["slots_used"] == 0
    leaking = serve(1000, keep_every=100)
    assert leaking[0] - after[0] > 100_000 and len(kept) == 10
