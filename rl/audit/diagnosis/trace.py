"""Records the results of every op for one episode's rows, computed as the sampler or as the learner computes them.

`sampler` feeds all episodes to sessions in lockstep, with a cache; `learner` packs them into one forward pass, under
autograd. Both keep the rows of one episode only, so that a trace has a few dozen megabytes whatever ran beside it. An
op is named by the parameters it reads ("layers.1.mlp.experts.down_proj (expert_linear)"), or, where it reads none, by
the block it stands in ("layers.1.mlp (moe_combine)"); the activations that the model itself names ("layers.1.mlp") are
entries too, for what torch computes between the ops.

The model's own sound has entries of its own: of the audio tower over what it hears of it, and of the flow head, which
both replays feed with the chains of the record, the sampler step by step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.layout import PackedExperts, PackedLinear
from kernels.observe import Call, observed
from model.backbone.state import SessionState
from model.backbone.transformer import Capture, InteractionModel
from model.inputs import Inputs
from model.logprob import TokenClasses
from model.voice.chain import score, score_by_steps
from model.voice.flow import FlowHead
from rl.step.batch import collate, needed
from rollout.record.episode import Episode
from rollout.seeds import session_key, token_key

_UNNAMED = re.compile(r"\.(weight|conv1d\.weight|e_score_correction_bias|rel_logits_proj\.proj)$")
_BLOCK = re.compile(r"voice_head\.blocks\.\d+|layers\.\d+\.(self_attn|mlp)|(vision_tower\.encoder_)?layers\.\d+|\w+")
_LAYER = re.compile(r"vision_tower\.encoder_layers\.(\d+)")
LOGPROB, DIGEST = "log-prob", "row digest"
SOUND_LOGPROB, SOUND_DIGEST = "log-prob of sound", "digest of sound"
DIGESTS = (DIGEST, SOUND_DIGEST)
TEXT, AUDIO, OWN, PICTURES, PATCHES, SOUND = "text", "audio", "own", "pictures", "patches", "sound"
OF_OWN = " of own sound"
"""Ends the names of the audio tower's entries where it embeds the model's own sound."""


@dataclass(frozen=True)
class Part:
    """How many rows of one kind a call has, all episodes together, and which of them are the traced episode's."""

    rows: int
    kept: slice


@dataclass
class Entry:
    """The results of one op, or one activation named by the model, for an episode: at its T rows, at its N sampled
    tokens for ops of the head, at its audio rows or those of its own sound for ops of the audio tower, at its pictures
    or patches for those of the vision tower, or at its M chunks of sound, or their M * K steps, for the flow head's."""

    op: str  # name in `kernels.ops`; "" for an activation that torch computed between ops
    function: str  # module and name of the function that ran
    pieces: list[Tensor] = field(default_factory=list)  # one for each call, [rows, width]
    calls: list[int] = field(
        default_factory=list
    )  # for each row, the number of rows in its call, all episodes together
    weights: list[Tensor] = field(default_factory=list)  # for moe_combine: the weights of the J experts, [rows, J]

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.pieces)


class Trace:
    """Owns the entries of one episode, in order of execution."""

    def __init__(self, model: InteractionModel) -> None:
        named = [*model.named_parameters(), *model.named_buffers()]
        self._names = {tensor.data_ptr(): _short(name) for name, tensor in named}
        self.entries: dict[str, Entry] = {}
        self._block = "embed"
        self._folds_time = next(i for i, layer in enumerate(model.model.vision_tower.layers) if layer.fold.time > 1)
        self._parts = {TEXT: Part(0, slice(0, 0))}
        self._to_hear: list[str] = []  # of `AUDIO` and `OWN`, what the audio tower has still to embed in this call
        self._hears = AUDIO

    def begin(self, parts: Mapping[str, Part]) -> None:
        """Announces a call over the rows of all episodes: of the backbone (`TEXT`) and, if it embeds them, of the
        towers' inputs (`AUDIO`, `OWN`, `PICTURES`, `PATCHES`), or over chunks of sound (`SOUND`)."""
        self._parts = dict(parts)
        self._to_hear = [kind for kind in (AUDIO, OWN) if kind in parts and parts[kind].rows]

    def see(self, call: Call) -> None:
        """Adds the results of an op."""
        if call.op in ("sample", "logprob"):  # their results are added as log-prob and digest
            return
        place = self._place(call)
        of = ""
        if place.startswith("audio_tower"):
            if call.op == "embedding_sum":  # the tower's first op
                self._hears = self._to_hear.pop(0)
            of = OF_OWN if self._hears == OWN else ""
        weights = call.arguments[1] if call.op == "moe_combine" else None
        for i, result in enumerate(call.results):
            suffix = f" result {i}" if i else ""
            self._keep(f"{place} ({call.op}){suffix}{of}", call.op, call.function, result, weights)

    def activations(self, captured: Capture) -> None:
        """Adds activations that the model named, as (name, values [rows, width])."""
        for name, value in captured:
            self._keep(name, "", "", value, None)

    def add(self, name: str, values: Tensor) -> None:
        """Adds ``values`` [rows] of this call."""
        self._keep(name, "", "", values, None)

    def _keep(self, name: str, op: str, function: str, value: Tensor, weights: Tensor | None) -> None:
        kind = self._kind(name)
        part = self._parts[kind]
        kept, fan_out = part.kept, value.shape[0] // part.rows
        if kept.stop == kept.start:
            return
        entry = self.entries.setdefault(name, Entry(op, function))
        own = value.detach()[kept.start * fan_out : kept.stop * fan_out]
        rows = len(own) if kind == SOUND else kept.stop - kept.start  # of sound, a row is one step of a chain
        entry.pieces.append(own.reshape(rows, -1).clone())
        entry.calls += [part.rows * fan_out if kind == SOUND else part.rows] * rows
        if weights is not None:
            entry.weights.append(weights.detach()[kept].clone())

    def _kind(self, name: str) -> str:
        """Of what an entry has rows: a tower's ops are named after it."""
        if name.startswith("audio_tower"):
            return OWN if name.endswith(OF_OWN) else AUDIO
        if name.startswith("voice_head") or name in (SOUND_LOGPROB, SOUND_DIGEST):
            return SOUND
        if not name.startswith("vision_tower"):
            return TEXT
        layer = _LAYER.match(name)
        return PICTURES if layer and int(layer[1]) < self._folds_time else PATCHES

    def _place(self, call: Call) -> str:
        known = [self._names[t.data_ptr()] for t in _tensors(call) if t.data_ptr() in self._names]
        if not known:
            return self._block
        self._block = block[0] if (block := _BLOCK.match(known[0])) else known[0]
        if len(known) == 1:
            return known[0]
        leaves = "+".join(name.rsplit(".", 1)[1] for name in known)
        return f"{known[0].rsplit('.', 1)[0]}.{leaves}"


class _Activations(list):  # type: ignore[type-arg]
    """The list that the model's forward appends its named activations to, passed on at once to keep their order."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def append(self, named: tuple[str, Tensor]) -> None:
        self._trace.activations([named])


def _short(name: str) -> str:
    return _UNNAMED.sub("", name.removeprefix("model.").removeprefix("language_model."))


def _tensors(call: Call) -> list[Tensor]:
    """The arguments among which an op's parameters are; of experts the routed ones stand for all."""
    parameters: list[Tensor] = []
    for argument in call.arguments:
        match argument:
            case Tensor():
                parameters.append(argument)
            case PackedLinear():
                parameters += argument.parts
            case PackedExperts():
                parameters.append(argument.groups[0][0])
    return parameters


@torch.no_grad()
def sampler(model: InteractionModel, episodes: Sequence[Episode], index: int, classes: TokenClasses) -> Trace:
    """Traces ``episodes[index]`` replayed beside the others, micro-turn by micro-turn: each sampling step is one call,
    as in `SessionEngine.append` when all sessions begin together. Tokens are drawn with the episodes' own keys."""
    trace, state = Trace(model), _state(model, episodes)
    slots = [state.open() for _ in episodes]
    inputs_of_all, fed = Inputs.cat(episodes, model.senses), [0] * len(episodes)
    contexts = [episode.contexts.tolist() for episode in episodes]
    for chunk, is_sound, turn in _turns(episodes):
        for e, position in turn:
            begin = max(first for first in contexts[e] if first < position)
            if fed[e] < begin:  # what was before is forgotten
                fed[e] = begin
                state.restart(slots[e])
        spans = [(e, fed[e], position) for e, position in turn]
        lengths = [end - first for _, first, end in spans]
        segments = state.extend([slots[e] for e, _ in turn], lengths)
        inputs = inputs_of_all.part(spans, segments)
        for e, position in turn:
            fed[e] = position
        at = next((i for i, (e, _) in enumerate(turn) if e == index), len(turn))
        rows = _part(lengths, at)
        trace.begin(_parts(inputs, rows))
        with observed(trace.see):
            hidden = model(inputs, state, _Activations(trace))
            trace.begin({SOUND if is_sound else TEXT: Part(len(turn), _part([1] * len(turn), at))})
            last = hidden[segments.offset[1:].long() - 1]
            if is_sound:
                chains = torch.cat([_chains(episodes[e], chunk) for e, _ in turn])
                _add_sound(trace, *score_by_steps(_head(model), last, chains.to(last.device)))
            else:
                _draw(trace, episodes, turn, chunk, model.logits(last), classes)
    return trace


def _draw(
    trace: Trace,
    episodes: Sequence[Episode],
    turn: Sequence[tuple[int, int]],
    chunk: int,
    logits: Tensor,
    classes: TokenClasses,
) -> None:
    keys, row_class = [], []
    for e, position in turn:
        episode = episodes[e]
        keys.append(token_key(session_key(episode.seed, episode.scenario, episode.rollout), chunk, position))
        row_class.append(episode.text.row_class[episode.text.sampled_at == position])
    _, logprob, digest = classes.sample(logits, torch.tensor(keys), torch.cat(row_class), episodes[0].temperature)
    trace.add(LOGPROB, logprob)
    trace.add(DIGEST, digest)


def learner(model: InteractionModel, episodes: Sequence[Episode], index: int, classes: TokenClasses) -> Trace:
    """Traces ``episodes[index]`` as the learner computes it, in one forward pass with the others under autograd."""
    trace, batch = Trace(model), collate(episodes, model.senses)
    rows = _part([needed(e) for e in episodes], index)
    trace.begin(_parts(batch.inputs, rows))
    with observed(trace.see):
        hidden = model(batch.inputs, None, _Activations(trace))
        sampled = [len(e.text.sampled_at) for e in episodes]
        trace.begin({TEXT: Part(len(batch.row), _part(sampled, index))})
        logits = model.logits(hidden[batch.row])
        logprob, _, digest = classes.logprob(logits, batch.target, batch.row_class, episodes[0].temperature)
        trace.add(LOGPROB, logprob)
        trace.add(DIGEST, digest)
        if (voice := batch.voice) is not None and voice.chains is not None:
            spoken = [0 if e.voice is None else len(e.voice.chunk) for e in episodes]
            trace.begin({SOUND: Part(len(voice.row), _part(spoken, index))})
            _add_sound(trace, *score(_head(model), hidden[voice.row], voice.chains.to(hidden.device)))
    return trace


def _add_sound(trace: Trace, logprob: Tensor, digest: Tensor) -> None:
    trace.add(SOUND_LOGPROB, logprob)
    trace.add(SOUND_DIGEST, digest)


def _head(model: InteractionModel) -> FlowHead:
    if model.voice_head is None:
        raise ValueError("the episodes have sound, but the model has no voice")
    return model.voice_head


def _chains(episode: Episode, chunk: int) -> Tensor:
    """fp32 [1, K + 1, NUMBERS], of what was said in that chunk."""
    voice = episode.voice
    assert voice is not None and voice.payload is not None
    return voice.payload[voice.chunk == chunk]


def _state(model: InteractionModel, episodes: Sequence[Episode]) -> SessionState:
    longest = max(len(e.tokens) for e in episodes)
    rows = sum(int(e.text.sampled_at.diff(prepend=torch.tensor([0])).max()) for e in episodes)
    return SessionState(model.config, len(episodes), longest, model.dtype, max_rows=rows)


def _turns(episodes: Sequence[Episode]) -> list[tuple[int, bool, list[tuple[int, int]]]]:
    """The calls of a lockstep replay: (chunk, whether the call samples its sound, [(episode, position of the token that
    the call samples, or of the row after the last one that the sound depends on)])."""
    calls: dict[tuple[int, bool, int], list[tuple[int, int]]] = {}  # a chunk's sound comes after all its tokens
    for e, episode in enumerate(episodes):
        within, before = 0, -1
        for chunk, position in zip(episode.text.chunk.tolist(), episode.text.sampled_at.tolist(), strict=True):
            within, before = (within + 1 if chunk == before else 0), chunk
            calls.setdefault((chunk, False, within), []).append((e, position))
        if (voice := episode.voice) is not None:
            for chunk, position in zip(voice.chunk.tolist(), voice.sampled_at.tolist(), strict=True):
                calls.setdefault((chunk, True, 0), []).append((e, position))
    return [(call[0], call[1], calls[call]) for call in sorted(calls)]


def _parts(inputs: Inputs, rows: slice) -> dict[str, Part]:
    """The parts of a forward pass, of which the traced episode has those ``rows``."""
    frames, said, patches = (_inside(at, rows) for at in (inputs.audio_rows, inputs.own_rows, inputs.image_rows))
    ends = [0, *inputs.patches.count.cumsum(0).tolist()]
    return {
        TEXT: Part(len(inputs.tokens), rows),
        AUDIO: Part(len(inputs.codes), frames),
        OWN: Part(len(inputs.own), said),
        PICTURES: Part(len(inputs.patches.pictures), slice(ends[patches.start], ends[patches.stop])),
        PATCHES: Part(len(inputs.patches), patches),
    }


def _inside(places: Tensor, rows: slice) -> slice:
    """Which of the ascending ``places`` lie in those rows."""
    first, end = torch.searchsorted(places, torch.tensor([rows.start, rows.stop])).tolist()
    return slice(first, end)


def _part(lengths: Sequence[int], at: int) -> slice:
    """The rows of segment ``at``; none for a segment that is not there."""
    first = sum(lengths[:at])
    return slice(first, first + lengths[at]) if at < len(lengths) else slice(0, 0)
