"""Which torch functions run between a session's sound and the next weights: only what every processor rounds alike.

A dispatch mode sees each call of torch's library on the way (our kernels are none of them): while sessions sample, in
the learner's forward and backward pass, and in the update. Whatever is not known to be exact is refused, so that a
function of a mathematical library, or a sum whose order follows threads and vectors, cannot come back unnoticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.adamw import AdamW
from model.backbone.transformer import InteractionModel
from model.senses.audio import DMel
from rl.config import OptimConfig, TrainConfig, WarmstartConfig
from rl.learner.deepspeed import Learner
from rl.rollers import build_engine
from rl.step import loop
from rl.step.gradient import Gradient, gradient_of
from rl.warmstart import demonstrations
from rollout.play import play
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import SpeechBank
from tests.support.models import fresh_model

MOVES = {
    *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "select"),
    *("slice", "split", "split_with_sizes", "unbind", "as_strided", "unfold", "detach", "alias", "lift_fresh"),
    *("clone", "copy_", "_to_copy", "cat", "stack", "index", "index_select", "index_copy", "gather", "embedding"),
    *("empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "zeros", "zeros_like", "new_zeros"),
    *("full", "full_like", "ones", "ones_like", "fill_", "zero_", "arange", "scalar_tensor", "nonzero", "pad"),
    *("constant_pad_nd", "_local_scalar_dense", "select_backward", "slice_backward", "split_backward", "set_"),
    *("argsort", "sort", "bincount", "max", "min", "amax", "amin", "any", "all", "is_nonzero", "_pack_padded_sequence"),
    *("index_fill", "promote_types", "to", "detach_", "flatten", "bucketize", "profiler::_record_function_enter_new"),
    *(
        "profiler::_record_function_exit",
        "contiguous",
        "unflatten",
        "chunk",
        "view_as",
        "expand_as",
        "resolve_conj",
        "resolve_neg",
        "bitwise_not",
        "bitwise_or",
        "masked_fill_",
        "c10d::allreduce_",
        "mkldnn::_is_mkldnn_fp16_supported",
        "searchsorted",
    ),
    *("repeat", "repeat_interleave", "masked_select", "flip", "item", "record_stream", "resize_", "_reshape_alias"),
}
"""They move numbers, make them or look at them; none is rounded. (Ranks' gradients are added to numbers of -0 only.)"""

ROUNDED_ONCE = {
    *("add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "abs", "_foreach_add_", "where"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "bitwise_and", "isfinite"),
    *("clamp", "clamp_", "clamp_min", "clamp_min_", "maximum", "minimum"),
}
"""Element by element, one IEEE 754 operation each."""

KNOWN = {
    "embedding_dense_backward": "adds a token's rows one by one in their order; threads divide the tokens",
    "index_put": "accumulates into rows that each come once: 0 + g",
    "_index_put_impl_": "accumulates into rows that each come once: 0 + g",
    "index_put_": "accumulates into rows that each come once: 0 + g",
    "sum": "of integers",
    "cumsum": "of integers",
}


ACCUMULATES = ("index_put", "index_put_", "_index_put_impl_")

RECORDS = ("linalg_vector_norm", "norm", "_foreach_norm", "sqrt", "pow", "sum of floats", "isnan", "isinf")
"""Of numbers that DeepSpeed keeps and that clip nothing here: the learner clips, by its own norm."""


class Seen(TorchDispatchMode):
    """Counts calls by name; sums of integers apart from sums of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("sum", "cumsum", "mean", "prod") and args[0].is_floating_point():
            name += " of floats"
        if name in ACCUMULATES and len(args) > 3 and args[3]:
            (places,) = (i for i in args[1] if i is not None)
            assert places.unique().numel() == places.numel(), "adds to one place more than once, in any order"
        self.names[name] += 1
        return func(*args, **(kwargs or {}))


def refused(run: Callable[[], object]) -> dict[str, int]:
    with Seen() as seen:
        run()
    assert seen.names
    return {name: n for name, n in seen.names.items() if name not in MOVES | ROUNDED_ONCE | KNOWN.keys()}


CONFIG = TrainConfig(warmstart=WarmstartConfig(episodes=2))


def gradient(model: InteractionModel) -> Callable[[], Gradient]:
    vocabulary = Vocabulary.build(model.vocab)
    some = demonstrations(CONFIG, SpeechBank.open(), vocabulary, model.senses, 0)
    weights = [torch.full((len(t.text.chunk),), 0.01) for t in some]
    return lambda: gradient_of(model, some, weights, vocabulary.classes, 1.0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["nano", "tiny"])
@pytest.mark.usefixtures("world")
def test_learners_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    assert refused(gradient(fresh_model(name, 0, dtype))) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.usefixtures("world")
def test_learners_step(stage: Literal[0, 1, 2], dtype: torch.dtype) -> None:
    """Clipping, DeepSpeed's way to the optimizer, the update, the rounding of masters."""
    model = fresh_model("nano", 0, dtype)
    one, found = Learner(model, OptimConfig(zero_stage=stage, clip_norm=1e-3), 3), gradient(model)()
    used = refused(lambda: one.step(found))
    assert used.keys() <= set(RECORDS), used


@pytest.mark.usefixtures("world")
def test_sampler() -> None:
    model = fresh_model()
    engine = build_engine(CONFIG, model)
    plays = loop.plays(CONFIG, SpeechBank.open(), 0)[:4]
    assert refused(lambda: play(engine, plays, 0)) == {}


def test_hearing() -> None:
    dmel, sound = DMel.build(), torch.linspace(-0.5, 0.5, 3200)[None]
    assert refused(lambda: dmel.codes(sound)) == {}


def test_update() -> None:
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 100))
    optimizer = AdamW([{"params": [parameter], "weight_decay": 0.1}], lr=1e-3, beta1=0.9, beta2=0.95)
    parameter.grad = torch.linspace(-2, 2, 100)
    assert refused(optimizer.step) == {}


def test_control_a_library_function_is_found() -> None:
    """torch's own optimizer takes square roots, its softmax exponentials, its mean a sum."""
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    plain = torch.optim.AdamW([parameter], foreach=False)
    assert "sqrt" in refused(plain.step)
    x = torch.ones(3, 4, requires_grad=True)
    assert refused(lambda: torch.softmax(x, 1).mean().backward()).keys() >= {"_softmax", "mean of floats"}
    assert "mm" in refused(lambda: x.detach() @ x.detach().T)
