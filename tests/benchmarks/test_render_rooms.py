"""The renderer of Rooms: catalogue, meshes, furnishing, labels, and files that the loader takes."""

import hashlib
import importlib.util
import itertools

import numpy as np
import pytest
import torch

import render_rooms
from furniture_files import LEFT_OUT, PIECES, write_furniture
from multitask.data import rooms as loader
from rooms_renderer.catalogue import CLASSES, class_of, read_catalogues
from rooms_renderer.furnishing import GAP, make_room
from rooms_renderer.meshes import load_mesh
from rooms_renderer.scene import FIRST_PIECE, Scene
from rooms_renderer.views import corners, draw_camera, edges, render_view

needs_embreex = pytest.mark.skipif(
    importlib.util.find_spec("embreex") is None,
    reason="needs embreex to cast rays, found none: pip install 'disparse-plugin[rendering]'",
)


@pytest.fixture(scope="module")
def furniture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("furniture")
    write_furniture(folder)
    return folder


@pytest.fixture(scope="module")
def models(furniture):
    return read_catalogues(furniture)


@pytest.fixture(scope="module")
def furnished(models):
    """Twenty rooms."""
    return [make_room(models, np.random.default_rng(seed)) for seed in range(20)]


def test_a_catalogue_gives_names_sizes_and_paths(models):
    assert [model.name for model in models] == [piece[0] for piece in PIECES]
    window = next(model for model in models if model.name == "Window")
    assert window.size == (1.0, 1.0, 0.15)
    assert (window.elevation, window.top, window.path) == (0.9, 1.0, "boxes/Window/box.obj")
    table = next(model for model in models if model.name == "Table")
    assert (table.elevation, table.top) == (0.0, 0.7)


def test_what_does_not_belong_into_a_room_is_left_out(models):
    assert not {model.name for model in models} & {piece[0] for piece in LEFT_OUT}


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Bedside table", "storage"),
        ("Glass door cabinet", "storage"),
        ("Shower door", "bath"),
        ("Indoor bike", "object"),
        ("Futon couch", "sofa"),
        ("Table lamp", "object"),
        ("Holding female", "person"),
        ("Piano bench", "chair"),
        ("Chest freezer", "appliance"),
        ("Double French window 3 panes", "window"),
    ],
)
def test_classes_come_from_names(name, label):
    assert CLASSES[class_of(name)] == label


def test_classes_are_those_of_the_loader():
    assert CLASSES == loader.CLASSES


def test_a_quarter_of_the_models_is_held_out_by_their_paths(models):
    for model in models:
        assert model.held_out == (int(hashlib.md5(model.path.encode()).hexdigest()[-1], 16) % 4 == 0)
    assert 0 < sum(model.held_out for model in models) < len(models) / 2


def test_missing_furniture_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get download sweethome3d-furniture"):
        read_catalogues(tmp_path)


def test_a_mesh_has_its_catalogue_size_and_colours(models):
    model = models[0]
    mesh = load_mesh(model)
    assert mesh.corners.shape == (12, 3, 3)
    width, height, depth = model.size
    assert np.allclose(mesh.corners.min((0, 1)), (-width / 2, 0, -depth / 2))
    assert np.allclose(mesh.corners.max((0, 1)), (width / 2, height, depth / 2))
    materials = [mesh.materials[index] for index in mesh.material_of]
    assert [material.texture is None for material in materials] == [True] * 10 + [False] * 2
    assert materials[0].colour == (0.2, 0.4, 0.6)
    assert materials[-1].texture[0, :, 0].tolist() == [0, 0, 1, 1]
    assert np.allclose(mesh.corners[10:, :, 2], depth / 2)  # the picture is on the front
    assert np.allclose(mesh.places[10:, :, 0], (mesh.corners[10:, :, 0] > 0))


def test_pieces_lie_inside_the_room_and_in_no_other(furnished):
    for room in furnished:
        assert len(room.pieces) > 2
        for piece in room.pieces:
            low, high = piece.box
            assert (low > -1e-6).all()
            assert (high < np.asarray(room.size) + 1e-6).all()
        for one, other in itertools.combinations(room.pieces, 2):
            (low, high), (low_other, high_other) = one.box, other.box
            apart = np.maximum(low - high_other, low_other - high).max()
            stands_on = abs(other.centre[1] - one.centre[1] - one.model.top) < GAP
            assert apart > GAP - 1e-6 or stands_on


def test_what_should_stand_against_a_wall_has_its_back_there(furnished):
    placed = [(piece, np.asarray(room.size)[[0, 2]]) for room in furnished for piece in room.pieces]
    for piece, size in placed:
        if CLASSES[piece.model.label] in ("bed", "sofa", "storage", "window", "door"):
            back = np.array([-np.sin(piece.angle), -np.cos(piece.angle)])
            ends = np.asarray(piece.centre)[[0, 2]] + back * piece.model.size[2] / 2
            assert min(map(abs, [*ends, *(size - ends)])) < 0.01


def test_small_things_stand_on_tables(furnished):
    on_top = [piece for room in furnished for piece in room.pieces if CLASSES[piece.model.label] == "object"]
    assert len(on_top) > 5
    assert {round(piece.centre[1], 1) for piece in on_top} == {0.7}


def test_edges_are_where_instances_or_depth_and_normal_change():
    generator = np.random.default_rng(0)
    instance = generator.integers(0, 2, (7, 7)) * (np.arange(7) < 4)
    depth, normal = generator.uniform(1.0, 1.2, (7, 7)), generator.normal(size=(7, 7, 3))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    expected = np.zeros((7, 7), dtype=bool)
    for row, column in np.ndindex(7, 7):
        for other in ((row + 1, column), (row, column + 1)):
            if max(other) < 7:
                jump = abs(np.log(depth[row, column]) - np.log(depth[other])) > 0.06
                turn = normal[row, column] @ normal[other] < 0.8
                expected[row, column] |= instance[row, column] != instance[other] or (jump and turn)
    assert 0.2 < expected.mean() < 0.9
    assert np.array_equal(edges(instance, depth, normal), expected)


def test_corner_response_is_the_root_of_the_smaller_eigenvalue():
    picture = np.random.default_rng(0).random((16, 16, 3))
    gradients = np.stack(np.gradient(picture.mean(-1)), axis=-1)
    row, column = 8, 7
    tensor, total = np.zeros((2, 2)), 0.0
    for i, j in np.ndindex(16, 16):
        if max(abs(i - row), abs(j - column)) <= 6:
            weight = np.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * 1.5**2))
            tensor += weight * np.outer(gradients[i, j], gradients[i, j])
            total += weight
    assert corners(picture)[row, column] == pytest.approx(np.sqrt(np.linalg.eigvalsh(tensor / total)[0]))


def look(room, seed, size=24):
    """A scene, a camera and a view of a room that shows enough classes."""
    generator = np.random.default_rng(seed)
    scene = Scene(room)
    for _ in range(200):
        camera = draw_camera(room, generator)
        view = render_view(room, scene, camera, size) if camera else None
        if view is not None:
            return scene, camera, view
    raise AssertionError("no camera sees four classes")


def distances(room, start, directions):
    """How far every ray goes to the walls and to each piece's box (inf: misses it), ``(rays, 1 + pieces)``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        to_walls = np.where(directions > 0, (np.asarray(room.size) - start) / directions, -start / directions)
        columns = [np.nanmin(to_walls, axis=1)]
        for piece in room.pieces:
            cos, sin = np.cos(piece.angle), np.sin(piece.angle)
            turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
            half = np.asarray(piece.model.size) / 2
            local = turn @ (start - np.asarray(piece.centre)) - (0, half[1], 0)
            way = directions @ turn.T
            slabs = np.sort(np.stack([(-half - local) / way, (half - local) / way]), axis=0)
            near, far = slabs[0].max(1), slabs[1].min(1)
            columns.append(np.where((near <= far) & (near > 0), near, np.inf))
    return np.stack(columns, axis=1)


@needs_embreex
@pytest.mark.parametrize("seed", range(4))
def test_labels_are_those_of_boxes_cut_by_rays(furnished, seed):
    room = furnished[seed]
    _, camera, view = look(room, seed)
    rays = camera.rays(24).astype(float)
    found = distances(room, camera.eye, rays)
    first, nearest = found.argmin(1), found.min(1)
    close = np.sort(found, axis=1)
    clear = (close[:, 1] - close[:, 0] > 1e-3).reshape(24, 24)  # not two things at one place
    instance = view["inst"].astype(int)
    assert np.array_equal((instance.ravel() - FIRST_PIECE + 1).clip(min=0)[clear.ravel()], first[clear.ravel()])
    labels = np.array([piece.model.label for piece in room.pieces])
    inside = instance >= FIRST_PIECE
    assert np.array_equal(view["seg"][inside], labels[instance[inside] - FIRST_PIECE])
    depth = (nearest * -(rays @ camera.axes[2])).reshape(24, 24)
    assert np.allclose(view["depth"][clear], depth[clear], rtol=2e-3)


@needs_embreex
def test_normals_are_in_camera_space_and_face_the_camera(furnished):
    _, camera, view = look(furnished[0], 0)
    normal = view["normal"].astype(float)
    world = normal @ camera.axes
    assert np.allclose(np.linalg.norm(normal, axis=-1), 1, atol=2e-3)
    assert ((normal.reshape(-1, 3) @ camera.axes * camera.rays(24)).sum(-1) < 1e-3).all()
    assert np.allclose(world[view["seg"] == CLASSES.index("floor")], (0, 1, 0), atol=2e-3)
    assert np.allclose(np.abs(world[view["seg"] == CLASSES.index("wall")]).max(-1), 1, atol=2e-3)


@needs_embreex
def test_points_are_lit_unless_a_piece_is_between(furnished):
    room = furnished[1]
    generator = np.random.default_rng(0)
    points = generator.uniform(0.05, 0.95, (300, 3)) * room.size
    way = room.lights[0] - points
    length = np.linalg.norm(way, axis=1)
    rays = zip(points, way / length[:, None], length, strict=True)
    expected = np.array([distances(room, point, step[None])[0, 1:].min() > far for point, step, far in rays])
    boxes = np.array([piece.box for piece in room.pieces])
    inside = ((points[:, None] > boxes[:, 0]) & (points[:, None] < boxes[:, 1])).all(-1).any(-1)
    lit = Scene(room).lit(points.astype(np.float32), room.lights[0].astype(np.float32))
    assert 0 < lit[~inside].mean() < 1
    assert np.array_equal(lit[~inside], expected[~inside])


@needs_embreex
def test_pictures_show_textures_and_colours(furnished):
    """Under even light from everywhere, a pixel is the colour of what it shows."""
    room = furnished[0]
    scene, camera, view = look(room, 0)
    hits = scene.cast(camera.eye.astype(np.float32), camera.rays(24))
    colours = scene.colour(hits).reshape(24, 24, 3)
    pieces = view["inst"] >= FIRST_PIECE
    known = np.array([(0.2, 0.4, 0.6), (0, 0, 0), (1, 1, 1)])
    assert (np.abs(colours[pieces][:, None] - known).max(-1).min(-1) < 1e-6).all()
    assert np.allclose(colours[~pieces], room.colours[view["inst"][~pieces]])


@needs_embreex
def test_files_are_what_the_loader_takes(furniture, tmp_path, capsys):
    arguments = ["--furniture", str(furniture), "--rooms", "4", "--size", "16"]
    render_rooms.main([*arguments, "--out", str(tmp_path / "rooms")])
    problem = loader.rooms(tmp_path, size=16)
    assert len(problem.train) == 3 * render_rooms.VIEWS
    assert "models" in capsys.readouterr().out
    for name in ("train", "val", "test"):
        with np.load(tmp_path / "rooms" / f"rooms16_{name}.npz") as file:
            kinds = {key: (file[key].dtype.name, file[key].shape[1:]) for key in file.files}
            assert np.bincount(file["rid"]).tolist() == [render_rooms.VIEWS] * len(set(file["rid"]))
            assert all(len(np.unique(labels)) >= 4 for labels in file["seg"])
        assert kinds == {
            "rgb": ("uint8", (16, 16, 3)),
            "seg": ("uint8", (16, 16)),
            "depth": ("float16", (16, 16)),
            "normal": ("float16", (16, 16, 3)),
            "edge": ("bool", (16, 16)),
            "kp": ("float16", (16, 16)),
            "inst": ("uint8", (16, 16)),
            "room": ("int64", ()),
            "rid": ("int64", ()),
        }
    render_rooms.main([*arguments, "--out", str(tmp_path / "again" / "rooms")])
    again = loader.rooms(tmp_path / "again", size=16)
    assert torch.equal(again.train.inputs, problem.train.inputs)
    render_rooms.main([*arguments, "--seed", "1", "--out", str(tmp_path / "other" / "rooms")])
    assert not torch.equal(loader.rooms(tmp_path / "other", size=16).train.inputs, problem.train.inputs)


def test_test_rooms_hold_only_models_that_others_do_not(furniture, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(
        render_rooms, "render_split", lambda models, *_: used.append(set(models)) or {"rgb": np.zeros(1)}
    )
    render_rooms.main(["--furniture", str(furniture), "--out", str(tmp_path)])
    train, val, test = used
    assert train == val
    assert not train & test
    assert all(model.held_out for model in test)
