"""The furniture: what models the catalogues of Sweet Home 3D hold, how large they are, and what class each is of."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

CLASSES = (
    "wall", "floor", "ceiling", "bed", "chair", "sofa", "table",
    "storage", "window", "door", "person", "appliance", "bath", "object",
)  # fmt: skip

# The class of a model by words in its name: the first rule that matches. What matches none is an object.
RULES = (
    (
        "object",
        r"lamp|lights?\b|lantern|brush|bathmat|\bbat\b|racket|doll|toilet paper|curtain|coffee cup|tv remote|\bfan\b",
    ),
    ("person", r"\b(fe)?male\b|\bboy\b|\bgirl\b"),
    (
        "storage",
        r"cabinet|wardrobe|shel(f|ves)|bookcase|cupboard|dresser|\bchest$|tv stand|bedside|locker|clothes rack",
    ),
    ("bath", r"\bbath|toilet|urinal|bidet|basin|lavatory|shower|vanity|jacuzzi|\bsink\b"),
    ("window", r"window"),
    ("door", r"\bdoors?\b"),
    ("sofa", r"sofa|couch"),
    ("bed", r"\bbed\b|crib|futon|mattress"),
    ("chair", r"chair|stool|\bbench\b|\bseat\b|\bpuff\b"),
    ("table", r"\btable\b|\bdesk\b|\bisland\b"),
    (
        "appliance",
        r"oven|fridge|refrigerator|freezer|stove|cooker|cooktop|microwave|washing machine|dryer|hood|\btv\b|television|"
        r"toaster|mixer|coffee (machine|maker|brewer)|printer|computer|laptop|heater|conditioning|radiator|boiler|"
        r"fryer|stereo|amplifier|projector|cooler|blender",
    ),
)
# Not for inside a room, or not one piece of furniture.
LEFT_OUT_CATEGORIES = ("Exterior", "Vehicles", "Staircases")
LEFT_OUT_NAMES = (
    r"garage|elevator|escalator|shutter|\broom|ladder|railing|container|swimming|ceiling|chandelier|screen door|horse|"
    r"fence|mower|logs"
)
LARGEST_FILE = 1_200_000  # bytes of the mesh
LARGEST_SIDE, SMALLEST_SIDE = 3.0, 0.12  # metres, of the longest side
FLATTEST = 0.04  # metres of height: what is flatter is a carpet


@dataclass(frozen=True)
class Model:
    """One piece of furniture."""

    name: str
    category: str
    label: int  # its class, an index into CLASSES
    archive: Path
    path: str  # of its mesh in the archive
    size: tuple[float, float, float]  # width, height and depth in metres, after turning
    elevation: float  # metres above the floor at which it hangs; 0 for what stands
    top: float  # metres above its own floor at which things can be put on it
    turn: tuple[float, ...]  # a matrix, row by row, from the mesh's axes to the catalogue's

    @property
    def held_out(self) -> bool:
        """Tell whether the model is only seen in the test split: a quarter of all, by the MD5 sum of its path."""
        return int(hashlib.md5(self.path.encode()).hexdigest(), 16) % 4 == 0

    @property
    def matrix(self) -> Vector:
        """Return ``turn`` as a 3x3 matrix."""
        return np.asarray(self.turn, dtype=np.float64).reshape(3, 3)


def class_of(name: str) -> int:
    """Return the class of a model's name.

    Example:
        >>> CLASSES[class_of("Bedside table")], CLASSES[class_of("Desk lamp")], CLASSES[class_of("Office chair")]
        ('storage', 'object', 'chair')
    """
    label = next((label for label, rule in RULES if re.search(rule, name.lower())), "object")
    return CLASSES.index(label)


def read_catalogues(folder: Path) -> list[Model]:
    """Read every ``.sh3f`` file of a folder, and keep what can furnish a room.

    Raises:
        FileNotFoundError: There is none; says how to get them.
    """
    archives = sorted(folder.glob("*.sh3f"))
    if not archives:
        raise FileNotFoundError(
            f"furniture: needs .sh3f files in {folder}, found none; get them with `apt-get download "
            "sweethome3d-furniture` and `dpkg -x *.deb DIR`, then give DIR/usr/share/sweethome3d/furniture"
        )
    models = []
    for archive in archives:
        with zipfile.ZipFile(archive) as file:
            sizes = {entry.filename: entry.file_size for entry in file.infolist()}
            text = file.read("PluginFurnitureCatalog.properties").decode("latin-1")
        models += [
            model for entry in _entries(text) if (model := _model(archive, entry, sizes)) is not None and _fits(model)
        ]
    return models


def _entries(text: str) -> list[dict[str, str]]:
    """Split the properties ``key#number=value`` by number."""
    found: dict[int, dict[str, str]] = {}
    for line in text.splitlines():
        if match := re.match(r"(\w+)#(\d+)\s*=\s*(.*)", line):
            found.setdefault(int(match[2]), {})[match[1]] = match[3].strip()
    return [found[number] for number in sorted(found)]


def _model(archive: Path, entry: Mapping[str, str], sizes: Mapping[str, int]) -> Model | None:
    path = entry.get("model", "").lstrip("/")
    if not path.endswith(".obj") or not 0 < sizes.get(path, 0) <= LARGEST_FILE:
        return None
    name, category = entry["name"], entry["category"]
    if category in LEFT_OUT_CATEGORIES or re.search(LEFT_OUT_NAMES, name.lower()):
        return None
    width, height, depth = (float(entry[side]) / 100 for side in ("width", "height", "depth"))
    return Model(
        name=name,
        category=category,
        label=class_of(name),
        archive=archive,
        path=path,
        size=(width, height, depth),
        elevation=float(entry.get("elevation", 0)) / 100,
        top=float(entry.get("dropOnTopElevation", 100 * height)) / 100,
        turn=_matrix(entry.get("modelRotation", "1 0 0 0 1 0 0 0 1").split()),
    )


def _matrix(words: Sequence[str]) -> tuple[float, ...]:
    return tuple(float(word) for word in words)


def _fits(model: Model) -> bool:
    longest = max(model.size)
    return (
        SMALLEST_SIDE <= longest <= LARGEST_SIDE and model.size[1] >= FLATTEST and model.size[1] + model.elevation < 2.4
    )
