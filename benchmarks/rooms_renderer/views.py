"""One picture with its labels: the camera, the light, edges and corners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .catalogue import CLASSES, Vector
from .furnishing import Room
from .scene import Hits, Scene

Maps = dict[str, npt.NDArray[np.generic]]

FEWEST_CLASSES = 4  # in a view
AMBIENT = 0.35  # share of the light that comes from everywhere
SUPERSAMPLING = 2  # rays along each side of a pixel, for its colour
DEPTH_JUMP, NORMAL_JUMP = 0.06, 0.8  # of log depth, and of the cosine between normals: an edge inside an instance
CORNER_SCALE = 1.5  # pixels: standard deviation of the window of the corner response


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that is upright."""

    eye: Vector
    axes: Vector  # rows: right, up, backwards
    half: float  # tangent of half the angle of view

    def rays(self, pixels: int) -> npt.NDArray[np.float32]:
        """Return directions of length 1 through the middles of ``pixels`` x ``pixels``, from the top left in rows."""
        steps = (2 * (np.arange(pixels) + 0.5) / pixels - 1) * self.half
        across, down = np.meshgrid(steps, steps)
        local = np.stack([across, -down, -np.ones_like(across)], axis=-1).reshape(-1, 3)
        directions = local @ self.axes
        directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        return np.asarray(directions, dtype=np.float32)


def draw_camera(room: Room, generator: np.random.Generator) -> Camera | None:
    """Draw a camera at eye height that looks at a piece, no door or window; None if the place is taken."""
    width, _, depth = room.size
    eye = np.array(
        [generator.uniform(0.3, width - 0.3), generator.uniform(1.0, 1.8), generator.uniform(0.3, depth - 0.3)]
    )
    boxes = [piece.box for piece in room.pieces]
    furniture = [piece.box for piece in room.pieces if CLASSES[piece.model.label] not in ("door", "window")]
    if not furniture or any(((eye > low - 0.2) & (eye < high + 0.2)).all() for low, high in boxes):
        return None
    low, high = furniture[int(generator.integers(len(furniture)))]
    target = (low + high) / 2 + generator.uniform(-0.3, 0.3, 3)
    back = eye - target
    if np.linalg.norm(back[[0, 2]]) < 0.4:
        return None
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 1.0, 0.0], back)
    right /= np.linalg.norm(right)
    angle = np.radians(generator.uniform(55, 70))
    return Camera(eye, np.stack([right, np.cross(back, right), back]), float(np.tan(angle / 2)))


def render_view(room: Room, scene: Scene, camera: Camera, size: int) -> Maps | None:
    """Render a picture of ``size`` x ``size`` and its labels; None if it shows fewer than four classes.

    Returns:
        ``rgb`` uint8 ``(size, size, 3)``; ``seg`` and ``inst`` uint8; ``depth`` float16, metres along the optical axis;
        ``normal`` float16, in camera space (x right, y up, z backwards); ``edge`` bool; ``kp`` float16.
    """
    directions = camera.rays(size)
    hits = scene.cast(camera.eye.astype(np.float32), directions)
    square = (size, size)
    labels = scene.label[hits.triangle].reshape(square)
    if len(np.unique(labels)) < FEWEST_CLASSES:
        return None
    instance = scene.instance[hits.triangle].reshape(square)
    depth = (hits.distance * -(directions @ camera.axes[2])).reshape(square)
    normal = (hits.normal @ camera.axes.T).reshape(*square, 3)
    fine = size * SUPERSAMPLING
    colours = shade(room, scene, camera.rays(fine), camera.eye)
    rgb = colours.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean((1, 3))
    return {
        "rgb": (255 * rgb).round().astype(np.uint8),
        "seg": labels.astype(np.uint8),
        "depth": depth.astype(np.float16),
        "normal": normal.astype(np.float16),
        "edge": edges(instance, depth, normal),
        "kp": corners((255 * rgb).round() / 255).astype(np.float16),
        "inst": instance.astype(np.uint8),
    }


def shade(room: Room, scene: Scene, directions: npt.NDArray[np.float32], eye: Vector) -> Vector:
    """Return the colours that rays see: matt surfaces, light from everywhere and from the lamps, with shadows."""
    hits: Hits = scene.cast(eye.astype(np.float32), directions)
    points = eye + hits.distance[:, None] * directions + 1e-3 * hits.normal
    light = np.full(len(points), AMBIENT)
    for lamp, power in zip(room.lights, room.powers, strict=True):
        way = lamp - points
        length = np.linalg.norm(way, axis=1)
        facing = ((way * hits.normal).sum(1) / length).clip(min=0)
        light += power * facing * scene.lit(points.astype(np.float32), lamp.astype(np.float32))
    seen: Vector = np.clip(scene.colour(hits) * light[:, None], 0, 1) ** (1 / 1.6)
    return seen


def edges(instance: npt.NDArray[np.generic], depth: Vector, normal: Vector) -> npt.NDArray[np.bool_]:
    """Mark pixels that an edge parts from their right or their lower neighbour.

    That is where another instance begins, or where log depth and normal jump together.
    """
    found = np.zeros(instance.shape, dtype=bool)
    for first, second in (
        ((slice(None), slice(0, -1)), (slice(None), slice(1, None))),
        ((slice(0, -1), slice(None)), (slice(1, None), slice(None))),
    ):
        jump = np.abs(np.log(depth[first] / depth[second])) > DEPTH_JUMP
        turn = (normal[first] * normal[second]).sum(-1) < NORMAL_JUMP
        found[first] |= (instance[first] != instance[second]) | (jump & turn)
    return found


def corners(rgb: Vector) -> Vector:
    """Return the corner response: the root of the smaller eigenvalue of the structure tensor (Shi and Tomasi, 1994)."""
    across, down = np.gradient(rgb.mean(-1))
    xx, xy, yy = (_blurred(product) for product in (across * across, across * down, down * down))
    smaller = (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    response: Vector = np.sqrt(smaller.clip(min=0))
    return response


def stack(views: Sequence[Mapping[str, npt.NDArray[np.generic]]]) -> Maps:
    """Lay the maps of several views over each other, ``(views, ...)``."""
    return {name: np.stack([view[name] for view in views]) for name in views[0]}


def _blurred(values: Vector) -> Vector:
    reach = round(4 * CORNER_SCALE)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / CORNER_SCALE) ** 2)
    window /= window.sum()
    for axis in (0, 1):
        around = [(reach, reach) if side == axis else (0, 0) for side in (0, 1)]
        padded = np.pad(values, around, mode="symmetric")
        values = np.apply_along_axis(np.convolve, axis, padded, window, mode="valid")
    return values
