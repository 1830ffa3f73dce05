"""Render the Rooms data set: furnished rooms with exact labels for five dense tasks. Rendered, not NYU-v2.

    apt-get download sweethome3d-furniture && dpkg -x sweethome3d-furniture_*.deb furniture
    pip install 'disparse-plugin[rendering]'   # embreex casts the rays; 4.4.0.post1 was used
    python benchmarks/render_rooms.py --furniture furniture/usr/share/sweethome3d/furniture --out DIR/rooms

writes ``rooms64_train.npz``, ``rooms64_val.npz`` and ``rooms64_test.npz``, which ``multitask.rooms`` loads: rgb, seg
(14 classes), depth, normal, edge, kp, inst, room (type), rid (number of the room; its eight views share it). A split is
of whole rooms. Test rooms are furnished only with the quarter of the meshes that no other room has: those with an MD5
sum of their path that is divisible by four.

The pictures depend on the seed and on the versions of the meshes and of embreex. How long a picture takes is printed.

**Attribution.** The meshes are those of Debian's package sweethome3d-furniture (http://www.sweethome3d.com): models by
Scopia Visual Interfaces Systems (CC-BY 3.0), by Reallusion (CC-BY 3.0 US), by Andrew Kator and Jennifer Legaz (CC-BY
3.0 US), and by the contributors of Blend Swap (CC-BY 3.0 and CC0). They were scaled, placed and rendered here. Whoever
passes the pictures on has to say so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rooms_renderer.catalogue import Model, read_catalogues
from rooms_renderer.furnishing import make_room
from rooms_renderer.scene import Scene
from rooms_renderer.views import Maps, draw_camera, render_view, stack

VIEWS = 8  # of a room
TRIES = 200  # cameras drawn for a room before it is given up
SHARES = {"train": 0.7, "val": 0.13, "test": 0.17}  # of the rooms


def render_room(models: Sequence[Model], generator: np.random.Generator, size: int) -> Maps | None:
    """Render eight views of a new room, ``(8, ...)`` each map and the room's type; None if it has not that many."""
    room = make_room(models, generator)
    scene = Scene(room)
    views: list[Maps] = []
    for _ in range(TRIES):
        camera = draw_camera(room, generator)
        view = render_view(room, scene, camera, size) if camera is not None else None
        if view is not None:
            views.append(view)
        if len(views) == VIEWS:
            return {**stack(views), "room": np.full(VIEWS, room.kind, dtype=np.int64)}
    return None


def render_split(models: Sequence[Model], rooms: int, size: int, seed: Sequence[int]) -> Maps:
    """Render this many rooms. Each has a seed of its own, so that asking for more leaves the first as they are."""
    made: list[Maps] = []
    attempt = 0
    while len(made) < rooms:
        if attempt > 20 * rooms:
            raise RuntimeError(f"furniture: needs models that make {rooms} rooms, found {len(made)} in {attempt} tries")
        room = render_room(models, np.random.default_rng([*seed, attempt]), size)
        attempt += 1
        if room is not None:
            made.append({**room, "rid": np.full(VIEWS, len(made), dtype=np.int64)})
    return {name: np.concatenate([room[name] for room in made]) for name in made[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Render all splits."""
    parser = argparse.ArgumentParser(description="Render the Rooms data set.")
    parser.add_argument("--furniture", type=Path, required=True, help="folder with the .sh3f files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the three files to")
    parser.add_argument("--rooms", type=int, default=288, help="number of rooms in all splits together")
    parser.add_argument("--size", type=int, default=64, help="height and width of a picture")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    models = read_catalogues(options.furniture)
    options.out.mkdir(parents=True, exist_ok=True)
    for number, (split, share) in enumerate(SHARES.items()):
        chosen = [model for model in models if model.held_out == (split == "test")]
        start = time.perf_counter()
        maps = render_split(chosen, max(round(options.rooms * share), 1), options.size, (options.seed, number))
        path = options.out / f"rooms{options.size}_{split}.npz"
        np.savez_compressed(path, **maps)
        pictures = len(maps["rgb"])
        each = 1000 * (time.perf_counter() - start) / pictures
        print(f"{path}: {pictures} pictures, {len(chosen)} models, {each:.0f} ms a picture")


if __name__ == "__main__":
    main()
