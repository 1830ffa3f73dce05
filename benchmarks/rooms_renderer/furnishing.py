"""A room and what stands in it: sizes, colours, lights, and furniture without overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .catalogue import CLASSES, Model, Vector

# Classes that each type of room is furnished with: those that come first, and those to choose more from.
TYPES = {
    "bedroom": (("bed", "storage"), ("storage", "chair", "table", "object", "appliance", "person")),
    "living room": (("sofa", "table"), ("chair", "chair", "storage", "object", "appliance", "person")),
    "kitchen": (("storage", "appliance", "table"), ("chair", "storage", "appliance", "object", "person")),
    "bathroom": (("bath", "bath"), ("bath", "storage", "object", "appliance")),
    "office": (("table", "chair", "storage"), ("chair", "storage", "appliance", "object", "person")),
}
BACKED = frozenset({"bed", "sofa", "storage", "appliance", "bath", "window", "door"})  # these stand against a wall
GAP = 0.04  # metres between two pieces
TRIES = 25  # places tried for a piece before it is left out
ON_TOP = 0.55  # metres: the longest side of what is put on a table
LOWEST, HIGHEST = 0.25, 1.3  # metres: tops that things are put on


@dataclass(frozen=True)
class Piece:
    """A model in its place."""

    model: Model
    centre: tuple[float, float, float]  # x and z of its middle, y of its underside
    angle: float  # about the vertical axis, from +z towards +x

    @property
    def box(self) -> tuple[Vector, Vector]:
        """Return the lowest and highest corner of the upright box around it."""
        width, height, depth = self.model.size
        cos, sin = abs(np.cos(self.angle)), abs(np.sin(self.angle))
        half = np.array([width * cos + depth * sin, 0.0, width * sin + depth * cos]) / 2
        low = np.asarray(self.centre) - half
        return low, np.asarray(self.centre) + half + (0.0, height, 0.0)


@dataclass
class Room:
    """An empty box room, ``0 <= x <= width`` and so on (y is up), and its pieces."""

    kind: int  # an index into TYPES
    size: tuple[float, float, float]  # width, height, depth in metres
    colours: Vector  # (6, 3): floor, ceiling, four walls
    lights: Vector  # (lights, xyz)
    powers: Vector  # (lights,)
    pieces: list[Piece] = field(default_factory=list)

    def free(self, piece: Piece) -> bool:
        """Tell whether a piece fits into the room and overlaps no other."""
        low, high = piece.box
        if (low < -1e-6).any() or (high > np.asarray(self.size) + 1e-6).any():
            return False
        return all((low >= other[1] + GAP).any() or (high + GAP <= other[0]).any() for other in map(_box, self.pieces))


def make_room(models: Sequence[Model], generator: np.random.Generator) -> Room:
    """Draw a room and furnish it from these models."""
    size = (generator.uniform(3, 6), generator.uniform(2.4, 2.9), generator.uniform(3, 6))
    lights = int(generator.integers(1, 3))
    room = Room(
        kind=int(generator.integers(len(TYPES))),
        size=size,
        colours=np.concatenate([generator.uniform(0.45, 0.95, (1, 3)), np.full((1, 3), 0.9), _wall_colours(generator)]),
        lights=np.stack([_light(size, generator) for _ in range(lights)]),
        powers=generator.uniform(0.7, 1.2, lights) / lights,
    )
    by_class = {label: [model for model in models if CLASSES[model.label] == label] for label in CLASSES}
    first, more = list(TYPES.values())[room.kind]
    openings = ["door", *["window"] * int(generator.integers(0, 3))]
    others = [str(generator.choice(more)) for _ in range(int(generator.integers(2, 7)))]
    for label in (*openings, *first, *others):
        _put(room, by_class[label], label, generator)
    for piece in list(room.pieces):
        _put_on(room, piece, by_class["object"] + by_class["appliance"], generator)
    return room


def _put(room: Room, models: Sequence[Model], label: str, generator: np.random.Generator) -> None:
    """Try some models of a class in some places."""
    if not models:
        return
    for _ in range(TRIES):
        model = models[int(generator.integers(len(models)))]
        if max(model.size) < ON_TOP and not model.elevation and label != "chair":
            continue  # too small to stand on a floor
        backed = label in BACKED or model.elevation > 0
        piece = _against_wall(room, model, label, generator) if backed else _anywhere(room, model, label, generator)
        if room.free(piece):
            room.pieces.append(piece)
            return


def _against_wall(room: Room, model: Model, label: str, generator: np.random.Generator) -> Piece:
    wall = int(generator.integers(4))  # its back to z = 0, x = 0, the far z, the far x
    width, height, depth = room.size
    length, reach = (width, depth) if wall % 2 == 0 else (depth, width)
    along = generator.uniform(model.size[0] / 2, max(length - model.size[0] / 2, model.size[0] / 2))
    out = model.size[2] / 2 + 1e-3
    out = out if wall < 2 else reach - out
    x, z = (along, out) if wall % 2 == 0 else (out, along)
    up = model.elevation
    if label == "window" and not up:
        up = generator.uniform(0.8, 1.1)
    up = min(up, height - model.size[1])
    return Piece(model, (float(x), float(max(up, 0.0)), float(z)), wall * np.pi / 2)


def _anywhere(room: Room, model: Model, label: str, generator: np.random.Generator) -> Piece:
    angle = (
        generator.uniform(0, 2 * np.pi) if label in ("chair", "person", "object") else generator.integers(4) * np.pi / 2
    )
    x, z = generator.uniform(0.3, room.size[0] - 0.3), generator.uniform(0.3, room.size[2] - 0.3)
    return Piece(model, (float(x), 0.0, float(z)), float(angle))


def _put_on(room: Room, below: Piece, models: Sequence[Model], generator: np.random.Generator) -> None:
    """Put up to two small things on a table or a low cupboard."""
    up = below.centre[1] + below.model.top
    if CLASSES[below.model.label] not in ("table", "storage") or not LOWEST < up < HIGHEST:
        return
    small = [model for model in models if max(model.size) < ON_TOP and not model.elevation]
    for _ in range(int(generator.integers(0, 3)) if small else 0):
        model = small[int(generator.integers(len(small)))]
        low, high = below.box
        half = max(model.size) / 2
        if (high - low)[[0, 2]].min() <= 2 * half:
            continue
        x, z = (generator.uniform(low[axis] + half, high[axis] - half) for axis in (0, 2))
        piece = Piece(model, (float(x), up + GAP / 20, float(z)), float(generator.uniform(0, 2 * np.pi)))
        others = Room(
            room.kind, room.size, room.colours, room.lights, room.powers, [p for p in room.pieces if p != below]
        )
        if others.free(piece):
            room.pieces.append(piece)


def _wall_colours(generator: np.random.Generator) -> Vector:
    """One light colour for all walls, a little different on each."""
    return np.clip(generator.uniform(0.6, 0.95, (1, 3)) + generator.uniform(-0.06, 0.06, (4, 1)), 0, 1)


def _light(size: tuple[float, float, float], generator: np.random.Generator) -> Vector:
    width, height, depth = size
    place = [generator.uniform(0.2, 0.8) * width, height - 0.15, generator.uniform(0.2, 0.8) * depth]
    return np.asarray(place)


def _box(piece: Piece) -> tuple[Vector, Vector]:
    return piece.box
