"""A furnished room as one bag of triangles for the ray caster, with what each triangle belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .catalogue import CLASSES
from .furnishing import Room
from .meshes import Array, Material, load_mesh

FIRST_PIECE = 6  # instances 0 to 5 are floor, ceiling and four walls


@dataclass(frozen=True)
class Hits:
    """What rays met. Rays inside a closed room always meet something."""

    distance: npt.NDArray[np.float64]  # (rays,), along directions of length 1
    normal: npt.NDArray[np.float64]  # (rays, 3), of length 1, towards the viewer
    triangle: npt.NDArray[np.int64]  # (rays,)
    bary: npt.NDArray[np.float64]  # (rays, 2): how far towards the second and the third corner


class Scene:
    """The triangles of a room; needs embreex.

    Raises:
        ImportError: embreex is not installed.
    """

    def __init__(self, room: Room) -> None:
        corners, places, materials, instances, labels = _box(room)
        self.materials = [Material(tuple(colour)) for colour in room.colours.tolist()]
        for number, piece in enumerate(room.pieces):
            mesh = load_mesh(piece.model)
            if mesh is None:
                continue
            cos, sin = np.cos(piece.angle), np.sin(piece.angle)
            turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
            corners.append((mesh.corners @ turn.T + piece.centre).astype(np.float32))
            places.append(mesh.places)
            materials.append(mesh.material_of + len(self.materials))
            self.materials += mesh.materials
            instances.append(np.full(len(mesh.corners), FIRST_PIECE + number))
            labels.append(np.full(len(mesh.corners), piece.model.label))
        self.corners = np.concatenate(corners)
        self.places = np.concatenate(places)
        self.material_of = np.concatenate(materials)
        self.instance = np.concatenate(instances)
        self.label = np.concatenate(labels)
        self.caster = _caster(self.corners)

    def cast(self, start: Array, directions: Array) -> Hits:
        """Find what rays of length-1 directions ``(rays, 3)`` meet first."""
        found = self.caster.scene.run(
            np.ascontiguousarray(np.broadcast_to(start, directions.shape)), directions, output=True
        )
        normal = found["Ng"].astype(np.float64)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        normal = np.where((normal * directions).sum(1, keepdims=True) > 0, -normal, normal)
        bary = np.stack([found["u"], found["v"]], axis=1).astype(np.float64)
        return Hits(found["tfar"].astype(np.float64), normal, found["primID"].astype(np.int64), bary)

    def lit(self, points: Array, light: Array) -> npt.NDArray[np.bool_]:
        """Tell which points see the light."""
        way = light - points
        length = np.linalg.norm(way, axis=1).astype(np.float32)
        directions = (way / length[:, None]).astype(np.float32)
        # The light lies inside the room and shadows matter little close to it: stop short of both ends.
        blocked = self.caster.scene.run(points.astype(np.float32), directions, length - 0.02, query="OCCLUDED")
        return np.asarray(blocked) < 0

    def colour(self, hits: Hits) -> npt.NDArray[np.float64]:
        """Return the colours ``(rays, 3)`` of what was met, before any light."""
        chosen = self.material_of[hits.triangle]
        colours = np.asarray([material.colour for material in self.materials], dtype=np.float64)
        plain: npt.NDArray[np.float64] = colours[chosen]
        first, second, third = (self.places[hits.triangle, corner] for corner in range(3))
        u, v = hits.bary[:, :1], hits.bary[:, 1:]
        place = (1 - u - v) * first + u * second + v * third
        for index in np.unique(chosen):
            texture = self.materials[index].texture
            if texture is not None:
                here = chosen == index
                height, width = texture.shape[:2]
                column = (np.mod(place[here, 0], 1) * width).astype(int).clip(0, width - 1)
                row = (np.mod(1 - place[here, 1], 1) * height).astype(int).clip(0, height - 1)
                plain[here] = texture[row, column]
        return plain


@dataclass(frozen=True)
class _Caster:
    scene: Any
    mesh: Any  # kept alive: the scene does not own it


def _caster(corners: Array) -> _Caster:
    try:
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene
    except ImportError as error:
        raise ImportError("rendering rooms needs embreex: pip install 'disparse-plugin[rendering]'") from error
    scene = EmbreeScene()
    return _Caster(scene, TriangleMesh(scene, np.ascontiguousarray(corners, dtype=np.float32)))


def _box(
    room: Room,
) -> tuple[list[Array], list[Array], list[npt.NDArray[Any]], list[npt.NDArray[Any]], list[npt.NDArray[Any]]]:
    """Return floor, ceiling and four walls, two triangles each, in the order of the room's colours."""
    x, y, z = room.size
    quads = np.array(
        [
            [(0, 0, 0), (x, 0, 0), (x, 0, z), (0, 0, z)],
            [(0, y, 0), (x, y, 0), (x, y, z), (0, y, z)],
            [(0, 0, 0), (x, 0, 0), (x, y, 0), (0, y, 0)],
            [(0, 0, 0), (0, 0, z), (0, y, z), (0, y, 0)],
            [(0, 0, z), (x, 0, z), (x, y, z), (0, y, z)],
            [(x, 0, 0), (x, 0, z), (x, y, z), (x, y, 0)],
        ],
        dtype=np.float32,
    )
    triangles = quads[:, [[0, 1, 2], [0, 2, 3]]].reshape(12, 3, 3)
    sides = np.repeat(np.arange(FIRST_PIECE), 2)
    classes = np.array([CLASSES.index(name) for name in ("floor", "ceiling", "wall", "wall", "wall", "wall")])
    return [triangles], [np.zeros((12, 3, 2), dtype=np.float32)], [sides], [sides], [classes[sides]]
