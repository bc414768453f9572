"""Both sides of an episode as sound for the page: an MP3 of 16 kHz, left the user, right the model's voice.

MP3, since every browser plays it, it keeps time to the sample and equal sound gives equal bytes: 2 to 7 kB a second, by
how much is said and how loud the noise is. (libsndfile's Opus is no smaller, has other bytes in each call, and some
browsers play none in an Ogg file; mu-law at 8 kHz is 16 kB a second.)"""

from __future__ import annotations

import base64
from functools import cached_property

import soundfile
from torch import Tensor

from kernels.errors import MetronomeError
from model.program.reading import one_line
from rl.audit.records import Records
from rollout.heard import both_sides, encoded, user_sound
from rollout.record.episode import Episode
from rollout.turn.action import CHUNK_MS
from rollout.world.speech import SpeechBank

MP3 = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "VARIABLE", "compression_level": 0.9}
MOST_CHUNKS = 320
"""Of sound in a page: 64 s, eight episodes of 8 s, half a megabyte."""
LEFT_OUT = (
    f"The sound of this episode is not in this page, which holds the first {MOST_CHUNKS * CHUNK_MS // 1000} s; "
    "python -m rollout.listen renders it."
)
SIDES = "Left the user, right the model's voice, heard from the chunk after the one in which it is sampled."


class Sounds:
    """Makes the sounds of one page; owns how much room is left."""

    def __init__(self, records: Records) -> None:
        self._records, self._room = records, MOST_CHUNKS

    def of(self, episode: Episode) -> dict[str, dict[str, str]]:
        """{} for an episode without a voice, else {"sound": {"note": what is heard, or why nothing is, "mp3": base64,
        if there is sound}}."""
        if episode.voice is None:
            return {}
        if len(episode.actions) > self._room:
            return {"sound": {"note": LEFT_OUT}}
        self._room -= len(episode.actions)
        try:
            heard = both_sides(episode, self._user)
            data = base64.b64encode(encoded(heard, **MP3)).decode()
        except (MetronomeError, ValueError, RuntimeError, soundfile.SoundFileError) as error:
            return {"sound": {"note": f"No sound: {one_line(str(error))}."}}
        rough = f" The user's side is rough, rebuilt from dMel codes, because {heard.rough}." if heard.rough else ""
        return {"sound": {"note": SIDES + rough, "mp3": data}}

    def _user(self, episode: Episode) -> Tensor:
        if self._records.scenarios is None:
            raise MetronomeError("the recipe's families are unknown")
        return user_sound(episode, self._records.scenarios, self._bank)

    @cached_property
    def _bank(self) -> SpeechBank:
        return SpeechBank.open(self._records.config.speech_dir if self._records.config else None)
