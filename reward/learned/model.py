"""Learned reward models: the interaction backbone with one linear head for each axis of reward.

The head gives every chunk a reward, read from the hidden state of the chunk's last row: after the mode, words and end
token, so that the action is known, and by causality nothing later. An episode's score is the sum of its chunks' rewards
in ascending order (the segment reward of Christiano et al. 2017, arXiv 1706.03741): preferences between whole episodes
teach rewards of chunks, which reinforcement learning can use as they are. An event's score is that of its chunk.

Everything runs through `kernels.ops`, so the bits of an episode's rewards do not depend on what is scored beside it, in
which order, or on the number of threads. A model is its weights: it is loaded where the process computes (CPU or GPU),
whatever device it was trained on, and scores under that process' contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kernels import ops
from kernels.errors import MetronomeError
from kernels.layout import PackedLinear
from model.backbone.embed import Weight
from model.backbone.transformer import InteractionModel
from model.inputs import Conversation, Inputs
from model.program.exhausted import needing
from model.program.files import whole_folder, write_json, write_whole
from model.program.ranges import Range
from model.program.reading import UnreadableError, read_record, read_text
from model.weights import checkpoint, manifest, packs
from model.weights.card import CARD
from model.weights.finite import NotFiniteError, check_finite
from model.weights.tensors import read_tensors
from reward.learned.prefixes import last_hidden
from rollout.turn.grammar import chunk_ends

BACKBONE, HEAD, DESCRIPTION = "backbone", "head.safetensors", "reward.json"
HEAD_WEIGHT = "heads.weight"
EPISODES_PER_PASS = 24
"""How many episodes `RewardModel.score` reads in one pass: several groups of rollouts, whose shared beginnings are then
read once; more would cost memory and gain no speed."""


@dataclass(frozen=True)
class Description:
    """What reward.json says."""

    axes: tuple[str, ...]
    temperature: dict[str, Annotated[float, Range(0, 1e9, open_low=True)]]  # of each axis
    origin: dict[str, str] = field(default_factory=dict)  # "pairs", "backbone", "recipe" -> digest


def check_silent(model: InteractionModel, name: str) -> None:
    """Raises MetronomeError for a model that speaks with sound of its own: a reward model hears the user alone."""
    if model.voice_head is not None:
        raise MetronomeError(
            f"{name} has a voice, and reward models do not hear it: name a model without one, or learn from the rules "
            "(source.rewards rules), to which source.listener adds what is understood"
        )


class RewardModel(nn.Module):
    """A backbone with one head for each of ``axes``, such as ("timing",) or ("timing", "content"). Made by `build` or
    `load`; `score` gives rewards."""

    def __init__(self, backbone: InteractionModel, axes: Sequence[str]) -> None:
        """Allocates the heads' weights without setting them; raises MetronomeError unless the axes are names, distinct
        and at least one."""
        super().__init__()
        self.axes = tuple(axes)
        if not self.axes or len(set(self.axes)) != len(self.axes):
            raise MetronomeError(f"a reward model needs at least one axis, and each once, not {list(axes)}")
        if wrong := next((axis for axis in self.axes if not axis.isidentifier()), None):
            raise MetronomeError(f"{wrong!r} cannot be the name of an axis; use letters, digits and '_'")
        self.temperature = dict.fromkeys(self.axes, 1.0)  # P(a preferred to b) = sigmoid((a - b) / temperature)
        self.origin: dict[str, str] = {}  # digests of what it was made from (`Description`)
        self.card = ""  # text of its model card (`model.weights.card`)
        self.name = f"reward model of {' and '.join(self.axes)}"  # for messages
        self.backbone = backbone
        backbone.lm_head.requires_grad_(False)  # unused, but kept so that the folder is an ordinary checkpoint
        self.heads = Weight(len(self.axes), backbone.config.text_config.hidden_size, dtype=backbone.dtype)
        self.heads.to(backbone.device)
        self.packed: PackedLinear | None = None  # of the heads

    @staticmethod
    def build(backbone: InteractionModel, axes: Sequence[str]) -> RewardModel:
        """A model before training: heads are 0, so every reward is 0 and the first gradient reaches only the heads."""
        model = RewardModel(backbone, axes)
        nn.init.zeros_(model.heads.weight)
        model.pack()
        return model

    def pack(self) -> None:
        """Lays out copies of all weights as the kernels read them; needed once before the first forward."""
        self.backbone.pack()
        self.packed = ops.pack_linear(self.heads.weight)
        packs.mark_current(self, self.backbone.generation)  # one count of changes for all

    def repack(self) -> None:
        """Refreshes the packed copies from the parameters; needed after each update, as in `InteractionModel`. Raises
        RuntimeError before the first `pack`."""
        if self.packed is None:
            raise RuntimeError("RewardModel.repack: nothing is packed yet; call pack() first")
        with torch.no_grad():
            self.backbone.repack()
            ops.repack(self.packed)

    def forward(self, conversations: Sequence[Conversation]) -> list[Tensor]:
        """Each chunk's rewards, fp32 [chunks, axes] for each conversation, on the model's device and under autograd;
        all in one pass."""
        packed = self._ready()
        _check_contexts(conversations)
        inputs = Inputs.cat(conversations, self.backbone.senses)
        ends = [chunk_ends(c.tokens, self.backbone.senses.audio) for c in conversations]
        with ops.deferred():  # the host waits once, at the end of the block
            hidden = self.backbone(inputs)
            at = torch.cat([e + s for e, s in zip(ends, inputs.starts, strict=True)])
            rewards = ops.linear(hidden[at.to(hidden.device, non_blocking=True)], packed, torch.float32)
        return list(rewards.split([len(e) for e in ends]))

    @needing("scoring by a reward model", "take one of a smaller backbone, or fewer of them (source.models)")
    @torch.inference_mode()
    def score(self, episodes: Sequence[Conversation]) -> list[Tensor]:
        """Each chunk's rewards, fp32 [chunks, axes] for each `Episode` or `Transcript`, on the CPU, with the bits of
        `forward`.
        Beginnings that episodes share are read once (`reward.learned.prefixes`). Raises NotFiniteError for rewards that
        are not finite, so that nothing is ever compared with them."""
        packed = self._ready()
        _check_contexts(episodes)
        out: list[Tensor] = []
        for first in range(0, len(episodes), EPISODES_PER_PASS):
            with ops.deferred():  # the host waits once, in fetch
                hidden = last_hidden(self.backbone, episodes[first : first + EPISODES_PER_PASS])
                (rewards,) = ops.fetch(ops.linear(torch.cat(hidden), packed, torch.float32))
            if not bool(torch.isfinite(rewards).all()):
                raise NotFiniteError(f"{self.name}: it gives rewards that are not finite; train it anew")
            out += rewards.split([len(rows) for rows in hidden])
        return out

    def _ready(self) -> PackedLinear:
        if self.packed is None:
            raise RuntimeError("RewardModel: weights are not packed; call pack() before the first forward")
        return self.packed

    def save(self, folder: Path | str) -> None:
        """Writes the model to ``folder``, whole or not at all (`write`)."""
        with whole_folder(Path(folder)) as temporary:
            self.write(temporary, Path(folder).name)

    def write(self, folder: Path, name: str) -> None:
        """Writes the model's files into an empty folder, which will be called ``name``: the backbone in transformers'
        format beside the head, and a manifest of all files. Raises NotFiniteError for weights that are not finite."""
        check_finite(self.name, self.state_dict().items(), "nothing was saved")
        checkpoint.save(self.backbone, folder / BACKBONE)
        save_file({HEAD_WEIGHT: self.heads.weight.detach().cpu().contiguous()}, folder / HEAD)
        write_json(folder / DESCRIPTION, asdict(Description(self.axes, self.temperature, self.origin)))
        if self.card:
            write_whole(folder / CARD, self.card.encode())
        manifest.write(folder, name)

    @staticmethod
    def load(folder: Path | str) -> RewardModel:
        """Raises MetronomeError when ``folder`` holds no reward model, a damaged one, or one with weights that are not
        finite."""
        folder = Path(folder)
        if (folder / DESCRIPTION).exists() or (folder / manifest.MANIFEST).exists():
            manifest.check(folder, what="reward model")
        try:
            description = read_record(folder / DESCRIPTION, Description)
            model = RewardModel(checkpoint.load(folder / BACKBONE), description.axes)
            model.card = read_text(folder / CARD) if (folder / CARD).exists() else ""
        except (MetronomeError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            problem = f"{DESCRIPTION} {error.problem}" if isinstance(error, UnreadableError) else str(error)
            raise MetronomeError(
                f"{folder}: cannot be read as a reward model ({problem}). Name a folder that `reward.train` wrote"
            ) from error
        model.name = f"reward model {folder}"
        with torch.no_grad():
            model.heads.weight.copy_(_head(folder, model.heads.weight))
        model.temperature, model.origin = _temperature(folder, description), description.origin
        model.pack()
        return model


def _head(folder: Path, like: Tensor) -> Tensor:
    """The stored heads' weights; raises MetronomeError unless they are one tensor of the shape and type of ``like``
    whose values are finite. (`Tensor.copy_` would spread a single row over all axes.)"""
    path = folder / HEAD
    try:
        stored = read_tensors(path)
    except UnreadableError as error:
        raise MetronomeError(f"{error}; copy the reward model again") from None
    found = ", ".join(_form(name, tensor) for name, tensor in stored.items())
    if found != (wanted := _form(HEAD_WEIGHT, like)):
        raise MetronomeError(
            f"{path}: holds {found or 'nothing'}, but its axes and its backbone's width need {wanted} alone; name "
            "another reward model"
        )
    check_finite(f"reward model {folder}", stored.items(), "train it anew")
    return stored[HEAD_WEIGHT]


def _form(name: str, tensor: Tensor) -> str:
    return f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _temperature(folder: Path, description: Description) -> dict[str, float]:
    """The temperature of each axis, in the order of axes; raises MetronomeError unless each has one."""
    found = description.temperature
    if found.keys() != set(description.axes):
        raise MetronomeError(
            f"{folder / DESCRIPTION}: has temperatures of {', '.join(found) or 'nothing'}, but axes "
            f"{', '.join(description.axes)}; evaluate the reward model anew"
        )
    return {axis: found[axis] for axis in description.axes}


def episode_scores(rewards: Sequence[Tensor]) -> Tensor:
    """Each episode's score, the sum of its chunks' rewards in ascending order: fp32 [chunks, axes] for each episode ->
    fp32 [episodes, axes]."""
    return sum_in_order(nn.utils.rnn.pad_sequence(list(rewards), batch_first=True))


def sum_in_order(rewards: Tensor) -> Tensor:
    """The sum over axis 1, added one by one from its start: [S, N, …] -> [S, …]. torch's own sum chooses an order by
    the tensor's shape; here padding with zeros at the end changes no bit."""
    total = rewards[:, 0]
    for k in range(1, rewards.shape[1]):
        total = total + rewards[:, k]
    return total


def _check_contexts(conversations: Sequence[Conversation]) -> None:
    """Raises MetronomeError for a conversation that a policy has summarised on the way."""
    if any(len(c.contexts) > 1 for c in conversations):
        raise MetronomeError(
            "a learned reward model reads a conversation as one sequence, and this one was summarised on the way: "
            "take the rules (source), or rollout.context.policy stop or window"
        )
