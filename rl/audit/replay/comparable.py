"""Whether a saved episode can be compared with the learner.

Its contract must be this program's, its weights those of the checkpoint (by a digest computed again from the file), its
temperature the recipe's, and its tokens, positions and masks those that a session makes from its audio, video, events
and actions.
"""

from __future__ import annotations

import torch

from kernels import dispatch
from model.config import MEL_BINS
from rl.audit.document import Reason
from rollout.record.episode import Episode, check_sound, check_tensors, tensors
from rollout.record.transcript import write_transcript
from rollout.turn.action import CHUNK_FRAMES
from rollout.turn.grammar import Grammar

DTYPES = {
    "tokens": torch.int64,
    "codes": torch.uint8,
    "contexts": torch.int64,
    "frames.pixels": torch.uint8,
    "frames.sizes": torch.int64,
    "text.sampled_at": torch.int64,
    "text.row_class": torch.int64,
    "text.chunk": torch.int64,
    "text.logprob": torch.float32,
    "text.digest": torch.int64,
    "voice.sampled_at": torch.int64,
    "voice.row_class": torch.int64,
    "voice.chunk": torch.int64,
    "voice.logprob": torch.float32,
    "voice.digest": torch.int64,
    "voice.payload": torch.float32,
}


def other_contract(episode: Episode) -> tuple[Reason, str] | None:
    """The reason and a sentence when the episode was sampled under another contract than this program's; else None."""
    contract_id = dispatch.contract_id()
    if episode.contract_id == contract_id:
        return None
    return Reason.CONTRACT, f"sampled under contract {episode.contract_id}; this program's is {contract_id}"


def incomparable(
    episode: Episode, digest: str, temperature: float, grammar: Grammar, steps: int | None = None
) -> tuple[Reason, str] | None:
    """Why the episode cannot be compared with the learner with weights ``digest``, whose recipe has this temperature
    and grammar, and whose chains of sound have so many ``steps`` (None without a voice): a reason and a sentence, or
    None."""
    if other := other_contract(episode):
        return other
    if episode.weights_digest != digest:
        return Reason.WEIGHTS, f"sampled from weights {episode.weights_digest}; the checkpoint's are {digest}"
    if episode.temperature != temperature:
        return (
            Reason.TEMPERATURE,
            f"sampled at temperature {episode.temperature}; the recipe's is {temperature}",
        )
    return _other_layout(episode, grammar, steps)


def _other_layout(episode: Episode, grammar: Grammar, steps: int | None) -> tuple[Reason, str] | None:
    """Compares the episode with the sequence that a session makes of the same audio and actions."""
    if unknown := sorted(tensors(episode).keys() - DTYPES.keys()):
        return Reason.TOKENS, f"it has {', '.join(unknown)}, which this program does not score"
    if wrong := [name for name, tensor in tensors(episode).items() if tensor.dtype != DTYPES[name]]:
        return Reason.TOKENS, f"its {', '.join(wrong)} are of other types than a session's"
    if episode.codes.numel() and int(episode.codes.max()) >= MEL_BINS:
        return Reason.TOKENS, f"its audio has codes above {MEL_BINS - 1}"
    try:
        codes = episode.codes.unflatten(0, (len(episode.actions), CHUNK_FRAMES))
        summaries = _summaries(episode, grammar)
        check_tensors(episode)
        check_sound(episode, steps)
        made = write_transcript(codes, episode.actions, grammar, episode.frames, episode.events, summaries)
    except (ValueError, RuntimeError) as error:
        return Reason.TOKENS, f"no session makes such an episode: {str(error).splitlines()[0]}"
    if not torch.equal(episode.tokens, made.tokens) or not torch.equal(episode.contexts, made.contexts):
        return Reason.TOKENS, "its tokens are not those of its audio, video, events and actions"
    for stream, wanted in ((episode.text, made.text), (episode.voice, made.voice)):
        if stream is None or wanted is None:  # both: by `check_sound` there is sound in all chunks that speak, or none
            continue
        sizes = {len(t) for t in (stream.logprob, stream.digest, wanted.chunk)}
        same = torch.equal(stream.sampled_at, wanted.sampled_at) and torch.equal(stream.chunk, wanted.chunk)
        if not same or len(sizes) > 1:
            return Reason.POSITIONS, "its sampled positions are not where the model chose"
        if not torch.equal(stream.row_class, wanted.row_class):
            return Reason.MASKS, "its masks are not those under which the model chose"
    return None


def _summaries(episode: Episode, grammar: Grammar) -> list[list[int]]:
    """The sampled tokens before the beginning of each later context, as far as they can be summaries."""
    if grammar.summary is None:
        return []
    sampled, tokens = set(episode.text.sampled_at.tolist()), episode.tokens.tolist()
    found = []
    for begin in episode.contexts.tolist()[1:]:
        last = begin - 1 if begin - 1 in sampled else begin - 2  # an end that was forced
        first = last
        while first - 1 in sampled and last - first + 1 < grammar.summary.words:
            first -= 1
        found.append(tokens[first : last + 1])
    return found
