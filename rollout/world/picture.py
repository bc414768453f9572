"""The pictures that simulated users show: a figure on a soft background with grain, in integers.

All arithmetic is of integers, so a pixel is the same on every machine. Positions and sizes are in eighths of a pixel
(`STEPS`), with x to the right and y down from the picture's centre. Nothing here knows time or scenarios. Figures have
hard edges: there is no anti-aliasing. All randomness is from `rollout.seeds.generator`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from model.program.ranges import Ascending, Range
from rollout.world.speech import Split

STEPS = 8
"""Positions and sizes are in units of one pixel divided by this."""

Pixels = NDArray[np.int32]
Mask = NDArray[np.bool_]
Colour = tuple[int, int, int]
"""Red, green and blue."""

SHAPES: Mapping[Split, Mapping[str, Callable[[Pixels, Pixels, int], Mask]]] = {
    "train": {
        "disc": lambda x, y, r: x * x + y * y <= r * r,
        "square": lambda x, y, r: 8 * np.maximum(abs(x), abs(y)) <= 7 * r,
        "triangle": lambda x, y, r: (2 * abs(x) <= y + r) & (y <= r),
    },
    "held_out": {
        "ring": lambda x, y, r: (x * x + y * y <= r * r) & (4 * (x * x + y * y) >= r * r),
        "cross": lambda x, y, r: (3 * np.minimum(abs(x), abs(y)) <= r) & (np.maximum(abs(x), abs(y)) <= r),
        "diamond": lambda x, y, r: 4 * (abs(x) + abs(y)) <= 5 * r,
    },
}
"""From split and name to the points of a shape: (x, y, radius) -> whether (x, y), from the shape's centre, is inside.
No shape is in both splits."""
_INSIDE = {name: inside for shapes in SHAPES.values() for name, inside in shapes.items()}


@dataclass(frozen=True)
class Figure:
    """A shape of one colour. Example: ``Figure("disc", 40, (200, 180, 150))`` is a disc of radius 5 pixels."""

    shape: str  # a name of `SHAPES`
    radius: int  # in eighths of a pixel
    colour: Colour


_Level = Annotated[int, Range(0, 255)]
_Levels = Annotated[tuple[_Level, _Level], Ascending()]
_Percent = Annotated[int, Range(0, 50)]
_Percents = Annotated[tuple[_Percent, _Percent], Ascending()]


@dataclass(frozen=True)
class LooksConfig:
    """What is to be seen; each scenario draws from these ranges. Levels are of 0 to 255; distances, sizes and speeds in
    percent of the picture's side."""

    side: Annotated[int, Range(8, 512)] = 31  # pixels; the picture is square
    distance: _Percents = (27, 33)  # of a shape's place from the centre, in the direction that its word names
    aside: _Percent = 10  # the most by which the place is beside that direction
    travel: _Percent = 6  # the most by which a moving shape is away from its place, across and down
    contrast: _Levels = (70, 130)  # of a shape with the background at the centre, for each of red, green and blue
    slope: _Level = 20  # the most by which the background's level changes from the centre to an edge
    grain: _Level = 8  # noise of each pixel
    drift: _Level = 4  # the most by which the picture's brightness changes from chunk to chunk
    drifts: _Level = 20  # and in all
    flicker: _Levels = (50, 100)  # brightness added to the whole picture while it flickers
    spot_contrast: _Levels = (15, 30)  # of a faint spot
    spot_radius: _Percents = (4, 6)
    level: _Levels = (60, 110)  # train: of the background at the centre, each of red, green and blue
    radius: _Percents = (13, 19)  # train: of a shape
    speed: _Percents = (0, 1)  # train: of a shape, in each direction, a chunk
    held_out_level: _Levels = (35, 60)
    held_out_radius: _Percents = (15, 22)
    held_out_speed: _Percents = (2, 3)

    def steps(self, percent: int) -> int:
        """So many percent of the side, in eighths of a pixel."""
        return percent * self.side * STEPS // 100

    def background(self, rng: np.random.Generator, split: Split) -> tuple[Colour, Pixels]:
        """(the level at the centre, the background int32 [side, side, 3]) of one scenario."""
        level = _colour(rng, self.held_out_level if split == "held_out" else self.level)
        slope = draw(rng, (-self.slope, self.slope)), draw(rng, (-self.slope, self.slope))
        return level, backdrop(self.side, level, slope)

    def figure(self, rng: np.random.Generator, split: Split, level: Colour) -> Figure:
        """A shape, brighter than a background of ``level``."""
        shape = list(SHAPES[split])[rng.integers(len(SHAPES[split]))]
        radius = draw(rng, self.held_out_radius if split == "held_out" else self.radius)
        return Figure(shape, self.steps(radius), _brighter(level, _colour(rng, self.contrast)))

    def velocity(self, rng: np.random.Generator, split: Split) -> tuple[int, int]:
        """Speed of a shape to the right and down, eighths of a pixel a chunk."""
        low, high = (self.steps(one) for one in (self.held_out_speed if split == "held_out" else self.speed))
        return draw(rng, (low, high)), draw(rng, (low, high))

    def spot(self, rng: np.random.Generator, level: Colour) -> Figure:
        """A small disc, a little brighter than a background of ``level``."""
        contrast = draw(rng, self.spot_contrast)
        return Figure("disc", self.steps(draw(rng, self.spot_radius)), _brighter(level, (contrast,) * 3))

    def brightness(self, rng: np.random.Generator, chunks: int) -> tuple[int, ...]:
        """What is added to the whole picture in each chunk, [chunks]: a random walk."""
        walk, at = [], 0
        for _ in range(chunks):
            at = min(max(at + draw(rng, (-self.drift, self.drift)), -self.drifts), self.drifts)
            walk.append(at)
        return tuple(walk)


def draw(rng: np.random.Generator, pair: tuple[int, int]) -> int:
    """A number of a range, ends included."""
    return int(rng.integers(pair[0], pair[1] + 1))


def _colour(rng: np.random.Generator, pair: tuple[int, int]) -> Colour:
    return draw(rng, pair), draw(rng, pair), draw(rng, pair)


def _brighter(level: Colour, by: Colour) -> Colour:
    return level[0] + by[0], level[1] + by[1], level[2] + by[2]


def backdrop(side: int, level: Colour, slope: tuple[int, int]) -> Pixels:
    """A plain background, or one with a gradient: int32 [side, side, 3].

    ``level``: at the centre; ``slope``: what is added at the right edge and at the lower edge, and subtracted at
    the opposite ones."""
    x, y = _coordinates(side)
    gradient = (slope[0] * x + slope[1] * y) // (STEPS // 2 * side)
    return gradient[:, :, None] + np.array(level, np.int32)


def grain(rng: np.random.Generator, side: int, most: int) -> Pixels:
    """Noise of each pixel and colour, uniform from -``most`` to ``most``: int32 [side, side, 3]."""
    return rng.integers(-most, most + 1, (side, side, 3), dtype=np.int32)


def paint(canvas: Pixels, figure: Figure, x: int, y: int) -> Pixels:
    """The canvas, int32 [side, side, 3], with the figure's centre at (x, y); what lies outside is cut off."""
    across, down = _coordinates(len(canvas))
    inside = _INSIDE[figure.shape](across - x, down - y, figure.radius)
    return np.where(inside[:, :, None], np.array(figure.colour, np.int32), canvas)


def developed(canvas: Pixels) -> NDArray[np.uint8]:
    """The canvas with values cut off at 0 and 255: uint8 [side, side, 3]."""
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _coordinates(side: int) -> tuple[Pixels, Pixels]:
    """(x, y) of each pixel's centre, int32 [1, side] and [side, 1]."""
    along = STEPS // 2 * (2 * np.arange(side, dtype=np.int32) - (side - 1))
    return along[None, :], along[:, None]


def to_and_fro(way: int, most: int) -> int:
    """Where one is that went ``way`` along a line and turned round at ``most`` and -``most``; 0 if ``most`` is."""
    if not most:
        return 0
    along = (way + most) % (4 * most)
    return (along if along <= 2 * most else 4 * most - along) - most
