"""Meshes as triangles with colours, from the OBJ, MTL and picture files of a catalogue."""

from __future__ import annotations

import functools
import io
import posixpath
import zipfile
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from .catalogue import Model

Array = npt.NDArray[np.float32]

GREY = (0.6, 0.6, 0.6)  # of a material without a colour
LARGEST_MESH = 30_000  # triangles
LARGEST_TEXTURE = 128  # pixels of a side; more is never seen in a small picture


@dataclass(frozen=True)
class Material:
    """What a surface looks like: one colour in [0, 1], or a picture ``(height, width, 3)`` of such colours."""

    colour: tuple[float, float, float] = GREY
    texture: Array | None = None


@dataclass(frozen=True)
class Mesh:
    """Triangles, their places in the texture, and their materials."""

    corners: Array  # (triangles, 3 corners, xyz)
    places: Array  # (triangles, 3 corners, uv)
    material_of: npt.NDArray[np.int64]  # (triangles,), indices of materials
    materials: tuple[Material, ...]


@functools.lru_cache(maxsize=512)
def load_mesh(model: Model) -> Mesh | None:
    """Read a model at its catalogue size, standing on y = 0 around x = z = 0, its front towards +z.

    Returns:
        None if it has too many triangles or none, or is flat in one direction that should not be.
    """
    with zipfile.ZipFile(model.archive) as archive:
        mesh = parse_obj(archive.read(model.path).decode("latin-1"), archive, posixpath.dirname(model.path))
    if not 0 < len(mesh.corners) <= LARGEST_MESH:
        return None
    corners = mesh.corners @ model.matrix.T
    low, high = corners.min((0, 1)), corners.max((0, 1))
    if (high - low).min() <= 0:
        return None
    corners = (corners - (low + high) / 2) * (np.asarray(model.size) / (high - low))
    corners[..., 1] += model.size[1] / 2
    return Mesh(corners.astype(np.float32), mesh.places, mesh.material_of, mesh.materials)


def parse_obj(text: str, archive: zipfile.ZipFile, folder: str) -> Mesh:
    """Read an OBJ file, of it what a picture shows (v, vt, f, usemtl, mtllib); polygons become fans of triangles."""
    points, places, corners = [], [[0.0, 0.0]], []
    names, library, now = [""], {"": Material()}, 0
    material_of = []
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "v":
            points.append([float(x) for x in rest.split()[:3]])
        elif word == "vt":
            places.append([float(x) for x in rest.split()[:2]])
        elif word == "f":
            polygon = [_corner(part, len(points), len(places)) for part in rest.split()]
            corners += [(polygon[0], polygon[i], polygon[i + 1]) for i in range(1, len(polygon) - 1)]
            material_of += [now] * (len(polygon) - 2)
        elif word == "usemtl":
            if rest.strip() not in names:
                names.append(rest.strip())
            now = names.index(rest.strip())
        elif word == "mtllib":
            library |= parse_mtl(_read(archive, folder, rest.strip()).decode("latin-1"), archive, folder)
    found = np.asarray(corners, dtype=np.int64).reshape(-1, 3, 2)
    return Mesh(
        np.asarray(points, dtype=np.float32).reshape(-1, 3)[found[..., 0]],
        np.asarray(places, dtype=np.float32)[found[..., 1]],
        np.asarray(material_of, dtype=np.int64),
        tuple(library.get(name, Material()) for name in names),
    )


def parse_mtl(text: str, archive: zipfile.ZipFile, folder: str) -> dict[str, Material]:
    """Read the materials' colours (Kd) and pictures (map_Kd)."""
    materials: dict[str, Material] = {}
    name = ""
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "newmtl":
            name = rest.strip()
            materials[name] = Material()
        elif word == "Kd":
            red, green, blue = (float(x) for x in rest.split()[:3])
            materials[name] = Material((red, green, blue), materials[name].texture)
        elif word == "map_Kd":
            materials[name] = Material(materials[name].colour, _texture(_read(archive, folder, rest.split()[-1])))
    return materials


def _corner(part: str, points: int, places: int) -> tuple[int, int]:
    """Return the indices of a corner's point and its place in the texture (0: none); negative ones are from the end."""
    numbers = part.split("/")
    point = int(numbers[0])
    place = int(numbers[1]) if len(numbers) > 1 and numbers[1] else 0
    return (point - 1 if point > 0 else points + point), (place if place >= 0 else places + place)


def _read(archive: zipfile.ZipFile, folder: str, name: str) -> bytes:
    """Return a file that a mesh names; empty if the catalogue lacks it, as some do."""
    try:
        return archive.read(posixpath.join(folder, name))
    except KeyError:
        return b""


def _texture(content: bytes) -> Array | None:
    if not content:
        return None
    with Image.open(io.BytesIO(content)) as picture:
        small = picture.convert("RGB")
        small.thumbnail((LARGEST_TEXTURE, LARGEST_TEXTURE))
        return (np.asarray(small) / 255).astype(np.float32)
