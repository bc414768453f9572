"""A scripted conversation as the token sequence that a session with these actions would have.

Demonstrations for supervised training are made this way. Sessions and transcripts use one grammar
(`rollout.turn.grammar`), and a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.inputs import one_context
from model.logprob import NEXT_TEXT
from model.senses.audio import DMel
from model.senses.video import NO_FRAMES, NO_VIDEO, Frames
from model.voice.config import BANDS, FRAMES
from rollout.record.episode import Choices, heard_codes
from rollout.turn.action import CHUNK_FRAMES, Action
from rollout.turn.grammar import Grammar
from rollout.turn.observation import Observation, check_observation, stack_audio

NO_SOUND = torch.empty(0, FRAMES, BANDS)
NO_EVENTS: Mapping[int, tuple[str, ...]] = {}


@dataclass(frozen=True)
class Transcript:
    """A conversation of T tokens, A of them audio, and which tokens are targets of the model."""

    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80]
    text: Choices  # the targets
    frames: Frames = NO_VIDEO
    contexts: Tensor = field(default_factory=one_context)  # int64 [C], as in `Episode`
    voice: Choices | None = None  # where sound is to be sampled: N chunks of it
    sound: Tensor = NO_SOUND  # fp32 [N, FRAMES, BANDS], the targets
    chunks: int = 0  # all, if there is sound
    key: int = 0  # of the noise with which sound is learnt (`rollout.seeds.session_key`)

    @property
    def own(self) -> Tensor:
        """As in `Episode`."""
        return self.codes[:0] if self.voice is None else heard_codes(self.sound, self.voice.chunk, self.chunks)


def from_observations(observations: Sequence[Observation], actions: Sequence[Action], grammar: Grammar) -> Transcript:
    """As `write_transcript`, from one observation for each chunk. Raises as an engine would (`check_observation`)."""
    for observation in observations:
        check_observation(observation, grammar)
    codes = DMel.build().codes(stack_audio(observations).view(1, -1))[0]
    frames = Frames.of([o.frames for o in observations])
    events = {k: o.events for k, o in enumerate(observations)}
    return write_transcript(codes.unflatten(0, (-1, CHUNK_FRAMES)), actions, grammar, frames, events)


def write_transcript(
    codes: Tensor,
    actions: Sequence[Action],
    grammar: Grammar,
    frames: Frames = NO_VIDEO,
    events: Mapping[int, tuple[str, ...]] = NO_EVENTS,
    summaries: Sequence[Sequence[int]] | None = None,
) -> Transcript:
    """From dMel codes uint8 [chunks, CHUNK_FRAMES, 80], one action for each chunk, the video, and by chunk the texts of
    events; ``summaries``: the sampled tokens of those that the grammar asks for, in order. By default a summary repeats
    the last words that were said, which is what a demonstration shows.

    Raises ValueError when the numbers of chunks differ or are 0, an action has too many or unknown words, a summary is
    missing, too many, or none, or an action that speaks lacks the sound that a model with a voice makes, or has some
    that is no chunk."""
    if len(codes) != len(actions) or not actions:
        raise ValueError(f"transcript: {len(codes)} chunks of audio and {len(actions)} actions; give one each, or more")
    shown = dict(frames.chunks())
    if beyond := [k for k in (*shown, *events) if k >= len(actions)]:
        raise ValueError(f"transcript: video or events in chunk {beyond[0]} of {len(actions)} chunks")
    tokens, contexts = [grammar.vocabulary.bos], [0]
    chosen: list[tuple[int, int, int]] = []
    said: list[int] = []
    given = None if summaries is None else list(summaries)
    voiced: list[tuple[int, int, int]] = []
    sound: list[Tensor] = []
    for k, action in enumerate(actions):
        if grammar.needs_summary(len(tokens) - contexts[-1]):
            summary = _scripted(said, grammar) if given is None else _next(given, grammar, k)
            tokens += grammar.summary.request if grammar.summary else ()
            chosen += [(len(tokens) + i, NEXT_TEXT, k) for i in range(len(summary))]
            tokens += [*summary, *([] if summary[-1] == grammar.vocabulary.end else [grammar.vocabulary.end])]
            contexts.append(len(tokens))
            tokens += grammar.begin_context(summary)
        tokens += grammar.observed(shown.get(k, NO_FRAMES), events.get(k, ()), bool(voiced) and voiced[-1][2] == k - 1)
        try:
            sampled = grammar.write(action)
        except ValueError as error:
            raise ValueError(f"transcript: chunk {k}: {error}") from error
        chosen += [(len(tokens) + i, grammar.row_class(sampled[:i]), k) for i in range(len(sampled))]
        tokens += sampled + grammar.forced(sampled)
        if grammar.voice and action.speaks:
            voiced.append((len(tokens), 0, k))
            sound.append(_checked(action.sound, k))
        said += [grammar.vocabulary.word_id(word) for word in action.words]
    text = Choices(*(torch.tensor(column) for column in zip(*chosen, strict=True)))
    if given:
        raise ValueError(f"transcript: {len(given)} summaries more than were asked for")
    written = Transcript(torch.tensor(tokens), codes.flatten(0, 1), text, frames, torch.tensor(contexts))
    if not voiced:
        return written
    voice = Choices(*(torch.tensor(column) for column in zip(*voiced, strict=True)))
    return replace(written, voice=voice, sound=torch.stack(sound), chunks=len(actions))


def _checked(sound: Tensor | None, chunk: int) -> Tensor:
    if sound is None:
        raise ValueError(f"transcript: chunk {chunk} speaks, but has no sound")
    if sound.shape != (FRAMES, BANDS) or sound.dtype != torch.float32 or not bool(sound.isfinite().all()):
        raise ValueError(
            f"transcript: the sound of chunk {chunk} is {list(sound.shape)}, need finite float32 {[FRAMES, BANDS]}"
        )
    return sound


def _scripted(said: Sequence[int], grammar: Grammar) -> list[int]:
    """The last words that were said, and the end token where there is room."""
    assert grammar.summary is not None
    kept = list(said)[-grammar.summary.words :]
    return kept if len(kept) == grammar.summary.words else [*kept, grammar.vocabulary.end]


def _next(given: list[Sequence[int]], grammar: Grammar, chunk: int) -> list[int]:
    if not given:
        raise ValueError(f"transcript: the summary before chunk {chunk} is missing")
    summary = list(given.pop(0))
    ends = [i for i in range(len(summary)) if grammar.summary_is_over(summary[: i + 1])]
    if ends != [len(summary) - 1]:
        raise ValueError(f"transcript: what is before chunk {chunk} is no summary")
    return summary
