"""Learned reward models: the interaction backbone with one linear head for each axis of reward.

The head gives every chunk a reward, read from the hidden state of the chunk's last row: after the mode, words and end
token, so that the action is known, and by causality nothing later. An episode's score is the sum of its chunks' rewards
in ascending order (the segment reward of Christiano et al. 2017, arXiv 1706.03741): preferences between whole episodes
teach rewards of chunks, which reinforcement learning can use as they are. An event's score is that of its chunk.

Everything runs through `kernels.ops`, so the bits of an episode's rewards do not depend on what is scored beside it, in
which order, or on the number of threads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernels import ops
from kernels.errors import MetronomeError
from kernels.layout import PackedLinear
from model.backbone.embed import Weight
from model.backbone.transformer import InteractionModel
from model.inputs import Conversation, Inputs
from model.program.files import whole_folder
from model.weights import checkpoint, manifest, packs
from reward.learned.prefixes import last_hidden
from rollout.turn.grammar import chunk_ends

BACKBONE, HEAD, DESCRIPTION = "backbone", "head.safetensors", "reward.json"
SCORED_TOGETHER = 24
"""Episodes that `RewardModel.score` reads at once: enough to fill the kernels and to hold whole groups of rollouts,
little enough memory."""


class RewardModel(nn.Module):
    """Use: `build` or `load`, then `score`. ``axes``: ("timing",), or several, the shared form of many heads."""

    def __init__(self, backbone: InteractionModel, axes: Sequence[str]) -> None:
        """Weights of the head are allocated, not set."""
        super().__init__()
        self.axes = tuple(axes)
        if not self.axes or len(set(self.axes)) != len(self.axes):
            raise MetronomeError(f"a reward model needs at least one axis, and each once, not {list(axes)}")
        self.temperature = dict.fromkeys(self.axes, 1.0)  # of a difference of scores, set by calibration
        self.backbone = backbone
        backbone.lm_head.requires_grad_(False)  # rides along, so that the folder stays an ordinary checkpoint
        self.heads = Weight(len(self.axes), backbone.config.text_config.hidden_size, dtype=backbone.dtype)
        self.packed: PackedLinear | None = None  # of the heads

    @staticmethod
    def build(backbone: InteractionModel, axes: Sequence[str]) -> RewardModel:
        """A model whose every reward is 0 before training (heads are zero, so the first gradient is theirs alone)."""
        model = RewardModel(backbone, axes)
        nn.init.zeros_(model.heads.weight)
        model.pack()
        return model

    def pack(self) -> None:
        self.backbone.pack()
        self.packed = ops.pack_linear(self.heads.weight)
        packs.mark_current(self, self.backbone.generation)  # one count of changes for all

    def repack(self) -> None:
        """Takes over the parameters' current values; needed after each update, as in `InteractionModel`."""
        if self.packed is None:
            raise RuntimeError("RewardModel.repack: nothing is packed yet; call pack() first")
        with torch.no_grad():
            self.backbone.repack()
            ops.repack(self.packed)

    def forward(self, conversations: Sequence[Conversation]) -> list[Tensor]:
        """Per conversation fp32 [chunks, axes], under autograd; all in one pass."""
        packed = self._ready()
        inputs = Inputs.cat(conversations, self.backbone.audio_token_id)
        ends = [chunk_ends(c.tokens, self.backbone.audio_token_id) for c in conversations]
        hidden = self.backbone(inputs)
        at = torch.cat([e + s for e, s in zip(ends, inputs.starts, strict=True)])
        return list(ops.linear(hidden[at], packed, torch.float32).split([len(e) for e in ends]))

    @torch.inference_mode()
    def score(self, episodes: Sequence[Conversation]) -> list[Tensor]:
        """The reward of each chunk, fp32 [chunks, axes] for every `Episode` or `Transcript`: the bits of `forward`.
        What neighbours share from their beginning on is read once."""
        packed = self._ready()
        out: list[Tensor] = []
        for first in range(0, len(episodes), SCORED_TOGETHER):
            hidden = last_hidden(self.backbone, episodes[first : first + SCORED_TOGETHER])
            rewards = ops.linear(torch.cat(hidden), packed, torch.float32)
            out += rewards.split([len(rows) for rows in hidden])
        return out

    def _ready(self) -> PackedLinear:
        if self.packed is None:
            raise RuntimeError("RewardModel: weights are not packed; call pack() before the first forward")
        return self.packed

    def save(self, folder: Path | str) -> None:
        """Writes the model to ``folder``, whole or not at all: the backbone in transformers' format beside the head,
        and a manifest of all files."""
        with whole_folder(Path(folder)) as temporary:
            checkpoint.save(self.backbone, temporary / BACKBONE)
            save_file({"heads.weight": self.heads.weight.detach().contiguous()}, temporary / HEAD)
            description = {"axes": self.axes, "temperature": self.temperature}
            (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            manifest.write(temporary, Path(folder).name)

    @staticmethod
    def load(folder: Path | str) -> RewardModel:
        """Raises MetronomeError when ``folder`` holds no reward model or a damaged one."""
        folder = Path(folder)
        if (folder / DESCRIPTION).exists() or (folder / manifest.MANIFEST).exists():
            manifest.check(folder)
        try:
            description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            model = RewardModel(checkpoint.load(folder / BACKBONE), description["axes"])
            stored = load_file(folder / HEAD)["heads.weight"]
            with torch.no_grad():
                model.heads.weight.copy_(stored)
            model.temperature = {axis: float(description["temperature"][axis]) for axis in model.axes}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise MetronomeError(
                f"{folder}: cannot be read as a reward model ({error}). Name a folder that `reward.train` wrote"
            ) from error
        model.pack()
        return model


def episode_scores(rewards: Sequence[Tensor]) -> Tensor:
    """The sums over chunks in ascending order; per episode fp32 [chunks, axes] -> fp32 [episodes, axes]."""
    return sum_in_order(nn.utils.rnn.pad_sequence(list(rewards), batch_first=True))


def sum_in_order(rewards: Tensor) -> Tensor:
    """Over axis 1, from its start; [S, N, …] -> [S, …]. Added one by one: torch's own sum would choose an order by the
    tensor's shape, while zeros at a row's end (padding) change nothing here."""
    total = rewards[:, 0]
    for k in range(1, rewards.shape[1]):
        total = total + rewards[:, k]
    return total
