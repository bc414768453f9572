"""The command ``metronome``: the program's commands by short names, the same as their ``python -m`` forms.

    metronome train --config quickstart --rl.steps 20

The module of a verb gets its arguments unchanged; other verbs' modules are not imported. ``train`` and ``reward-train``
start their processes by ``accelerate launch`` with the shipped configuration, or with that of ``--launch FILE`` before
the verb. They start none under a launcher (RANK is set), nor, without ``--launch``, for a recipe whose placement.device
is cuda: one process takes one GPU.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Verb:
    """One command of ``metronome``."""

    module: str
    line: str  # for --help
    launcher: str | None = None  # shipped configuration of accelerate


VERBS = {
    "train": Verb("rl.train", "warm start, reinforcement learning, held-out verdict, audit", "accelerate/cpu"),
    "audit": Verb("rl.audit", "is a run's sampler its learner? are two runs one? what is a checkpoint invariant to?"),
    "show": Verb("rollout.show", "print a saved episode chunk by chunk"),
    "listen": Verb("rollout.listen", "render a saved episode as sound, both sides"),
    "fingerprint": Verb("rl.fingerprint", "one digest a stage, to find where two machines part"),
    "reward-pairs": Verb("reward.pairs", "make preference pairs for reward models"),
    "reward-train": Verb("reward.train", "train a reward model on pairs", "accelerate/reward"),
    "reward-evaluate": Verb("reward.evaluate", "how good reward models are"),
    "reward-hacks": Verb("reward.hacks", "what rewards pay policies that want to be paid for nothing"),
    "best-of-n": Verb("rl.bestofn", "how far a learned reward can be optimised without training"),
    "understood": Verb("rl.study.understood", "how well the words that a run's policies say aloud are understood"),
    "baseline": Verb("rl.study.baseline", "train beside naive torch with importance weights"),
    "bench": Verb("rollout.bench", "speed of decoding and serving"),
    "kernel-bench": Verb("kernels.tools.bench", "speed of the kernels beside torch's"),
    "compile-report": Verb("kernels.tools.compile_report", "compile the Triton kernels for four GPUs and check them"),
    "traffic": Verb("rl.study.traffic", "bytes that cross the network in a step on many machines"),
    "push": Verb("rl.push", "send a checkpoint and its model card to the Hugging Face hub"),
    "info": Verb("model.info", "a model's numbers and their sources, its parameters, and the memory of a run"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb. Raises SystemExit with the verb's status, or with 2 for an unknown verb."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    launcher = None
    if given[:1] == ["--launch"] and len(given) > 1:
        launcher, given = given[1], given[2:]
    if not given or given[0] in ("-h", "--help", "help"):
        if arguments is None:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
        print(usage())
        return
    name, *rest = given
    verb = VERBS.get(name)
    if verb is None:
        fail(f"no verb {name!r}; choose one of {', '.join(VERBS)}")
    if launcher is not None and verb.launcher is None:
        fail(f"--launch: {name} runs in one process; train and reward-train are launched")
    if verb.launcher is not None and "RANK" not in os.environ and not {"-h", "--help"} & set(rest):
        if launcher is not None or not on_gpu(rest):
            launch(verb, launcher, rest)
    # As ``python -m`` has it, so that a family or reward of one's own in this folder is found; at the end, so that
    # nothing in it hides a package of ours.
    sys.path.append(os.getcwd())
    sys.argv = [f"metronome {name}", *rest]
    runpy.run_module(verb.module, run_name="__main__", alter_sys=True)


def on_gpu(rest: Sequence[str]) -> bool:
    from model.program.recipe import names_gpu  # only here: it is slow to import

    return names_gpu(rest)


def launch(verb: Verb, config: str | None, rest: Sequence[str]) -> NoReturn:
    """Replaces this process by ``accelerate launch`` of the verb; ``config``: accelerate's configuration file."""
    from model.program.shipped import resolve

    path = resolve(config or str(verb.launcher))
    if not os.path.isfile(path):
        fail(f"--launch {config}: there is no such file; name one of accelerate's configurations, or leave it out")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", path]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "-m", verb.module, *rest])


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.line}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: metronome [--launch FILE] VERB [ARGUMENTS]",
            "",
            *lines,
            "",
            "`metronome VERB --help` lists a verb's arguments. --launch FILE: accelerate's configuration for train and",
            "reward-train, instead of the shipped one (two processes on this machine's CPU; one for reward-train, and",
            "on a GPU: --launch accelerate/gpus takes more).",
        ]
    )


def fail(message: str) -> NoReturn:
    print(f"error: {message}. `metronome --help` lists the verbs", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
