"""What one micro-turn of one session costs besides computing, and whether memory stays where it is.

**Overhead** is the time of `SessionEngine.append` outside four calls: the model's forward and logits, the dMel front
end, and sampling. It is bookkeeping: sessions, segments, keys, records. The forward's own Python counts as forward.

**Growth**: a session's record grows by design (codes, tokens, actions, log-probs). Beside it nothing may: the bench
empties the record after every chunk and counts what the process holds before and after many chunks, in the C heap
(glibc's count of bytes in use, where every tensor lies) and in Python's blocks. Temporaries come and go within a chunk;
that they are all returned is what the counts show. Left in: 8 bytes a token, for the list of tokens stays.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rollout.bench.crowd import Crowd, embedded, tiny_model
from rollout.engines.embedded import SessionEngine

WARM_TICKS = 20
SETTLED_TICKS = 100
"""After so many micro-turns caches and free lists of Python and malloc have their size."""


@dataclass(frozen=True)
class Overhead:
    """Medians over the micro-turns of one session, milliseconds."""

    chunk_ms: float
    overhead_ms: float


@dataclass(frozen=True)
class Growth:
    """Over ``chunks`` micro-turns of one session whose record is emptied."""

    chunks: int
    heap_bytes: int
    python_blocks: int
    state_moved: bool  # whether any page or window lies elsewhere than before

    @property
    def heap_bytes_per_chunk(self) -> float:
        return self.heap_bytes / self.chunks


class Stopwatch:
    """Seconds inside the calls that it wraps."""

    def __init__(self) -> None:
        self.total_s = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = call(*arguments)
            self.total_s += time.perf_counter() - begin
            return result

        return timed


class _Timed:
    """An object whose own call and named methods are timed; the rest is the object's."""

    def __init__(self, inner: Any, watch: Stopwatch, *names: str) -> None:
        self._inner = inner
        self._call = watch.around(inner) if callable(inner) else None
        for name in names:
            setattr(self, name, watch.around(getattr(inner, name)))

    def __call__(self, *arguments: Any) -> Any:
        assert self._call is not None
        return self._call(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def watched(engine: SessionEngine) -> Stopwatch:
    """A watch that runs inside ``engine``'s model, front end and sampling from here on."""
    watch = Stopwatch()
    engine.model = _Timed(engine.model, watch, "logits")  # type: ignore[assignment]
    engine.dmel = _Timed(engine.dmel, watch, "stream_codes")  # type: ignore[assignment]
    classes: Any = _Timed(engine.vocabulary.classes, watch, "sample_rows")
    engine.vocabulary = replace(engine.vocabulary, classes=classes)
    return watch


def measure_overhead(ticks: int) -> Overhead:
    engine = embedded(tiny_model(), 1, WARM_TICKS + ticks)
    watch = watched(engine)
    crowd = Crowd(engine)
    crowd.join(1)
    taken = []
    for _ in range(WARM_TICKS + ticks):
        watch.total_s = 0.0
        chunk_s = crowd.tick()
        taken.append((chunk_s, chunk_s - watch.total_s))
    result = Overhead(*(1000 * statistics.median(column) for column in zip(*taken[WARM_TICKS:], strict=True)))
    print(f"one session: {result.chunk_ms:.2f} ms a chunk, {result.overhead_ms:.3f} ms of it are not computing")
    return result


def measure_growth(chunks: int) -> Growth:
    result = growth(embedded(tiny_model(), 1, SETTLED_TICKS + chunks), chunks)
    print(
        f"{chunks} chunks on, records emptied: heap {result.heap_bytes:+d} bytes, {result.python_blocks:+d} Python "
        f"blocks; pages and windows {'moved' if result.state_moved else 'where they were'}"
    )
    return result


def growth(engine: SessionEngine, chunks: int) -> Growth:
    """Runs one session of ``engine``, which needs room for `SETTLED_TICKS` + ``chunks`` micro-turns."""
    crowd = Crowd(engine)
    crowd.join(1)
    session = crowd.sessions[0]

    def run(count: int) -> tuple[int, int]:
        for _ in range(count):
            crowd.tick()
            for record in (session.codes, session.actions, session.sampled, session.logprob, session.digest):
                record.clear()
        gc.collect()
        return heap_bytes(), sys.getallocatedblocks()

    places = _addresses(engine)
    before = run(SETTLED_TICKS)
    after = run(chunks)
    return Growth(chunks, after[0] - before[0], after[1] - before[1], _addresses(engine) != places)


def _addresses(engine: SessionEngine) -> list[int]:
    layers = zip(engine.state.layers, engine.state.conv_windows, strict=True)
    return [x.data_ptr() for layer, conv_windows in layers for x in (layer.kv.key, layer.kv.value, *conv_windows)]


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2: ten sizes, of which the fifth is bytes in mapped blocks, the eighth in others."""

    _fields_ = (("sizes", ctypes.c_size_t * 10),)


def heap_bytes() -> int:
    """Bytes that the process has taken from malloc and not returned."""
    call = ctypes.CDLL(None).mallinfo2
    call.restype = _MallInfo
    sizes = call().sizes
    return int(sizes[4] + sizes[7])
