"""The learner's forward pass where a team of processes shares out the rows of the same episodes.

Each member embeds its slice of the packed rows, runs it through the layers (`kernels.sharing` says how attention,
convolutions and gradients of weights see the other rows) and scores the chosen tokens whose rows it has. Their results
are then whole on every member; the sum of the members' gradients is the gradient; all have the bits of one process. So
what is kept between forward and backward pass is divided, and so is the work, but for attention, which every member
computes whole, and for the backward passes of embeddings, norms and convolutions, which every member computes from all
rows. What a team sends grows with the rows times the width, not with the weights.
"""

from __future__ import annotations

from dataclasses import fields
from hashlib import blake2b

import torch
from torch import Tensor

from kernels import ops
from kernels.errors import MetronomeError
from kernels.layout import Segments
from kernels.rows import Rows
from kernels.sharing import gathered, shared
from model.backbone.transformer import InteractionModel
from model.inputs import Inputs
from model.logprob import TokenClasses
from model.program import teams
from model.senses.video import Patches
from rl.step import batch as alone
from rl.step.batch import Batch


def choice_logprobs(
    model: InteractionModel, batch: Batch, classes: TokenClasses, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `rl.step.batch.choice_logprobs`, and so for `all_logprobs`."""
    return all_logprobs(model, batch, classes, temperature)[0]


def all_logprobs(
    model: InteractionModel, batch: Batch, classes: TokenClasses, temperature: float
) -> tuple[tuple[Tensor, Tensor, Tensor], alone.Sound | None]:
    """As `rl.step.batch.all_logprobs`, and with its bits; every member of a team must call it, with one batch. Its
    backward pass is one of all members, too. Raises MetronomeError for fewer rows than members, and for sound, which a
    team does not share out."""
    if teams.size() == 1:
        return alone.all_logprobs(model, batch, classes, temperature)
    if batch.voice is not None:
        raise MetronomeError(f"rl.sequence_parallel is {teams.size()}, but the model has a voice: give 1")
    _check_same(batch, temperature)
    rows = Rows.even(len(batch.inputs.tokens), teams.size(), teams.member(), teams)
    if 0 in rows.counts:
        raise MetronomeError(
            f"rl.sequence_parallel is {teams.size()}, but a forward pass has only {rows.bounds[-1]} rows: give less"
        )
    chosen = Rows(_cuts(batch.row, rows.bounds), rows.rank, rows.team)
    row, target, row_class = (chosen.own(x) for x in (batch.row, batch.target, batch.row_class))
    with ops.deferred():
        placed = model.place(part(batch.inputs, rows.start, rows.end), None, row - rows.start, target, row_class)
        segments, _ = ops.upload(batch.inputs.segments, ())
        weights = [w for tower in model.embedders for w in tower.parameters() if w.requires_grad]
        x = _Embedded.apply(rows, model, placed, batch.inputs, *weights)
        row, target, row_class = placed.more
        with shared(rows):
            hidden = model.run(x, segments)
        with shared(chosen):
            logits = model.logits(hidden[row])
        logprob, entropy, digest = classes.logprob(logits, target, row_class, temperature)
        return (gathered(chosen, logprob), gathered(chosen, entropy), chosen.whole(digest)), None


def part(inputs: Inputs, first: int, end: int) -> Inputs:
    """Rows ``first`` … ``end - 1`` to be embedded, whatever conversations they are of."""
    ends = [*inputs.starts[1:], len(inputs.tokens)]
    spans = [
        (s, max(first - start, 0), min(end, stop) - start)
        for s, (start, stop) in enumerate(zip(inputs.starts, ends, strict=True))
        if start < end and first < stop
    ]
    return inputs.part(spans, Segments.build([0], [0], [end - first]))


def _cuts(ascending: Tensor, bounds: tuple[int, ...]) -> tuple[int, ...]:
    """How many of ``ascending`` are below each bound."""
    if (ascending.diff() < 0).any():
        raise ValueError("the rows of chosen tokens do not ascend")
    return tuple(torch.searchsorted(ascending, torch.tensor(bounds)).tolist())


def _check_same(batch: Batch, temperature: float) -> None:
    """Raises RuntimeError, on every member, unless all hold the same batch: their rows would be mixed up."""
    inputs, digest = batch.inputs, blake2b(repr(temperature).encode(), digest_size=8)
    read = (
        inputs.tokens,
        inputs.codes,
        inputs.segments.offset,
        *(getattr(inputs.patches, f.name) for f in fields(Patches)),
    )
    for x in (*read, batch.row, batch.target, batch.row_class):
        digest.update(f"{tuple(x.shape)}".encode() + x.numpy().tobytes())
    held = teams.merged([digest.hexdigest()])
    if len(set(held)) > 1:
        raise RuntimeError(f"the members of a team hold different episodes: {held}; the run cannot go on")


class _Embedded(torch.autograd.Function):
    """This member's rows embedded; the gradient is that of embedding all rows, for which all are embedded anew."""

    @staticmethod
    def forward(ctx, rows, model, placed, inputs, *weights):  # type: ignore[no-untyped-def]
        ctx.rows, ctx.model, ctx.inputs, ctx.weights = rows, model, inputs, weights
        return model.embed(placed)  # no gradient is asked for in here

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad = ctx.rows.whole(grad)
        with torch.enable_grad():
            x = ctx.model.embed(ctx.model.place(ctx.inputs, None))
        found = torch.autograd.grad(x, ctx.weights, grad, allow_unused=True)
        return None, None, None, None, *(None if one is None else ctx.rows.made(one) for one in found)
