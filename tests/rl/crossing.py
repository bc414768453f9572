"""What `tests.rl.test_crossing` has done on the pretend GPU, in one process:

    python -m tests.support.pretend.run tests.rl.crossing RUNS

RUNS holds ``cpu``, a whole run of the CPU. A run is made on the device, ``gpu``; then the CPU's is resumed, audited,
compared and gone on from there. What was found is written to RUNS/found.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kernels import dispatch
from kernels.errors import MetronomeError
from kernels.reference import backend as reference
from model.placement import Placement, PlacementConfig
from model.program import ranks
from model.weights import checkpoint
from rl import fingerprint
from rl.audit.compare import compare_runs
from rl.audit.document import plain
from rl.audit.report import audit
from rl.config import TrainConfig
from rl.learner.deepspeed import Learner
from rollout.seeds import token_key
from rollout.world.speech import SpeechBank
from tests.rl.resuming import content, cut, go
from tests.support.pretend.device import ledger


def equals() -> tuple[dict[str, str], dict[str, int]]:
    """(digests of what is equal on every device, made here; what that which the host makes has asked of a device)"""
    stages, found = fingerprint.stages(), {}
    ledger.clear()
    with patch.object(fingerprint, "DEMONSTRATIONS", 4):
        for name, arrays in stages:
            found[name] = fingerprint._digest(arrays)
            if name == "dMel codes":  # the last that needs no model
                break
    config, bank = TrainConfig(), SpeechBank.open()
    for split in ("train", "held_out"):
        of_each = config.scenarios.of_each(2, split, bank)
        found[f"scenarios, {split}"] = fingerprint._digest(f"{s.id} {s.chunks} {s.seed}" for s in of_each)
    keys = torch.tensor([token_key(*at) for at in product((0, 7, 2**63), (0, 3), (1, 2000))])
    found["keys of the noise"] = fingerprint._digest([keys])
    asked = ledger.totals()
    found["its random bits"] = fingerprint._digest([words(keys.to(dispatch.device()), 300)])
    name, arrays = next(stages)
    return found | {name: fingerprint._digest(arrays)}, asked


def words(keys: Tensor, vocabulary: int) -> Tensor:
    """int64 [T] -> int64 [T, V], the random bits that noise is made of (`kernels.ops.sample`)."""
    counter = torch.arange(1, vocabulary + 1).to(keys.device) * (reference.GOLDEN - 2**64)
    return reference._mix(keys[:, None] + counter)


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def carried(run: Path, to: Path) -> str:
    """Reads weights and optimizer of the run's last checkpoint into the device and writes them to ``to``; returns the
    digest that the weights have there."""
    path = last_checkpoint(run)
    model = checkpoint.load(path / "model")
    assert {p.device.type for p in model.parameters()} == {dispatch.device().type}
    learner = Learner(model, TrainConfig().rl.optim, 3)
    learner.load(path)
    learner.save(to)
    checkpoint.save(model, to / "model")
    return checkpoint.weights_digest(model)


def elsewhere(runs: Path, run: str, device: str) -> dict[str, Any]:
    """What comes of a run of the other device on this one."""
    copied, again = runs / f"cut_{run}", runs / f"from_{run}"
    shutil.copytree(runs / run, copied)
    cut(copied, 2)
    before, refused = content(copied), ""
    try:
        go(runs, copied.name, placement__device=device)
    except MetronomeError as error:
        refused = str(error)
    assert content(copied) == before
    start = last_checkpoint(runs / run) / "model"
    go(
        runs,
        again.name,
        resume=False,
        placement__device=device,
        warmstart__steps=0,
        rl__steps=1,
        model__checkpoint=start,
    )
    return {
        "carried": carried(runs / run, runs / f"carried_{run}"),
        "refused": refused,
        "audit": plain(audit(runs / run)),
        "compared": plain(compare_runs(runs / "gpu", runs / "cpu", runs / f"compare_{run}")),
        "begun": checkpoint.weights_digest(checkpoint.load(again / "checkpoints/step_000000/model")),
        "ended": plain(audit(again)),
    }


def main() -> None:
    runs = Path(sys.argv[1])
    Placement.enter(PlacementConfig("cuda"), "float32")
    with ranks.joined():
        equal, asked = equals()
        go(runs, "gpu", resume=False, placement__device="cuda")
        found = {"equal": equal, "asked": asked, "elsewhere": elsewhere(runs, "cpu", "cuda")}
    (runs / "found.json").write_text(json.dumps(found))
