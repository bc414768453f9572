"""The overhead of a micro-turn beside computing, and whether memory grows.

**Overhead** is the time of `SessionEngine.append` outside four calls: the model's forward and logits, the dMel front
end, and sampling. It is bookkeeping: sessions, segments, keys, records. The forward's own Python counts as forward.

**Growth**: a session's record grows (codes, tokens, actions, log-probs), and nothing else should. The bench empties the
record after every chunk and measures before and after many chunks what the process holds: bytes in use of the C heap
(where tensors are) and Python's memory blocks. The list of tokens is not emptied: 8 bytes a token.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
from dataclasses import dataclass, replace
from typing import Any

from rollout.bench.crowd import Crowd, embedded, tiny_model
from rollout.bench.timing import Stopwatch
from rollout.engines.embedded import SessionEngine
from rollout.record.growing import Growing

WARM_TICKS = 20
SETTLED_TICKS = 100  # micro-turns until caches and free lists of Python and malloc have reached their size


@dataclass(frozen=True)
class Overhead:
    """Medians over the micro-turns of one session, milliseconds."""

    chunk_ms: float
    overhead_ms: float


@dataclass(frozen=True)
class Growth:
    """Growth of memory over ``chunks`` micro-turns of one session."""

    chunks: int
    heap_bytes: int
    python_blocks: int
    state_moved: bool  # whether the state's tensors were reallocated

    @property
    def heap_bytes_per_chunk(self) -> float:
        return self.heap_bytes / self.chunks


class _Timed:
    """A proxy that times calls of an object and of its methods ``names``."""

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
    """From now on the result measures the time inside ``engine``'s model, dMel front end and sampling."""
    watch = Stopwatch()
    engine.model = _Timed(engine.model, watch, "logits")  # type: ignore[assignment]
    engine.dmel = _Timed(engine.dmel, watch, "stream_codes")  # type: ignore[assignment]
    classes: Any = _Timed(engine.vocabulary.classes, watch, "sample_rows")
    engine.vocabulary = replace(engine.vocabulary, classes=classes)
    return watch


def measure_overhead(ticks: int) -> Overhead:
    """Over ``ticks`` micro-turns."""
    engine = embedded(tiny_model(), 1, WARM_TICKS + ticks)
    watch = watched(engine)
    crowd = Crowd(engine)
    crowd.join(1)
    taken = []
    for _ in range(WARM_TICKS + ticks):
        watch.seconds = 0.0
        chunk_s = crowd.tick()
        taken.append((chunk_s, chunk_s - watch.seconds))
    result = Overhead(*(1000 * statistics.median(column) for column in zip(*taken[WARM_TICKS:], strict=True)))
    print(f"one session: {result.chunk_ms:.2f} ms a chunk, {result.overhead_ms:.3f} ms of it are not computing")
    return result


def measure_growth(chunks: int) -> Growth:
    """Over ``chunks`` micro-turns of a new engine."""
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
            for record in (session.actions, session.sampled, session.logprob, session.digest):
                record.clear()
            session.sound = Growing()
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
