"""A difference must be found and laid at the right layer's and op's door; nothing may be found where there is none."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.layout import PackedLinear
from kernels.reference import attention as reference_attention
from model.backbone.transformer import InteractionModel
from model.program import ranks
from rl.audit.diagnosis import trace
from rl.audit.diagnosis.diagnose import Diagnosis, diagnose, explain
from rl.audit.diagnosis.differences import compare_traces
from rl.config import TrainConfig
from rl.run import DIFFERENCE, Run
from rl.step.gradient import Gradient, gradient_of
from rl.step.identity import Evidence, NotEqualError, check_identity
from rollout.engines.embedded import SessionEngine
from rollout.record.episode import Episode
from rollout.seeds import session_key
from rollout.turn.observation import audio_observations
from rollout.turn.vocabulary import Vocabulary
from tests.kernels.contract import uneven
from tests.support.models import VOCABULARY, fresh_model, speaking_model

CHUNKS = 16  # about 110 rows: past the first split of keys


@pytest.fixture
def model() -> InteractionModel:
    return fresh_model(seed=5)


def sampled(model: InteractionModel) -> list[Episode]:
    """Three sessions that hear noise; what they say is up to untrained weights."""
    engine = SessionEngine(model, VOCABULARY, slots=3, max_tokens=256)
    names = [f"noise/train/{i}" for i in range(3)]
    sessions = [engine.open(session_key(0, name, 0)) for name in names]
    audio = torch.randn(CHUNKS, 3, 3200, generator=torch.Generator().manual_seed(0)) / 10
    for chunk in audio:
        engine.append(sessions, audio_observations(chunk))
    return [s.episode(scenario=n, rollout=0, seed=0, facts={}) for s, n in zip(sessions, names, strict=True)]


def learned(model: InteractionModel, episodes: list[Episode]) -> Gradient:
    weights = [torch.ones(len(e.text.chunk)) for e in episodes]
    return gradient_of(model, episodes, weights, VOCABULARY.classes, 1.0, 2)


def explained(model: InteractionModel, episodes: list[Episode], sampling: InteractionModel | None = None) -> Diagnosis:
    g = learned(model, episodes)
    return diagnose(model, Evidence(0, episodes, g.logprob, g.digest, 2), sampling)


def faulty(
    monkeypatch: pytest.MonkeyPatch, model: InteractionModel, layer: int, block: str, op: str, fault: Callable[..., Any]
) -> None:
    """Puts ``fault`` in the place of a backend's op, within one block of one layer."""
    spoiled(monkeypatch, getattr(model.layers[layer], block), op, fault)
    model.repack()  # which looks the forwards up


def spoiled(monkeypatch: pytest.MonkeyPatch, part: Any, op: str, fault: Callable[..., Any]) -> None:
    """Puts ``fault`` in the place of a backend's op, within one module."""
    honest = getattr(dispatch.backend(), op)
    forward, inside = part.forward, [False]

    def marked(*arguments: Any) -> Tensor:
        inside[0] = True
        out: Tensor = forward(*arguments)
        inside[0] = False
        return out

    def either(*arguments: Any) -> Any:
        return fault(honest, *arguments) if inside[0] else honest(*arguments)

    either.__module__, either.__name__ = fault.__module__, fault.__name__
    monkeypatch.setattr(part, "forward", marked)
    monkeypatch.setattr(dispatch.backend(), op, either)


def naive_linear(honest: Callable[..., Tensor], x: Tensor, packed: PackedLinear, out_dtype: torch.dtype) -> Tensor:
    """In place of torch's, which on some machines gives few rows other bits than many."""
    return uneven(honest)(x, packed, out_dtype)


def swapped_experts(honest: Callable[..., Tensor], y: Tensor, weight: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return honest(y, weight)
    order = [1, 0, *range(2, weight.shape[1])]
    return honest(y.view(*weight.shape, -1)[:, order].reshape(y.shape), weight[:, order].contiguous())


def other_split(_: Any, *arguments: Any) -> Tensor:
    """The reference's attention on both sides; splits of 32 keys, not 64, in the learner."""
    before = reference_attention.SPLIT_TOKENS
    reference_attention.SPLIT_TOKENS = 32 if torch.is_grad_enabled() else before
    try:
        return reference_attention.attention(*arguments)
    finally:
        reference_attention.SPLIT_TOKENS = before


def test_a_healthy_model_differs_in_no_op_however_it_runs(model: InteractionModel) -> None:
    episodes = sampled(model)
    ways = [
        trace.sampler(model, episodes, 1, VOCABULARY.classes),
        trace.sampler(model, episodes[1:2], 0, VOCABULARY.classes),
    ]
    ways += [
        trace.learner(model, episodes, 1, VOCABULARY.classes),
        trace.learner(model, episodes[1:2], 0, VOCABULARY.classes),
    ]
    for way in ways:
        compared = compare_traces(ways[0], way)
        assert [op.name for op in compared if op.rows_unequal] == []
        assert len(compared) == len(ways[0].entries) == len(way.entries)
    names = list(ways[0].entries)
    layer = [name.removeprefix("layers.2.") for name in names if name.startswith("layers.2.")]
    assert layer == [
        "input_layernorm (rms_norm)",
        "self_attn.q_proj+k_proj+v_proj+r_proj (linear)",
        "self_attn (short_conv)",
        "self_attn.q_norm (rms_norm)",
        "self_attn.k_norm (rms_norm)",
        "self_attn (attention)",
        "self_attn.o_proj (linear)",
        "self_attn",
        "attn_sconv (short_conv)",
        "post_attention_layernorm (rms_norm)",
        "mlp.gate (linear)",
        "mlp.gate (route)",
        "mlp.gate (route) result 1",
        "mlp.experts.gate_up_proj (expert_linear)",
        "mlp (swiglu)",
        "mlp.experts.down_proj (expert_linear)",
        "mlp (moe_combine)",
        "mlp",
        "mlp_sconv (short_conv)",
    ]
    assert names[-4:] == ["norm (rms_norm)", "lm_head (linear)", trace.LOGPROB, trace.DIGEST]
    assert torch.equal(ways[0].entries[trace.LOGPROB].rows[:, 0], episodes[1].text.logprob)
    assert torch.equal(ways[0].entries[trace.DIGEST].rows[:, 0], episodes[1].text.digest)
    with pytest.raises(ValueError, match="every log-prob and every row digest is equal"):
        explained(model, episodes)


def test_one_ulp_of_one_weight(model: InteractionModel) -> None:
    sampling = copy.deepcopy(model)
    sampling.pack()
    episodes = sampled(sampling)
    weight = model.layers[2].self_attn.o_proj.weight
    with torch.no_grad():
        row, column = divmod(int(weight.abs().argmax()), weight.shape[1])  # the ulp of a small one may be lost in sums
        weight[row, column] = torch.nextafter(weight[row, column], torch.tensor(torch.inf))
    model.repack()
    diagnosis = explained(model, episodes, sampling)
    assert diagnosis.first is not None and diagnosis.first.name == "layers.2.self_attn.o_proj (linear)"
    assert (
        f"one weight differs: model.language_model.layers.2.self_attn.o_proj.weight[{row}, {column}], by one ulp"
        in diagnosis.suspects
    )
    assert not any(op.rows_unequal for op in diagnosis.growth if op.name.startswith(("embed", "layers.0", "layers.1")))
    # Without the sampler's model the replay cannot show it, but the digest does.
    assert any("weights that changed between sampling and learning" in s for s in explained(model, episodes).suspects)


def test_experts_in_another_order(model: InteractionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, model, 1, "mlp", "moe_combine", swapped_experts)
    diagnosis = explained(model, sampled(model))
    assert diagnosis.first is not None and diagnosis.first.name == "layers.1.mlp (moe_combine)"
    assert any(
        s.startswith("experts of layers.1.mlp combined in another order: [1, 0, 2] of each row's list in the learner")
        for s in diagnosis.suspects
    )


def test_another_attention_split(model: InteractionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, model, 3, "self_attn", "attention", other_split)
    diagnosis = explained(model, sampled(model))
    assert diagnosis.first is not None and diagnosis.first.name == "layers.3.self_attn (attention)"
    assert diagnosis.first.first_row >= 32  # one split holds all earlier keys on both sides
    assert any(
        "cuts the keys differently: no row before 3" in s and "split has 64 keys" in s for s in diagnosis.suspects
    )


def test_naive_matmul_on_one_layer(model: InteractionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, model, 1, "self_attn", "linear", naive_linear)
    diagnosis = explained(model, sampled(model))
    assert (
        diagnosis.first is not None
        and diagnosis.first.name == "layers.1.self_attn.q_proj+k_proj+v_proj+r_proj (linear)"
    )
    assert any("linear ran on" in s and "naive_linear" in s for s in diagnosis.suspects)
    assert any("depends on the number of rows" in s and "< 8 in the sampler" in s for s in diagnosis.suspects)


def test_the_check_raises_with_what_a_diagnosis_needs(model: InteractionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, model, 1, "mlp", "moe_combine", swapped_experts)
    episodes = sampled(model)
    g = learned(model, episodes)
    with pytest.raises(NotEqualError, match=r"step 4, episode noise/train/0#0, token \d+ .* was not taken") as caught:
        check_identity(Evidence(4, episodes, g.logprob, g.digest, 2))
    evidence = pickle.loads(pickle.dumps(caught.value)).evidence  # as processes exchange errors
    difference = diagnose(model, evidence).plain()
    assert difference["step"] == 4 and difference["first"]["op"] == "moe_combine"
    assert difference["mismatch"]["mismatch/num_unequal"] > 0 and difference["mismatch"]["mismatch/k3"] >= 0
    for table in difference["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"]) and table["rows"]


@pytest.mark.parametrize("first", [0, 1])
def test_every_rank_raises_and_only_those_that_differ_have_evidence(
    model: InteractionModel, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    episodes = sampled(model)
    g = learned(model, episodes)
    good = Evidence(4, episodes, g.logprob, g.digest, 2)
    bad = replace(good, digest=g.digest ^ 1)
    words = bad.describe()
    monkeypatch.setattr(ranks, "gather", lambda own: [own, (bad.mismatch(), words)])
    with pytest.raises(NotEqualError, match="log-probs and") as caught:
        check_identity([good, bad][first])
    assert str(caught.value).startswith(words) and (caught.value.evidence is None) == (first == 0)
    monkeypatch.setattr(ranks, "gather", lambda own: [own, own])  # the control
    assert check_identity(good).num_tokens == 2 * len(g.logprob)


def test_a_run_that_stops_leaves_the_diagnosis(
    model: InteractionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(monkeypatch, model, 1, "mlp", "moe_combine", swapped_experts)
    episodes = sampled(model)
    g = learned(model, episodes)
    evidence = Evidence(0, episodes, g.logprob, g.digest, 2)
    counts = evidence.mismatch()

    def stops(run: Run, *_: Any) -> None:
        run.model = model
        check_identity(evidence)

    monkeypatch.setattr(Run, "begin", lambda _: (SimpleNamespace(), SimpleNamespace(before=SimpleNamespace(score={}))))
    monkeypatch.setattr(Run, "learn", stops)
    with pytest.raises(
        NotEqualError, match=r"the last checkpoint stands\. The first activation that differs is layers\.1\.mlp \(moe"
    ):
        Run(TrainConfig(runs=str(tmp_path)), "name: quickstart\n", False).execute()
    difference = json.loads((tmp_path / "quickstart" / DIFFERENCE).read_text())
    assert difference == diagnose(model, evidence).plain()
    report = json.loads((tmp_path / "quickstart/audit/report.json").read_text())
    assert (report["verdict"], report["num_unequal"]) == ("different", counts.num_unequal)
    assert report["rows_unequal"] == counts.rows_unequal > 0
    assert report["diagnosis"]["first"] == difference["first"]


@pytest.fixture
def speaker() -> InteractionModel:
    return speaking_model()


def spoken(model: InteractionModel) -> list[Episode]:
    """Sessions of a model with a voice, all of which hear themselves. Some have sound in the last chunk, on whose last
    rows no token depends, and some not."""
    engine = SessionEngine(model, Vocabulary.of(model), slots=6, max_tokens=200)
    names = [f"noise/train/{i}" for i in range(6)]
    sessions = [engine.open(session_key(0, name, 0)) for name in names]
    for chunk in torch.randn(5, 6, 3200, generator=torch.Generator().manual_seed(0)) / 10:
        engine.append(sessions, audio_observations(chunk))
    return [s.episode(scenario=n, rollout=0, seed=0, facts={}) for s, n in zip(sessions, names, strict=True)]


def ends_in_sound(episode: Episode) -> bool:
    return episode.voice is not None and bool(episode.voice.sampled_at[-1] > episode.text.sampled_at[-1])


def evidence_of(model: InteractionModel, episodes: list[Episode]) -> Evidence:
    weights = [torch.ones(len(e.text.chunk)) for e in episodes]
    sound = [torch.ones(len(e.voice.chunk)) for e in episodes if e.voice is not None]
    classes = Vocabulary.of(model).classes
    g = gradient_of(model, episodes, weights, classes, 1.0, 3, sound_weights=sound)
    return Evidence(0, episodes, *g.choices(), 3)


def found(model: InteractionModel, evidence: Evidence) -> Diagnosis:
    diagnosis, failure = explain(model, evidence)
    assert diagnosis is not None and failure == "", failure
    return diagnosis


def ulp_in_the_learner(honest: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
    out = honest(x, *more)
    return torch.nextafter(out, out + 1) if torch.is_grad_enabled() else out


def test_a_healthy_model_with_a_voice_differs_in_no_op(speaker: InteractionModel) -> None:
    episodes, classes = spoken(speaker), Vocabulary.of(speaker).classes
    assert {(ends_in_sound(e), len(e.own) > 0) for e in episodes} >= {(True, True), (False, True)}
    for i, episode in enumerate(episodes):
        ways = [trace.sampler(speaker, episodes, i, classes), trace.sampler(speaker, [episode], 0, classes)]
        ways += [trace.learner(speaker, episodes, i, classes), trace.learner(speaker, [episode], 0, classes)]
        for way in ways:
            compared = compare_traces(ways[0], way)
            assert [op.name for op in compared if op.rows_unequal] == []
            assert len(compared) == len(ways[0].entries) == len(way.entries)
            assert (f"audio_tower.norm (rms_norm){trace.OF_OWN}" in way.entries) == (len(episode.own) > 0)
            if (voice := episode.voice) is not None:
                assert torch.equal(way.entries[trace.SOUND_LOGPROB].rows[:, 0], voice.logprob)
                assert torch.equal(way.entries[trace.SOUND_DIGEST].rows[:, 0], voice.digest)
            assert torch.equal(way.entries[trace.LOGPROB].rows[:, 0], episode.text.logprob)


@pytest.mark.parametrize("name", ["text", "voice"])
@pytest.mark.parametrize("last", [True, False])
def test_a_changed_record_of_a_voice_is_called_so(speaker: InteractionModel, name: str, last: bool) -> None:
    episodes = spoken(speaker)
    evidence = evidence_of(speaker, episodes)
    which = next(i for i, e in enumerate(episodes) if ends_in_sound(e) == last and len(e.own))
    stream = episodes[which].streams[name]
    logprob = stream.logprob.clone()
    logprob[-1] = torch.nextafter(logprob[-1], torch.tensor(0.0))
    changed = replace(episodes[which], streams=dict(episodes[which].streams) | {name: replace(stream, logprob=logprob)})
    diagnosis = found(speaker, replace(evidence, episodes=[*episodes[:which], changed, *episodes[which + 1 :]]))
    assert diagnosis.episode == changed.name and (diagnosis.token is None) == (name == "voice")
    assert diagnosis.first is None and diagnosis.suspects[0].startswith("what the sampler stored")
    assert diagnosis.sentence().startswith("Replayed, all activations agree.")
    assert ("flow head" in diagnosis.sentence()) == (name == "voice")


@pytest.mark.parametrize("last", [True, False])
def test_faults_of_the_backbone_and_the_flow_head_of_a_voice(
    speaker: InteractionModel, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    episodes = [e for e in spoken(speaker) if ends_in_sound(e) == last]
    assert len(episodes) > 1 and all(len(e.own) for e in episodes)
    assert speaker.voice_head is not None
    with monkeypatch.context() as patch:
        spoiled(patch, speaker.voice_head.layers[0], "gelu", ulp_in_the_learner)
        diagnosis = found(speaker, evidence_of(speaker, episodes))
    assert diagnosis.token is None and diagnosis.first is not None
    assert diagnosis.first.name == "voice_head.blocks.0 (gelu)"
    with monkeypatch.context() as patch:
        faulty(patch, speaker, 1, "self_attn", "attention", ulp_in_the_learner)
        diagnosis = found(speaker, evidence_of(speaker, episodes))
    assert diagnosis.token is not None and diagnosis.first is not None
    assert diagnosis.first.name == "layers.1.self_attn (attention)"


def test_a_fault_in_what_a_model_hears_of_itself(speaker: InteractionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower computes the user's sound right, and the model's own wrong."""
    episodes = [next(e for e in spoken(speaker) if ends_in_sound(e) and len(e.own))]
    own = episodes[0].own

    def fault(honest: Callable[..., Tensor], codes: Tensor, *more: Any) -> Tensor:
        out = honest(codes, *more)
        return out * 2 if torch.is_grad_enabled() and torch.equal(codes, own) else out

    spoiled(monkeypatch, speaker.model.audio_tower, "embedding_sum", fault)
    diagnosis = found(speaker, evidence_of(speaker, episodes))
    assert diagnosis.first is not None
    assert diagnosis.first.name == f"audio_tower.embed_audio_tokens.embed_audio_tokens (embedding_sum){trace.OF_OWN}"
