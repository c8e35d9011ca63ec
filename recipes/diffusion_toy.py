"""The toy world of the embedded diffusion demo: drawings with captions, and a detector that reads a drawing back.

A drawing is one object on grey: a shape with a pattern and a colour, in one of four places. A caption names them:
"a red striped circle at the top left" ("plain" is not said). One combination of shape and pattern is kept out of
pretraining: it is the concept that a LoRA learns from five drawings.
"""

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np

SIZE = 16  # pixels a side
SHAPES = ("circle", "square", "triangle")
PATTERNS = ("plain", "striped", "framed")
COLOURS = {"red": (255, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 255), "yellow": (255, 230, 30)}
BACKGROUND = 150  # grey: on white, colour is little of what there is to learn
PLACES = {"top left": (5, 5), "top right": (5, 11), "bottom left": (11, 5), "bottom right": (11, 11)}  # row, column
CONCEPT = ("triangle", "striped")
_RADIUS = 4
_JITTER = 1  # of the centre, in pixels
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and what the detector finds."""

    shape: str
    pattern: str
    colour: str
    place: str

    def caption(self, noun: str | None = None) -> str:
        """The caption; `noun` stands in for the pattern and the shape, as the token of a concept does."""
        named = noun or (self.shape if self.pattern == "plain" else f"{self.pattern} {self.shape}")
        return f"a {self.colour} {named} at the {self.place}"


def _distance(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Distance to the outline in pixels, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - _RADIUS
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - _RADIUS
    side = (2 * abs(x) - (y + 1.1 * _RADIUS)) / np.sqrt(5)  # two sides at once; they rise twice as fast as they part
    return np.maximum(side, y - _RADIUS)


@cache
def _masks(shape: str, pattern: str, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel the object covers and how much the black of its pattern, each (SIZE, SIZE) in [0, 1]."""
    fine = (np.arange(SIZE * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    y, x = np.meshgrid(fine - row, fine - column, indexing="ij")
    distance = _distance(shape, y, x)
    inside = distance <= 0
    if pattern == "striped":
        black = inside & (np.floor((y + _RADIUS) / 2) % 2 == 1)
    elif pattern == "framed":
        black = inside & (distance > -1.2)
    else:
        black = np.zeros_like(inside)
    coarse = (SIZE, _SUPERSAMPLING, SIZE, _SUPERSAMPLING)
    return inside.reshape(coarse).mean(axis=(1, 3)), black.reshape(coarse).mean(axis=(1, 3))


def _paint(shape: str, pattern: str, colour: str, row: int, column: int) -> np.ndarray:
    """The picture, (SIZE, SIZE, 3) floats in [0, 255]."""
    inside, black = (mask[..., None] for mask in _masks(shape, pattern, row, column))
    return BACKGROUND * (1 - inside) + np.array(COLOURS[colour]) * (inside - black)


def draw(drawing: Drawing, rng: np.random.Generator) -> np.ndarray:
    """The picture with its place shifted by at most a pixel each way, (SIZE, SIZE, 3) uint8."""
    row, column = np.array(PLACES[drawing.place]) + rng.integers(-_JITTER, _JITTER + 1, 2)
    return np.rint(_paint(drawing.shape, drawing.pattern, drawing.colour, int(row), int(column))).astype(np.uint8)


def combinations(concept: bool) -> list[Drawing]:
    """All drawings of the concept, or all of the others."""
    return [
        Drawing(*parts)
        for parts in itertools.product(SHAPES, PATTERNS, COLOURS, PLACES)
        if (parts[:2] == CONCEPT) == concept
    ]


@cache
def _templates() -> tuple[list[Drawing], np.ndarray, np.ndarray]:
    """Every drawing at every place it can have and two pixels around: what it shows, (n, pixels), its energy (n,)."""
    shown, pictures = [], []
    shifts = range(-_JITTER - 2, _JITTER + 3)
    for drawing in combinations(concept=True) + combinations(concept=False):
        row, column = PLACES[drawing.place]
        for down, right in itertools.product(shifts, shifts):
            shown.append(drawing)
            pictures.append(_paint(drawing.shape, drawing.pattern, drawing.colour, row + down, column + right))
    flat = np.stack(pictures).reshape(len(shown), -1).astype(np.float32) / 255 - BACKGROUND / 255
    return shown, flat, (flat**2).sum(axis=1)


def detect(pictures: np.ndarray, tolerance: float = 0.3) -> list[Drawing | None]:
    """What each picture shows: the nearest of all possible drawings, or None where even that is far.

    Args:
        pictures: (n, SIZE, SIZE, 3) uint8.
        tolerance: the largest squared distance to a drawing, as a share of the drawing's own to the empty one.
    """
    shown, templates, energy = _templates()
    flat = pictures.reshape(len(pictures), -1).astype(np.float32) / 255 - BACKGROUND / 255
    distance = (flat**2).sum(axis=1)[:, None] - 2 * flat @ templates.T + energy  # (n, templates), squared
    best = distance.argmin(axis=1)
    return [shown[j] if distance[i, j] <= tolerance * energy[j] else None for i, j in enumerate(best)]
