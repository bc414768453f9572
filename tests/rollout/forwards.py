"""Forward passes of `tiny` in the embedded engine on Triton's kernels, in its interpreter; run by `test_ledger.py`:

    TRITON_INTERPRET=1 METRONOME_BACKEND=triton python -m tests.rollout.forwards ledger | bits DEVICE

``ledger``: what they ask of the pretend device, within bounds and with stray calls slipped in, and what becomes of
errors. ``bits``: digests of episodes and gradients, with tensors on the pretend device or, for the same kernels, on the
CPU. Prints JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.backbone.transformer import InteractionModel
from model.config import Preset, preset
from model.inputs import Inputs
from model.senses.video import Patches
from rollout.engines.embedded import SessionEngine
from rollout.engines.session import Session
from rollout.seeds import session_key
from rollout.turn.observation import Observation
from rollout.turn.vocabulary import Vocabulary
from tests.support.pretend.bounds import Bounds, excess
from tests.support.pretend.device import ledger

LAYERS = 4
TORCHS = {"embedding": 1, "mul.Tensor": LAYERS, "cat": 1}  # of tokens; the router's scale in each layer; the read-out
DECODE = Bounds(kernels=86, launches=TORCHS, waits=1, copies=1, reads=1)
PREFILL = Bounds(kernels=88, launches=TORCHS | {"index_copy": 1}, waits=1, copies=1, reads=1)  # with audio rows


def engine_on(device: str, name: Preset = "tiny") -> SessionEngine:
    model = InteractionModel(preset(name))
    model.init_weights(0)
    model.to(device)
    model.pack()
    return SessionEngine(model, Vocabulary.build(model.vocab), slots=4, max_tokens=160)


def opened(engine: SessionEngine, count: int) -> list[Session]:
    return [engine.open(session_key(0, "x", i)) for i in range(count)]


def observations(seed: int, count: int) -> list[Observation]:
    draw = torch.Generator().manual_seed(seed)
    return [Observation(0.05 * torch.randn(3200, generator=draw)) for _ in range(count)]


# ---- ledger ----


def measured(engine: SessionEngine) -> list[dict[str, Any]]:
    """From now on the totals and the excess of each forward pass, through its read-out."""
    seen: list[dict[str, Any]] = []
    inner = engine._sample_next

    def sample_next(sessions: Any, heard: Any, row_classes: Any) -> list[int]:
        ledger.clear()
        tokens = inner(sessions, heard, row_classes)
        kind = "prefill" if len(heard.codes) else "decode"
        beyond = excess(PREFILL if len(heard.codes) else DECODE)
        seen.append({"kind": kind, "sessions": len(sessions), "totals": ledger.totals(), "excess": beyond})
        return tokens

    engine._sample_next = sample_next  # type: ignore[method-assign]
    return seen


def with_strays(mlp: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A layer's MLP with a look at a number, a copy to the device, and an op of torch's."""

    def run(x: Tensor) -> Tensor:
        float(x[0, 0])
        torch.zeros(1).to(x.device)
        return mlp(x * 1.0)

    return run


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def ledgers() -> dict[str, Any]:
    from tests.support.pretend.triton import be_tritons_device

    be_tritons_device()
    ledger.trace = True
    engine = engine_on("pretend")
    assert len(engine.model.layers) == LAYERS
    (session,) = opened(engine, 1)
    seen = measured(engine)
    for turn in range(2):
        engine.append([session], observations(turn, 1))
    whole, model = list(seen), engine.model
    packed = model.layers[1].packed
    packed.mlp = with_strays(packed.mlp)
    engine.append([session], observations(2, 1))
    before = [len(session.tokens), len(session.sampled)]
    model.logits = lambda hidden: hidden.new_full((1, model.vocab), torch.nan)  # type: ignore[method-assign]
    failed = error_of(lambda: engine.append([session], observations(3, 1)))
    observed = len(engine.grammar.observed())
    after = [len(session.tokens) - observed, len(session.sampled)]
    segments, codes = engine.state.extend([engine.state.open()], [2]), torch.zeros(1, 80, dtype=torch.uint8)
    rows, dark = [([3, 10**6], codes[:0]), ([3, model.senses.audio], codes + 200)], Patches.none(model.senses.patch)
    inputs = [Inputs.of(torch.tensor(tokens), bins, dark, segments, model.senses) for tokens, bins in rows]
    strange = [error_of(partial(model.place, one, engine.state)) for one in inputs]
    return {
        "whole": whole,
        "slipped": seen[len(whole)],
        "failed": {"said": failed, "before": before, "after": after, "closed": session.closed},
        "strange": strange,
    }


# ---- bits ----


def digest(tensors: list[Tensor]) -> str:
    hashed = hashlib.sha256()
    for x in tensors:
        hashed.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def bits(device: str) -> dict[str, Any]:
    if device == "pretend":
        from tests.support.pretend.triton import be_tritons_device

        be_tritons_device()
    else:
        from kernels import dispatch
        from tests.kernels.interpreter import quicken

        assert dispatch.backend().NAME == "triton"
        quicken()
    from rl.step.gradient import gradient_of

    engine = engine_on(device, "nano")
    sessions = opened(engine, 3)
    engine.append(sessions[:1], observations(0, 1))
    engine.append(sessions, observations(1, 3))
    episodes = [s.episode(scenario="a/b/0", rollout=i, seed=0, facts={}) for i, s in enumerate(sessions)]
    some = episodes[:2]  # of two turns, and of one
    weights = [torch.ones(len(e.text.chunk)) for e in some]
    ledger.clear()
    gradient = gradient_of(engine.model, some, weights, engine.vocabulary.classes, 1.0, 8)
    asked = ledger.totals()
    sampled = [torch.cat([getattr(e.text, name) for e in some]) for name in ("logprob", "digest")]
    learned = [gradient.logprob.cpu(), gradient.digest.cpu()]
    return {
        "episodes": digest([x for e in episodes for x in (e.tokens, e.text.logprob, e.text.digest)]),
        "gradient": digest(list(gradient.parameters)),
        "asked_by_learner": asked,
        "learner_is_sampler": all(torch.equal(a, b) for a, b in zip(sampled, learned, strict=True)),
    }


if __name__ == "__main__":
    print(json.dumps(ledgers() if sys.argv[1] == "ledger" else bits(sys.argv[2])))
