"""Episodes as the page reads them: a short row for each in the list, and their details in blocks decoded on demand.

A block holds several episodes as gzip'd JSON. Rollouts of one scenario hear the same audio until the user reacts, so a
block stores each distinct chunk of dMel codes once, as 320 hexadecimal digits (4 frames x 80 channels, 16 bins), and
each distinct video frame once, as a picture.
"""

from __future__ import annotations

import base64
import gzip
import io
import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.program.reading import UnreadableError, to_json
from model.tokenizer import load_tokenizer, read_tokenizer
from reward.score import score_stored
from rl.audit.records import Records
from rl.audit.replay.rescore import CheckedEpisode
from rl.audit.sounds import Sounds
from rl.audit.verdict import exact
from rollout.record.episode import Episode
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.verdict import Outcome, Score
from rollout.turn.action import CHUNK_FRAMES

MAX_EPISODES = 5000
"""Most episodes in a page, of 1 to 3 kB each."""
EPISODES_PER_BLOCK = 24
"""Opening one episode decodes its whole block."""
PICTURE_SIDE = 128
"""Larger frames are shown reduced to this, in pixels of the longer side."""
MAX_PICTURES = 2000
"""Most distinct frames in a page, of some hundred bytes to 20 kB each; later ones are not shown."""


def browser(
    episodes: Sequence[CheckedEpisode], scenarios: ScenarioConfig | None, words: Mapping[int, str], sounds: Sounds
) -> dict[str, Any]:
    """``{"rows": one for each shown episode, "blocks": each block as base64 text, "omitted": number of episodes left
    out}``. The last episodes are left out first, those that differ last of all. ``scenarios``: the families whose rules
    score the episodes; None: they get no scores; ``words``: `words_of` their run; ``sounds``: of the same run."""
    shown = sorted(range(len(episodes)), key=lambda i: (episodes[i].state != "different", i))[:MAX_EPISODES]
    kept = [episodes[i] for i in sorted(shown)]
    rows: list[dict[str, Any]] = []
    blocks: list[str] = []
    drawn = 0
    for first in range(0, len(kept), EPISODES_PER_BLOCK):
        cells: dict[str, int] = {}
        pictures: dict[bytes, tuple[int, str]] = {}
        details = []
        for place, one in enumerate(kept[first : first + EPISODES_PER_BLOCK]):
            judged = score_stored(one.episode, scenarios) if scenarios else None
            sound = sounds.of(one.episode)
            aloud = {"sound": 1} if "mp3" in sound.get("sound", ()) else {}
            rows.append(_row(one, judged) | {"block": len(blocks), "place": place} | aloud)
            detail = _detail(one, judged, _user(one.episode.facts, scenarios), words, cells)
            details.append(detail | {"seen": _seen(one.episode, pictures, MAX_PICTURES - drawn)} | sound)
        drawn += len(pictures)
        block = {"cells": list(cells), "pictures": [picture for _, picture in pictures.values()], "episodes": details}
        packed = gzip.compress(to_json(block, None).encode(), 6, mtime=0)
        blocks.append(base64.b64encode(packed).decode())
    return {"rows": rows, "blocks": blocks, "omitted": len(episodes) - len(kept)}


def words_of(records: Records) -> dict[int, str]:
    """The run's words by token id: of the newest checkpoint whose tokenizer can be read, else the shipped ones."""
    tokenizer = load_tokenizer()
    for _, folder in sorted(records.checkpoints.items(), reverse=True):
        try:
            tokenizer = read_tokenizer(folder / "model")
            break
        except UnreadableError:  # an older version saved it, or it is damaged: `check_checkpoints` says so
            continue
    return {i: word for word, i in tokenizer.get_vocab().items()}


def _row(one: CheckedEpisode, judged: Score | None) -> dict[str, Any]:
    outcomes = [event.outcome for event in judged.events] if judged else []
    return {
        "step": one.step,
        "name": one.episode.name,
        "family": one.episode.family,
        "state": one.state,
        "said": " ".join(word for action in one.episode.actions for word in action.words),
        "score": _plain(judged.value) if judged else None,
        "rewards": {axis: _plain(values.sum()) for axis, values in judged.rewards.items()} if judged else {},
        "tokens": len(one.episode.text.logprob),
        "unequal": int(one.token_differs.sum()),
        "rows": int(one.row_differs.sum()),
        "missed": outcomes.count(Outcome.MISSED) + outcomes.count(Outcome.WRONG),
        "spurious": outcomes.count(Outcome.SPURIOUS),
    }


def _detail(
    one: CheckedEpisode, judged: Score | None, user: list[list[Any]], words: Mapping[int, str], cells: dict[str, int]
) -> dict[str, Any]:
    episode = one.episode
    return {
        "why_not": one.why_not[1] if one.why_not else None,
        "audio": _audio(episode.codes, cells),
        "actions": [[action.mode.value, *action.words] for action in episode.actions],
        "user": user,
        "events": [
            [
                e.chunk,
                e.kind,
                e.outcome.value,
                e.due,
                {axis: _plain(e.rewards.get(axis, 0.0)) for axis in judged.rewards},
            ]
            for e in judged.events
        ]
        if judged
        else [],
        "rewards": {axis: [_plain(v) for v in values] for axis, values in judged.rewards.items()} if judged else None,
        "tokens": _tokens(one, words),
    }


def _audio(codes: Tensor, cells: dict[str, int]) -> list[int]:
    """The index in ``cells`` of each chunk's codes; a last chunk that is not whole is left out."""
    digits = codes.clamp(max=15).numpy().tobytes().hex()[1::2]  # one hexadecimal digit a code
    size = CHUNK_FRAMES * codes.shape[-1]
    chunks = [digits[i : i + size] for i in range(0, len(digits) - size + 1, size)]
    return [cells.setdefault(chunk, len(cells)) for chunk in chunks]


def _seen(episode: Episode, pictures: dict[bytes, tuple[int, str]], room: int) -> list[list[int]]:
    """[chunk, index in ``pictures`` of each of its frames …] for each chunk with video. ``pictures``: (index, PNG as
    base64) by digest, to which at most ``room`` may belong."""
    seen = []
    try:
        chunks = episode.frames.chunks()
    except (ValueError, RuntimeError):  # damaged: `rl.audit.replay.comparable` says so
        return []
    for k, frames in chunks:
        places = []
        for frame in frames.numpy():
            key = blake2b(f"{frame.shape}".encode() + frame.tobytes(), digest_size=16).digest()
            if key not in pictures and len(pictures) < room:
                pictures[key] = len(pictures), _png(frame)
            if key in pictures:
                places.append(pictures[key][0])
        if places:
            seen.append([k, *places])
    return seen


def _png(frame: NDArray[np.uint8]) -> str:
    """uint8 [H, W, 3] -> a PNG as base64, reduced to `PICTURE_SIDE`."""
    picture, out = Image.fromarray(frame), io.BytesIO()
    if max(picture.size) > PICTURE_SIDE:
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BOX)
    picture.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def _tokens(one: CheckedEpisode, words: Mapping[int, str]) -> list[list[Any]]:
    """[chunk, text, class, sampler's log-prob, learner's where it differs, whether the row's digest differs] of each
    sampled token. Log-probs are text, because JSON has no NaN and a page must not round."""
    e = one.episode
    learner = e.text.logprob if one.logprob is None else one.logprob
    tokens = e.tokens.tolist()
    text = e.text
    columns = (text.chunk, text.sampled_at, text.row_class, text.logprob, learner, one.token_differs, one.row_differs)
    out: list[list[Any]] = []
    # A file's columns may differ in length; such an episode is not comparable, and shown as far as all of them go.
    for chunk, at, row_class, p, q, token_differs, row_differs in zip(*(c.tolist() for c in columns), strict=False):
        token = tokens[at] if 0 <= at < len(tokens) else -1
        differs = exact(q) if token_differs else None
        out.append([chunk, words.get(token, f"#{token}"), row_class, exact(p), differs, int(row_differs)])
    return out


def _plain(value: float) -> float | None:
    value = float(value)
    return round(value, 4) if math.isfinite(value) else None


def _user(facts: Mapping[str, Any], scenarios: ScenarioConfig | None) -> list[list[Any]]:
    """What the user did, as [first chunk, last chunk, kind, words]; nothing where the facts cannot be read."""
    try:
        spans = scenarios.stored_facts(facts).spans() if scenarios else []
        return [[span.first, span.last, span.kind, span.text] for span in spans]
    except (UnreadableError, KeyError, ValueError, TypeError, IndexError, AttributeError):
        return []
