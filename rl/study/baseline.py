"""``python -m rl.study.baseline --checkpoint CKPT --steps 30 --out FOLDER``: RL with a mismatch, corrected and not.

Several runs with one recipe, checkpoint and seed: ours (`rl.step.loop`, which stops at any mismatch); naive torch
(`kernels.reference.naive`), whose sampler and learner differ in their last bits; and a bf16 sampler with an fp32
learner, which differ a thousand times as much. The latter two have truncated importance weights: each token's advantage
is multiplied by min(p_learner / p_sampler, CAP) (Yao et al. 2025, "truncated importance sampling"; TRL's
``token_truncate``); bf16 also runs without. As the mismatch is reported and not fatal, this is a program of its own and
no option of `rl.train`. Writes FOLDER/baseline.json and baseline.png: reward and mismatch at each step, the held-out
score, and a verdict on ours, of which the others are the control. With ``--fail-on mismatch`` the exit status is 1 when
a bit of ours differs, 3 when nothing of ours was compared or the control differs in nothing."""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.study.baseline")

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.placement import Placement, PlacementConfig, add_device
from model.program import ranks
from model.program.arguments import Parser
from model.program.files import write_json, write_whole
from model.program.folders import locked
from model.program.outputs import output_folder
from model.program.ranges import Range, number
from model.weights import checkpoint
from reward.source import RewardSource
from rl.audit.document import plain
from rl.audit.finding import Finding, Verdict, add_fail_on, leave
from rl.audit.table import Cell, Table
from rl.config import EvalConfig, RLConfig, TrainConfig
from rl.environment import environment
from rl.evaluate import evaluate
from rl.learner.deepspeed import Learner
from rl.rollers import build_engine
from rl.step import loop
from rl.step.batch import choice_logprobs, collate
from rl.step.credit import Scales, token_weights
from rl.step.gradient import gradient_of
from rl.step.identity import compare
from rl.study.variants import naive_torch
from rollout.engines.roller import InProcess, Roller
from rollout.record.episode import Episode, concatenate
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import SpeechBank

CAP = 2.0
"""Largest importance weight."""
RATIO_MEAN, RATIO_MAX, TRUNCATED = "ratio/mean", "ratio/max", "ratio/truncated"


@dataclass(frozen=True)
class Method:
    """How one of the runs samples and learns."""

    name: str
    naive: bool = False  # whether sampler and learner run naive torch's ops instead of our kernels
    sampler: torch.dtype = torch.float32  # dtype of the sampler's weights; the learner's are fp32
    weights: bool = False  # whether advantages get truncated importance weights

    @property
    def exact(self) -> bool:
        """Whether sampler and learner are the same function."""
        return not self.naive and self.sampler == torch.float32

    def backend(self) -> AbstractContextManager[None]:
        """A block in which the ops run on the method's backend."""
        return dispatch.substituted(naive_torch()) if self.naive else nullcontext()


METHODS = (
    Method("ours"),
    Method("naive + importance weights", naive=True, weights=True),
    Method("bf16 sampler + importance weights", sampler=torch.bfloat16, weights=True),
    Method("bf16 sampler", sampler=torch.bfloat16),
)


@dataclass(frozen=True)
class Result:
    """What one run gave."""

    method: str
    records: list[dict[str, Any]]  # one for each step, with the names of metrics.jsonl
    before: float  # held-out score before RL, in [0, 1]
    after: float  # held-out score after RL
    wall_s: float


def train(method: Method, config: TrainConfig, folder: Path, bank: SpeechBank) -> Result:
    """One run from the checkpoint in ``folder``. `model.program.ranks.joined` must have been called."""
    with method.backend():
        model = checkpoint.load(folder, torch.float32)
        sampling = model if method.sampler == torch.float32 else checkpoint.load(folder, method.sampler)
        roller = InProcess(build_engine(config, sampling))
        source = RewardSource.load(config.scenarios, config.source)
        held_out = config.scenarios.of_each(config.eval.scenarios, "held_out", bank)
        temperature = config.rollout.temperature
        before = evaluate(roller, held_out, source, config.seed, temperature).score[""]
        learner = Learner(model, config.rl.optim, config.rl.steps)
        clock = time.perf_counter()
        if method.exact:
            records = [step.metrics for step in loop.steps(config, bank, roller, learner, source, None, 0, {})]
        else:
            records = list(_inexact(method, config, bank, roller, learner, source, sampling))
        wall_s = time.perf_counter() - clock
        after = evaluate(roller, held_out, source, config.seed, temperature).score[""]
        return Result(method.name, records, before, after, wall_s)


def _inexact(
    method: Method,
    config: TrainConfig,
    bank: SpeechBank,
    roller: Roller,
    learner: Learner,
    source: RewardSource,
    sampling: InteractionModel,
) -> Iterator[dict[str, Any]]:
    """`rl.step.loop.steps` without the identity check: records the mismatch, and corrects it by importance weights if
    the method has them."""
    classes, micro_batch = Vocabulary.of(learner.model).classes, config.rl.micro_batch
    scales: Scales = {}
    for step in range(config.rl.steps):
        episodes = roller.play(loop.plays(config, bank, step), config.seed)
        judged = source.judge(episodes)
        credit = token_weights(episodes, judged.acting, [], config.rl, scales)
        weights, scales = credit.weights, credit.scales
        extra: dict[str, float] = {}
        if method.weights:
            ratio = ratios(learner.model, episodes, micro_batch)
            weights = truncated(weights, ratio)
            every = torch.cat(ratio)
            extra = {
                RATIO_MEAN: float(every.mean()),
                RATIO_MAX: float(every.max()),
                TRUNCATED: float((every > CAP).float().mean()),
            }
        g = gradient_of(learner.model, episodes, weights, classes, config.rollout.temperature, micro_batch)
        mismatch = compare(concatenate(episodes, "logprob"), g.logprob, concatenate(episodes, "digest"), g.digest)
        norm = learner.step(g)
        if sampling is not learner.model:
            sampling.load_state_dict(learner.model.state_dict())
            sampling.mark_changed()
        roller.publish()
        yield {"step": step, **loop.rewards(judged), **mismatch.metrics(), **extra, "policy/grad_norm": norm}


@torch.no_grad()
def ratios(model: InteractionModel, episodes: Sequence[Episode], micro_batch: int) -> list[Tensor]:
    """p_learner / p_sampler of every sampled token, fp32 [N_e] an episode, from a forward pass of the learner."""
    classes, parts = Vocabulary.of(model).classes, []
    for first in range(0, len(episodes), micro_batch):
        some = episodes[first : first + micro_batch]
        logprob, _, _ = choice_logprobs(model, collate(some, model.senses), classes, some[0].temperature)
        parts.append((logprob.cpu() - concatenate(some, "logprob")).exp())
    return list(torch.cat(parts).split([len(e.text.chunk) for e in episodes]))


def truncated(weights: Sequence[Tensor], ratio: Sequence[Tensor]) -> list[Tensor]:
    """advantage * min(ratio, CAP), token by token."""
    return [w * r.clamp(max=CAP) for w, r in zip(weights, ratio, strict=True)]


def finding(results: Sequence[Result]) -> Finding:
    """The verdict on the exact methods. The others are to differ: where they do not, equality shows nothing."""
    exact = {method.name for method in METHODS if method.exact}
    counts = []
    for ours in (True, False):
        records = [x for r in results if (r.method in exact) == ours for x in r.records]
        tokens = sum(x["mismatch/num_tokens"] for x in records)
        counts.append((tokens, sum(x["mismatch/num_unequal"] + x["mismatch/rows_unequal"] for x in records)))
    (tokens, unequal), (others, told) = counts
    return Finding(
        Verdict.of(tokens if told else 0, unequal),
        f"{unequal:,} log-probs and rows of {tokens:,} tokens differ in ours; in the control, the other runs, {told:,} "
        f"of {others:,}" + ("." if told else ", so that nothing here shows that a difference would have been seen."),
    )


def tables(results: Sequence[Result]) -> list[Table]:
    """A table of the runs' results, and one of every step."""
    ends: list[list[Cell]] = []
    curves: list[list[Cell]] = []
    for r in results:
        k3 = [record["mismatch/k3"] for record in r.records]
        tokens = sum(record["mismatch/num_tokens"] for record in r.records)
        unequal = sum(record["mismatch/num_unequal"] for record in r.records)
        last = r.records[-10:]
        score = sum(record["reward/score"] for record in last) / len(last)
        largest = max(record["mismatch/max_abs"] for record in r.records)
        ends.append(
            [r.method, r.before, r.after, score, 100 * unequal / tokens, sum(k3) / len(k3), max(k3), largest, r.wall_s]
        )
        for x in r.records:
            ratio = [x.get(RATIO_MAX, ""), x.get(TRUNCATED, "")]
            columns = ("step", "reward/score", "reward/mean", "mismatch/num_unequal", "mismatch/k3", "mismatch/max_abs")
            curves.append([r.method, *(x[c] for c in columns), *ratio])
    return [
        Table(
            "Naive torch with importance weights beside ours",
            [
                "run", "held-out before", "held-out after", "score, last 10 steps", "tokens unequal, %", "k3, mean",
                "k3, worst step", "max abs", "seconds",
            ],
            ends,
            f"One checkpoint, recipe and seed; {len(results[0].records)} steps. Runs part by chance as soon as one "
            "token differs: one seed says nothing of which way is better. Seconds are of one run after the other.",
        ),
        Table(
            "Reward and mismatch at each step",
            ["run", "step", "score", "reward", "unequal", "k3", "max abs", "largest ratio", "truncated"],
            curves,
            f"Ratios p_learner / p_sampler of tokens, truncated at {CAP:g}, where importance weights are used.",
        ),
    ]  # fmt: skip


def picture(results: Sequence[Result]) -> bytes:
    """PNG: score and k3 by step."""
    from io import BytesIO

    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    exact = []
    for i, r in enumerate(results):
        steps = [x["step"] for x in r.records]
        score = [x["reward/score"] for x in r.records]
        smooth = [sum(score[max(0, s - 4) : s + 1]) / len(score[max(0, s - 4) : s + 1]) for s in range(len(score))]
        left.plot(steps, smooth, color=f"C{i}", label=f"{r.method} (held out {r.before:.2f} → {r.after:.2f})")
        k3 = [x["mismatch/k3"] for x in r.records]
        if any(k3):
            right.plot(steps, k3, color=f"C{i}", label=r.method)
        else:
            exact.append(r.method)
    left.set(xlabel="step", ylabel="score, mean of 5 steps", title="Reward")
    left.legend(fontsize=7)
    right.set(xlabel="step", ylabel="k3, nats a token", yscale="log", title="Sampler against learner")
    title = f"exactly 0 at every step: {', '.join(exact)}" if exact else None
    right.legend(handles=right.get_lines(), fontsize=7, title=title, title_fontsize=7)
    out = BytesIO()
    figure.savefig(out, dpi=120)
    return out.getvalue()


def run(
    folder: Path, out: Path, steps: int, *, evaluated: int = 48, groups: int = 4, rollouts: int = 6
) -> dict[str, Any]:
    """All runs, one after the other; writes out/baseline.json and out/baseline.png after each and returns the former's
    content.

    ``evaluated``: held-out scenarios of each family, before and after; ``groups``, ``rollouts``: of a step."""
    if steps < 1:
        raise MetronomeError(f"--steps is {steps}: give at least 1, or nothing is compared")
    config = TrainConfig(
        rl=RLConfig(steps=steps, groups=groups, rollouts=rollouts), eval=EvalConfig(scenarios=evaluated)
    )
    bank, results = SpeechBank.open(), []
    for method in METHODS:
        results.append(train(method, config, folder, bank))
        print(f"{method.name}: held-out score {results[-1].before:.1%} -> {results[-1].after:.1%}", flush=True)
        content = {"checkpoint": str(folder), "environment": environment(), "tables": plain(tables(results))}
        content |= plain(finding(results))
        write_json(out / "baseline.json", content)
        write_whole(out / "baseline.png", picture(results))
    return content


def parser() -> Parser:
    parser = Parser("rl.study.baseline", (__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of config.json and model.safetensors")
    parser.add_argument("--steps", type=number(int, Range(1, 10**6)), default=30)
    parser.add_argument("--out", type=output_folder(), required=True, help="folder for baseline.json and baseline.png")
    add_device(parser)
    add_fail_on(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    a = parser().parse_args(arguments)
    Placement.enter(PlacementConfig(a.device), "float32")
    with ranks.joined(), locked(a.out):
        content = run(a.checkpoint, a.out, a.steps)
    found = Finding(Verdict(content["verdict"]), content["headline"])
    print(f"Baseline: {found}")
    leave(found.verdict, a.fail_on)
