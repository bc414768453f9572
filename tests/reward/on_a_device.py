"""The reward commands, one after another, on the CPU or on the pretend GPU, in a process of their own:

    python -m tests.reward.on_a_device cpu|cuda FOLDER

``FOLDER`` has what `inputs` made. Results are written there: the run ``trained``, report.json and hacks.json of its
model, its scores, the pairs ``made``, and on the pretend GPU what the controls gave (`Controls`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels import dispatch
from model.weights import checkpoint
from reward.learned.model import RewardModel
from reward.learned.preference import save_preferences
from reward.learned.trainable import Trainable
from tests.reward.test_evaluate import pairs as held_out
from tests.reward.test_trainable import AXES, COLLATOR, pairs
from tests.support.models import conversation, fresh_model
from tests.support.pretend.device import DEVICE, ledger
from tests.support.pretend.ops import PretendBackend
from tests.support.pretend.run import be_the_gpu

SPOILT = "linear"


@dataclass(frozen=True)
class Controls:
    """What must not be as on the CPU."""

    copies: int  # to the device
    mixed: str  # the error of a batch that was left on the CPU
    spoilt: str  # the weights' digest of a training whose products have a wrong last bit


def inputs(folder: Path) -> None:
    """A backbone, which is the policy, too, and pairs. Two held-out ones would have a conversation of the others."""
    checkpoint.save(fresh_model("nano"), folder / "policy")
    save_preferences(folder / "pairs", {"train": pairs(count=20), "held_out": held_out(14)[2:]})


def training(device: str, folder: Path, name: str) -> list[str]:
    """Arguments of `reward.train`."""
    settings = "{max_steps: 3, save_steps: 2, per_device_train_batch_size: 4, center_rewards_coefficient: 0.01}"
    return [
        f"--name={name}", f"--runs={folder}", f"--axes=[{', '.join(AXES)}]", f"--pairs={folder / 'pairs'}",
        f"--backbone.checkpoint={folder / 'policy'}", f"--trainer={settings}", f"--placement.device={device}",
    ]  # fmt: skip


def scores(model: RewardModel) -> dict[str, Tensor]:
    """Of four conversations, by number."""
    return {str(i): x for i, x in enumerate(model.score([conversation(i, 4 + i) for i in range(4)]))}


def main(device: str, folder: Path) -> None:
    if device == "cuda":
        be_the_gpu()
    from reward import evaluate, hacks, train
    from reward import pairs as make_pairs

    train.main(training(device, folder, "trained"))
    trained = folder / "trained/model"
    models, place = f"--models=[{trained}]", f"--placement.device={device}"
    save_file({name: x.contiguous() for name, x in scores(RewardModel.load(trained)).items()}, folder / "scores")
    hacks.main([models, place, f"--json={folder / 'hacks.json'}", "--scenarios=1"])
    evaluate.main(
        [models, place, f"--json={folder / 'report.json'}", f"--pairs={folder / 'pairs'}", "--unseen.scenarios=1",
         f"--unseen.policy.checkpoint={folder / 'policy'}"]
    )  # fmt: skip
    rollouts = f"{{policies: [{{checkpoint: {folder / 'policy'}}}], train_groups: 1, held_out_groups: 1, rollouts: 2}}"
    make_pairs.main(
        [place, f"--out={folder / 'made'}", f"--rollouts={rollouts}", "--corruptions.train_scenarios=0",
         "--corruptions.held_out_scenarios=0"]
    )  # fmt: skip
    if device == "cuda":
        (folder / "controls.json").write_text(json.dumps(asdict(controls(folder, RewardModel.load(trained)))))


def controls(folder: Path, model: RewardModel) -> Controls:
    """On the pretend GPU, after the commands."""
    from reward import train

    assert model.heads.weight.device == torch.device(f"{DEVICE}:0") and ledger.copies
    copies, mixed = ledger.copies, "nothing"
    try:
        Trainable(model)(**COLLATOR.batch(pairs()))  # a trainer moves its tensors to the device
    except RuntimeError as error:
        mixed = str(error)
    dispatch._load = lambda name: PretendBackend(frozenset({SPOILT}))  # type: ignore[assignment,return-value]
    train.main(training("cuda", folder, "spoilt"))
    return Controls(copies, mixed, json.loads((folder / "spoilt/summary.json").read_text())["weights_digest"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
