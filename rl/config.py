"""The recipe of a run: typed, frozen, read from YAML with dotted overrides; unknown keys are errors.

Each field's default is the quickstart's. Lengths are in steps, never in seconds: a run's result may not depend on how
fast the machine is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from transformers import InklingConfig

from model.config import Preset, preset, with_voice
from model.context import ContextConfig
from model.inputs import Senses
from model.placement import PlacementConfig
from model.program.folders import RunName
from model.program.outputs import OutputFolder
from model.program.ranges import (
    Distinct,
    EventWords,
    Every,
    FilePath,
    Fraction,
    Length,
    Patches,
    Probability,
    Range,
    Seed,
    Some,
    Steps,
    Temperature,
    Text,
    Tokens,
    Weight,
    Words,
)
from model.voice.config import VoiceConfig
from reward.source import SourceConfig
from rl.hub import HubConfig
from rl.tracking.settings import TrackingConfig
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.grammar import Grammar
from rollout.turn.summary import Summary
from rollout.turn.vocabulary import Vocabulary

SoundAxes = Annotated[tuple[Annotated[str, Text(40)], ...], Length(0, 100), Distinct()]


@dataclass(frozen=True)
class ModelRecipe:
    """The model to train: a preset with fresh weights, or a checkpoint in transformers' format."""

    preset: Preset = "tiny"
    checkpoint: FilePath | None = None  # folder to start from; its config.json replaces the preset
    voice: VoiceConfig | None = None  # of a fresh model; None is one without a voice
    dtype: Literal["float32", "bfloat16"] = "float32"

    def fresh(self) -> InklingConfig:
        """The shape of a fresh model."""
        shape = preset(self.preset)
        return shape if self.voice is None else with_voice(shape, self.voice)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW as DeepSpeed drives it."""

    lr: Annotated[float, Range(0.0, 1.0)] = 6e-4
    beta1: Annotated[float, Range(0.0, 0.999999)] = 0.9
    beta2: Annotated[float, Range(0.0, 0.999999)] = 0.95
    weight_decay: Fraction = 0.02
    warmup_steps: Steps = 20  # linear, from 0
    final_lr: Fraction = 0.2  # fraction of lr reached, linearly, at the last step
    clip_norm: Annotated[float, Range(0.0, 1e6)] = 0.5  # of the whole gradient; 0 turns clipping off
    zero_stage: Literal[0, 1, 2] = 1


@dataclass(frozen=True)
class WarmstartConfig:
    """Supervised warm start on scripted demonstrations, wrong by the mistakes of the families' settings."""

    steps: Steps = 320
    episodes: Some = 16  # demonstrations a step, over all ranks
    voice_weight: Weight = 1.0  # of the mean flow-matching loss of a chunk of sound beside the mean loss of a token
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=3e-3, clip_norm=1.0))


@dataclass(frozen=True)
class RLConfig:
    """Strictly on-policy reinforcement learning: one rollout batch, one optimizer step."""

    steps: Steps = 120
    groups: Some = 8  # scenarios a step, over all ranks; families take turns
    rollouts: Annotated[int, Range(2, 10**4)] = 6  # of each scenario; advantages compare them with each other
    gamma: Probability = 0.9  # discount a chunk; at 0.6 a reminder too early paid more than one on time
    axis_weights: dict[str, Weight] = field(default_factory=dict)  # of axes of reward; 1 where left out
    reference_weight: Weight = 0.0  # cost of a nat of reference KL, beside advantages of size 1; 0 turns it off
    voice_weight: Weight = 1.0  # of a chunk of sound beside a token, for a model with a voice
    sound_axes: SoundAxes = ()  # axes of reward that chunks of sound are weighted by; all where none is named
    optim: OptimConfig = field(default_factory=OptimConfig)
    micro_batch: Some = 8  # episodes in one learner forward; does not enter the result beyond summation order
    # So many processes share the rows of the same episodes, for long ones; the bits are those of one process.
    sequence_parallel: Annotated[int, Range(1, 1024)] = 1
    checkpoint_every: Every = 40
    evaluate_every: Every = 20
    save_episodes_every: Steps = 40  # episode records to disk every so many steps; 0 never


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["session", "vllm"] = "session"  # embedded, or vLLM; the same bits
    temperature: Temperature = 1.0
    words_per_chunk: Words = 1
    max_patches: Patches = 0  # of video in a micro-turn: rows x columns of the model's patches; 0 is no video
    max_event_words: EventWords = 0  # of text events in a micro-turn
    max_tokens: Tokens = 512  # longest session; with a window it bounds no memory
    context: ContextConfig = field(default_factory=ContextConfig)  # what the model remembers of it
    # Processes beside each learner process that roll out (vllm: at most 1); 0: in the learner's own.
    workers: Annotated[int, Range(0, 1024)] = 0
    worker_threads: Annotated[int, Range(1, 1024)] | None = None  # of each; None is an even share of the cores
    # To get ready, and for a share of a step; then another one plays it.
    worker_timeout_s: Annotated[float, Range(0.1, 1e6)] = 120.0

    @property
    def extra(self) -> int:
        """The most observed rows beside audio that one micro-turn can have."""
        return self.max_patches + self.max_event_words

    def grammar(self, vocabulary: Vocabulary, senses: Senses) -> Grammar:
        """``senses``: the model's."""
        return Grammar(
            vocabulary,
            self.words_per_chunk,
            self.max_patches,
            self.max_event_words,
            senses.patch,
            Summary.of(self.context, vocabulary),
            senses.own,
        )


@dataclass(frozen=True)
class EvalConfig:
    """Held-out scenarios, sampled at the training temperature."""

    scenarios: Some = 96  # of each family, before and after
    during: Some = 24  # of each family, every rl.evaluate_every steps


@dataclass(frozen=True)
class TrainConfig:
    name: Annotated[str, RunName()] = "quickstart"
    runs: Annotated[str, OutputFolder()] = "runs"  # folder that holds run folders
    seed: Seed = 0
    speech_dir: FilePath | None = None  # recordings with a manifest; None is the set shipped with the program
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    scenarios: ScenarioConfig = field(default_factory=ScenarioConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    warmstart: WarmstartConfig = field(default_factory=WarmstartConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    hub: HubConfig = field(default_factory=HubConfig)
