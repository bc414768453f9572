"""``python -m rollout.bench.graph [--json FILE]``: a decode step as one CUDA graph, an experiment.

A copy from the host and a wait for the device cannot be captured. This bench sends what the host knows before the step
once, captures one decode step of R sessions between that and the read-out, and replays it: the cost of a step without
work on the host. The bits are compared with those of the engine's way. Nothing else uses this; the exit status is 0 if
everything was measured.

For the Triton backend; ``--dry`` runs the same ops without a capture, in the interpreter.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rollout.bench.graph")

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kernels import dispatch, ops
from kernels.errors import MetronomeError
from kernels.tools.device_time import wait
from model.backbone.state import SessionState
from model.backbone.transformer import InteractionModel
from model.inputs import Inputs, Placed
from model.placement import Placement, PlacementConfig, add_device
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.outputs import output_file
from model.senses.video import Patches
from rollout.bench.latency import random_model

CASES = (
    ("tiny", "float32", 1, 100), ("tiny", "float32", 48, 100),
    ("base", "bfloat16", 1, 300), ("base", "bfloat16", 48, 300),
)  # fmt: skip
DRY_CASES = (("tiny", "float32", 2, 9),)
"""As `CASES`: (preset, dtype, sessions, tokens in each session)."""


@dataclass(frozen=True)
class Step:
    """One decode step; milliseconds, medians."""

    preset: str
    dtype: str
    sessions: int
    history: int
    engine_ms: float  # as the engine does it
    waitless_ms: float  # between upload and read-out, launched by the host
    graph_ms: float  # replayed, with a wait after each
    back_to_back_ms: float  # replayed many times, one wait at the end
    same_bits: bool  # of the graph's tokens, log-probs and digests and the engine's


Result = tuple[Tensor, Tensor, Tensor]


def median_ms(call: Callable[[], object], repeat: int) -> float:
    """Median time of a call until the device is done."""
    device, taken = dispatch.device(), []
    for _ in range(repeat):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken)


@torch.inference_mode()
def measure(model: InteractionModel, name: str, dtype: str, sessions: int, history: int, dry: bool) -> Step:
    device, repeat = dispatch.device(), 1 if dry else 30
    state = SessionState(model.config, sessions, history + 8, model.dtype, max_rows=sessions * history)
    slots = [state.open() for _ in range(sessions)]
    draw, none = torch.Generator().manual_seed(1), torch.empty(0, 80, dtype=torch.uint8)
    past = torch.randint(8, 200, (sessions * history,), generator=draw)
    dark = Patches.none(model.senses.patch)
    model(Inputs.of(past, none, dark, state.extend(slots, [history] * sessions), model.senses), state)
    segments = state.extend(slots, [1] * sessions)
    tokens = torch.randint(8, 200, (sessions,), generator=draw)
    keys, kinds = torch.arange(sessions) * 7919, torch.zeros(sessions, dtype=torch.int64)
    allowed = torch.ones(3, model.vocab, dtype=torch.bool, device=device)
    memory = [
        x
        for layer, conv_windows in zip(state.layers, state.conv_windows, strict=True)
        for x in (layer.kv.key, layer.kv.value, *conv_windows)
    ]
    before = [x.clone() for x in memory]

    def restore() -> None:
        for x, y in zip(memory, before, strict=True):
            x.copy_(y)

    inputs = Inputs.of(tokens, none, dark, segments, model.senses)

    def step(placed: Placed) -> Result:
        key, kind = placed.more
        return ops.sample(model.logits(model(placed, state)), 1.0, key, allowed, kind)

    def as_it_is() -> tuple[Tensor, ...]:
        with ops.deferred():
            return ops.fetch(*step(model.place(inputs, state, keys, kinds)))

    expected = as_it_is()
    engine_ms = median_ms(as_it_is, repeat)
    restore()
    with ops.deferred():
        placed = model.place(inputs, state, keys, kinds)
        got = step(placed)
        waitless_ms = graph_ms = back_to_back_ms = median_ms(lambda: step(placed), repeat)
        if not dry:
            got, graph_ms, back_to_back_ms = _captured(lambda: step(placed), restore)
        same = all(torch.equal(a, b) for a, b in zip(expected, ops.fetch(*got), strict=True))
    return Step(name, dtype, sessions, history, engine_ms, waitless_ms, graph_ms, back_to_back_ms, same)


def _captured(call: Callable[[], Result], restore: Callable[[], None]) -> tuple[Result, float, float]:
    """(result of a replay, ms of one replay with a wait, ms of a replay among many without waits)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    restore()
    graph.replay()
    first, second, third = (x.clone() for x in result)
    graph_ms = median_ms(graph.replay, 100)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(100):
        graph.replay()
    end.record()
    end.synchronize()
    return (first, second, third), graph_ms, begin.elapsed_time(end) / 100


def parser() -> Parser:
    parser = Parser("rollout.bench.graph", __doc__)
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="write the results to FILE, after each case")
    parser.add_argument("--dry", action="store_true", help="two sessions of the tiny preset, without a capture")
    add_device(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    Placement.enter(PlacementConfig(given.device), "float32")
    if dispatch.contract()["backend"] != "triton":
        raise MetronomeError(
            "graphs are of the Triton backend's kernels; give --device cuda, or --dry with METRONOME_BACKEND=triton "
            "and TRITON_INTERPRET=1"
        )
    results: list[Step] = []
    models: dict[tuple[str, str], InteractionModel] = {}
    cases = DRY_CASES if given.dry else CASES
    for name, dtype, sessions, history in cases:
        if (name, dtype) not in models:
            models = {(name, dtype): random_model(name, getattr(torch, dtype))}
        try:
            results.append(measure(models[name, dtype], name, dtype, sessions, history, given.dry))
        except Exception:  # the other cases are still measured
            traceback.print_exc()
            continue
        print(results[-1], flush=True)
        if given.json is not None:
            report = {"contract_id": dispatch.contract_id(), "graph": [asdict(r) for r in results]}
            write_json(given.json, report, indent=1)
    if len(results) < len(cases):
        raise SystemExit(1)
