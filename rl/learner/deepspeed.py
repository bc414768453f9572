"""The DeepSpeed learner: exact policy-gradient sums in, one optimizer step out.

Gradients are computed here, episode batch by episode batch, in a fixed order of summation, and handed to DeepSpeed
through a loss whose gradient they are. So what a step applies does not depend on DeepSpeed's bucket
sizes or hooks, and the identity check can run between gradient and step. DeepSpeed adds what the ranks hand over; the
first one hands over G and the others nothing, which gives back G exactly for any number of ranks, where a mean of equal
values would not ((g + g + g) / 3 is not always g).

Weights that are not all fp32 have fp32 masters: DeepSpeed moves the masters, and the model's weights are the masters
rounded. Left out on purpose: importance ratios and clipping of them (the ratio is 1 by the identity check) and any
second step on the same episodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kernels import ops
from kernels.adamw import MOMENTS, AdamW
from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.program import ranks
from model.program.exhausted import needing
from model.program.files import write_json
from model.program.ranges import Range
from model.program.reading import UnreadableError, read_record
from model.program.startup import import_deepspeed
from model.weights.checkpoint import weights_digest
from model.weights.finite import NotFiniteError, check_finite
from model.weights.tensors import read_tensors
from rl.config import OptimConfig
from rl.step import tree
from rl.step.gradient import Gradient

FOLDER, OPTIMIZER, STATE = "learner", "optimizer.safetensors", "state.json"
"""In a checkpoint folder: what of the optimizer's state is a tensor, by parameter, and the rest. Data only; nothing
that is read back is code."""

_LESS = "take a smaller model (model.preset), or more processes, which share its state (rl.optim.zero_stage)"


@dataclass(frozen=True)
class _State:
    taken: Annotated[int, Range(0, 10**9)]  # steps
    weights_digest: str


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up over warmup_steps, then linear decay to final_lr * lr at the last step."""
    warm = min(1.0, (step + 1) / max(optim.warmup_steps, 1))
    decay = 1.0 - (1.0 - optim.final_lr) * step / max(steps - 1, 1)
    return optim.lr * warm * decay


class _Handover(torch.autograd.Function):
    """A loss whose gradient is given: sum_i <parameter_i, gradient_i>. Nobody needs its value, and none is computed."""

    @staticmethod
    def forward(ctx, gradients, *parameters):  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, scale):  # type: ignore[no-untyped-def]
        return None, *(g * scale for g in ctx.gradients)


class Learner:
    """Owns the DeepSpeed engine of one phase (optimizer state and schedule); the model stays the caller's.

    `deepspeed.initialize` moves parameters into one flat buffer, so weights packed before are refreshed here."""

    @needing("making the optimizer", _LESS)
    def __init__(self, model: InteractionModel, optim: OptimConfig, steps: int) -> None:
        model.need_weights("training")
        self.model = model
        self.optim = optim
        self.steps = steps
        self.taken = 0
        learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in learned]
        self._weights = [p for _, p in learned]
        self._masters = self._weights
        module: nn.Module = model
        if any(p.dtype != torch.float32 for p in self._weights):
            self._masters = [nn.Parameter(p.detach().float().clone()) for p in self._weights]
            module = nn.ParameterList(self._masters)
        decayed = [p for p in self._masters if p.ndim >= 2]
        plain = [p for p in self._masters if p.ndim < 2]
        self._adamw = AdamW(
            [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=optim.lr,
            beta1=optim.beta1,
            beta2=optim.beta2,
        )
        with ranks.rank_for_deepspeed():
            self.engine, _, _, _ = import_deepspeed().initialize(
                model=module,
                optimizer=self._adamw,
                config={
                    "train_batch_size": ranks.world(),
                    "train_micro_batch_size_per_gpu": 1,
                    "gradient_accumulation_steps": 1,
                    "gradient_allreduce_op": "sum",
                    "zero_optimization": {"stage": optim.zero_stage},
                    "zero_force_ds_cpu_optimizer": False,
                    "zero_allow_untested_optimizer": True,
                    "gradient_clipping": 0.0,  # clipped here, on the summed gradient, in one order
                },
            )
        if self.engine.gradient_average:
            raise RuntimeError("DeepSpeed takes a mean over ranks although gradient_allreduce_op is sum")
        model.repack()

    @needing("the optimizer's step", _LESS)
    def step(self, gradient: Gradient) -> float:
        """Applies one step of the sum of all ranks' gradients and refreshes the packed weights; returns the sum's norm
        before clipping.

        Every rank adds the ranks' gradients in one order (`rl.step.tree`), so all hold the same bits. Raises
        MetronomeError, with the weights as they were, when the sum is not finite."""
        total = tree.over_ranks(torch.cat([g.flatten() for g in gradient.parameters]))
        parts = total.split([p.numel() for p in self._masters])
        pieces = tuple(part.view(p.shape) for part, p in zip(parts, self._masters, strict=True))
        norm = math.sqrt(float(ops.dot(total, total)))
        if not math.isfinite(norm):
            self._refuse(pieces)
        if self.optim.clip_norm and norm > self.optim.clip_norm:
            total *= self.optim.clip_norm / norm
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate(self.optim, self.taken, self.steps)
        if ranks.rank() > 0:
            total.fill_(-0.0)  # the number that changes no other by being added, not even +0 or -0
        self.engine.backward(_Handover.apply(pieces, *self._masters))
        self.engine.step()
        self.taken += 1
        self._publish()
        return norm

    def _refuse(self, pieces: Sequence[Tensor]) -> None:
        names = [name for name, g in zip(self._names, pieces, strict=True) if not torch.isfinite(g).all()]
        where = (
            f"that of {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else "its norm"
        )
        raise MetronomeError(
            f"the gradient of step {self.taken} is not finite ({where}); no step was taken. Lower the learning rate, "
            "or resume from an earlier checkpoint."
        )

    @torch.no_grad()
    def _publish(self) -> None:
        """Brings the model's weights and their packed copies up to the masters."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight is not master:
                weight.copy_(master)
        self.model.mark_changed()
        self.model.repack()

    def save(self, folder: Path) -> None:
        """Writes optimizer state and step count into ``folder``, one file for any number of ranks. Every rank must call
        it. The weights are the caller's to save beside it; here are only masters that they do not hold."""
        tensors = {
            f"{moment}.{name}": self._gathered(master, moment)
            for name, master in zip(self._names, self._masters, strict=True)
            for moment in MOMENTS
        }
        if self._masters is not self._weights:
            tensors |= {
                f"master.{name}": m.detach().cpu().clone() for name, m in zip(self._names, self._masters, strict=True)
            }
        if ranks.rank() == 0:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / FOLDER / OPTIMIZER)
            state = {"taken": self.taken, "weights_digest": weights_digest(self.model)}
            write_json(folder / FOLDER / STATE, state)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote; the model must hold the weights that were saved beside it. Raises MetronomeError
        when the folder holds no learner, a damaged one, or one of other weights."""
        try:
            state = read_record(folder / FOLDER / STATE, _State)
            taken, digest = state.taken, state.weights_digest
            tensors = read_tensors(folder / FOLDER / OPTIMIZER)
            moments = [[tensors[f"{moment}.{name}"] for moment in MOMENTS] for name in self._names]
            masters = None
            if self._masters is not self._weights:
                masters = [tensors[f"master.{name}"] for name in self._names]
            for i, (name, master) in enumerate(zip(self._names, self._masters, strict=True)):
                values = moments[i] if masters is None else [*moments[i], masters[i]]
                if any(value.shape != master.shape or value.dtype != torch.float32 for value in values):
                    raise ValueError(f"a moment or master of {name} is not float32 of {list(master.shape)}")
            check_finite(OPTIMIZER, tensors.items(), "it is damaged")
        except (UnreadableError, NotFiniteError, ValueError, KeyError) as error:
            raise MetronomeError(
                f"{folder}: holds no learner state that can be read ({error}). Resume from another checkpoint, or "
                "start anew."
            ) from error
        if (present := weights_digest(self.model)) != digest:
            raise MetronomeError(
                f"{folder}: the learner's state belongs to weights {digest}, the model beside it has {present}. Resume "
                "from another checkpoint, or start anew."
            )
        for i, master in enumerate(self._masters):
            if masters is not None:
                self._put(master, masters[i], None)
                master.data.copy_(masters[i])
            else:
                self._put(master, master.detach(), None)
            for moment, value in zip(MOMENTS, moments[i], strict=True):
                self._put(master, value, moment)
        for group in self._adamw.param_groups:
            for parameter in group["params"]:
                self._adamw.moments(parameter)["taken"] = taken
        self.taken = taken
        self._publish()
        if (present := weights_digest(self.model)) != digest:
            raise MetronomeError(
                f"{folder}: the masters in {OPTIMIZER} round to weights {present}, not to {digest}. Resume from "
                "another checkpoint, or start anew."
            )

    def _parts(self, master: Tensor, moment: str | None) -> tuple[Tensor, slice] | None:
        """What this rank keeps of a parameter's fp32 value (None) or one of its moments: the elements, a view of the
        optimizer's own memory, and their place among the parameter's. None when other ranks have all of it."""
        if not self.optim.zero_stage:
            kept = self._adamw.moments(master)[moment] if moment else master.data
            return kept.view(-1), slice(0, master.numel())
        mapping = master._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self._adamw.param_groups[mapping.param_group_index]["params"][0]  # DeepSpeed's partition of the group
        kept = self._adamw.moments(flat)[moment] if moment else flat.data
        flat_place, own_place = mapping.hp_fragment_address, mapping.lp_fragment_address
        own = slice(own_place.start, own_place.start + own_place.numel)
        return kept.narrow(0, flat_place.start, flat_place.numel), own

    def _gathered(self, master: Tensor, moment: str) -> Tensor:
        """All of a moment, on every rank. Each element is one rank's; the others add zeros, which change no bit."""
        whole, parts = torch.zeros(master.numel(), device=master.device), self._parts(master, moment)
        if parts is not None and (self.optim.zero_stage or ranks.rank() == 0):
            whole[parts[1]] = parts[0]
        return ranks.sum_in_order(whole).view(master.shape).cpu().clone()

    def _put(self, master: Tensor, value: Tensor, moment: str | None) -> None:
        parts = self._parts(master, moment)
        if parts is not None:
            parts[0].copy_(value.flatten()[parts[1]])
