"""``python -m rollout.bench.latency [--json FILE]``: milliseconds of a micro-turn on the backend's device.

For each case many sessions run on noise: one tick is a small prefill of all sessions, then the decode steps of those
that speak. A tick within 200 ms is real time. After that whole sequences go through the model under autograd, as in the
learner; log-probs and row digests must equal the sampler's (exit status 1 otherwise). On a GPU one more tick counts how
often the host waits for it. Weights are random.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rollout.bench.latency")

import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kernels import dispatch
from kernels.tools.device_time import wait, waits
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.inputs import Inputs
from model.placement import Placement, PlacementConfig, add_device
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.outputs import output_file
from model.program.ranges import Range, number
from rollout.bench.crowd import Crowd
from rollout.engines.embedded import SessionEngine
from rollout.record.episode import Episode
from rollout.turn.grammar import context_rows
from rollout.turn.vocabulary import Vocabulary

MAX_LEARNED = 16  # the most sequences in the learner's pass


@dataclass(frozen=True)
class Case:
    """What is measured."""

    preset: str
    dtype: str
    sessions: int


CASES = (
    Case("tiny", "float32", 1),
    Case("tiny", "float32", 48),
    Case("base", "bfloat16", 1),
    Case("base", "bfloat16", 48),
)
DRY_CASES = (Case("tiny", "float32", 2),)


@dataclass(frozen=True)
class Latency:
    """The result of one case; times in milliseconds."""

    preset: str
    dtype: str
    sessions: int
    tick_ms: float  # median
    slowest_ms: float  # the slowest after the first few
    first_ms: float  # the first tick, with what is compiled or allocated then
    learn_ms: float  # forward and backward of up to MAX_LEARNED whole sequences
    rows: int  # of all sessions, at the end
    tokens: int  # sampled tokens of the learner's sequences
    unequal: int  # those of them with another log-prob or row digest in the learner
    forwards: int  # of the tick whose waits are counted: a prefill and its decode steps
    waits: dict[str, int]  # of the host for the GPU in that tick, by line of Python


def random_model(name: str, dtype: torch.dtype) -> InteractionModel:
    """A preset on the backend's device, packed, with random weights drawn by torch: `init_weights`, which gives the
    same weights on every machine, would take most of a minute for the larger presets."""
    model = InteractionModel(preset(name), dtype)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for title, weight in model.named_parameters():
            if weight.ndim < 2 or title.endswith("norm.weight"):
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=draw)
        for buffer in model.buffers():
            buffer.zero_()
    model.to(dispatch.device())
    model.mark_changed()
    model.pack()
    return model


def measure(case: Case, model: InteractionModel, ticks: int) -> Latency:
    """Measures ``ticks`` micro-turns; the first third is warm-up. ``model`` must have the case's preset and dtype."""
    device = dispatch.device()
    vocabulary = Vocabulary.of(model)
    engine = SessionEngine(model, vocabulary, slots=case.sessions, max_tokens=context_rows(ticks + 2, 1))
    crowd, taken = Crowd(engine), []
    crowd.join(case.sessions)
    for _ in range(ticks):
        wait(device)
        taken.append(1000 * crowd.tick())
    counted = taken[ticks // 3 :]
    with waits(device) as lines:
        before = [len(session.logprob) for session in crowd.sessions]
        crowd.tick()
        forwards = max(len(s.logprob) - n for s, n in zip(crowd.sessions, before, strict=True))
    episodes = [s.episode(scenario="bench", rollout=i, seed=0, facts={}) for i, s in enumerate(crowd.sessions)]
    rows = sum(len(e.tokens) for e in episodes)
    crowd.leave()
    learned, learn_ms = episodes[:MAX_LEARNED], 0.0
    for _ in range(2):  # the first compiles
        wait(device)
        begin = time.perf_counter()
        logprob, digest = learn(model, vocabulary, learned)
        wait(device)
        learn_ms = 1000 * (time.perf_counter() - begin)
    sampled = torch.cat([e.text.logprob for e in learned])
    unequal = sampled.view(torch.int32) != logprob.view(torch.int32)
    unequal |= torch.cat([e.text.digest for e in learned]) != digest
    return Latency(
        case.preset, case.dtype, case.sessions, statistics.median(counted), max(counted), taken[0], learn_ms, rows,
        len(sampled), int(unequal.sum()), forwards, dict(Counter(lines)),
    )  # fmt: skip


def learn(model: InteractionModel, vocabulary: Vocabulary, episodes: list[Episode]) -> tuple[Tensor, Tensor]:
    """Log-probs fp32 [N] and row digests int64 [N] of the episodes' sampled tokens, computed from whole sequences, with
    a backward pass."""
    inputs = Inputs.cat(episodes, model.senses)
    starts, text = inputs.starts, [e.text for e in episodes]
    row = torch.cat([s.sampled_at - 1 + start for s, start in zip(text, starts, strict=True)])
    target = torch.cat([e.tokens[e.text.sampled_at] for e in episodes])
    row_class = torch.cat([s.row_class for s in text])
    logits = model.logits(model(inputs)[row.to(model.device)])
    logprob, _, digest = vocabulary.classes.logprob(logits, target, row_class, 1.0)
    torch.autograd.grad(logprob.sum(), [p for p in model.parameters() if p.requires_grad], materialize_grads=True)
    return logprob.detach().cpu(), digest.cpu()


def parser() -> Parser:
    parser = Parser("rollout.bench.latency", __doc__)
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="write the results to FILE, after each case")
    parser.add_argument(
        "--ticks", type=number(int, Range(3, 10_000)), default=15, help="micro-turns of each case (default: 15)"
    )
    parser.add_argument("--dry", action="store_true", help="two sessions of the tiny preset")
    add_device(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    Placement.enter(PlacementConfig(given.device), "float32")
    results: list[Latency] = []
    models: dict[tuple[str, str], InteractionModel] = {}
    for case in DRY_CASES if given.dry else CASES:
        key = case.preset, case.dtype
        if key not in models:
            models = {key: random_model(case.preset, getattr(torch, case.dtype))}
        results.append(result := measure(case, models[key], given.ticks))
        print(
            f"{case.preset} {case.dtype}, {case.sessions} sessions: {result.tick_ms:.1f} ms a micro-turn (slowest "
            f"{result.slowest_ms:.1f}, first {result.first_ms:.0f}), learner {result.learn_ms:.0f} ms, "
            f"{result.unequal} of {result.tokens} tokens unequal"
            + (f", {sum(result.waits.values())} waits in {result.forwards} forwards" if result.waits else ""),
            flush=True,
        )
        if given.json is not None:
            report = {"contract_id": dispatch.contract_id(), "latency": [asdict(r) for r in results]}
            write_json(given.json, report, indent=1)
    if any(r.unequal for r in results):
        raise SystemExit(1)
