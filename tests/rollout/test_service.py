"""The service's rules, each with the request that breaks it; and memory that stays flat over ten thousand sessions."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.errors import MetronomeError
from rollout.bench.overhead import heap_bytes
from rollout.engines.service import Busy, Client, Duplicate, Ended, Late, OutOfOrder, Refused, Service
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.observation import Observation
from tests.support.services import MAX_CHUNKS, record
from tests.support.sessions import sound


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
        assert torch.equal(client.session.codes, session.codes)
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
