"""Files of every kind: damaged ones are refused or load the very same; what saving keeps, and leaves behind."""

import json
import os
import pickle
import resource
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import FileFormatError, TaskScores, load_pruned, save_pruned
from disparse_plugin._support.files import read_tensors, replacing, write_tensors
from disparse_plugin.masks import load_masks, masks_of, save_masks
from disparse_plugin.sparse_training import load_checkpoint, save_checkpoint
from disparse_plugin.structured import RemovalPlan
from disparse_plugin.structured.plan import Cut
from networks import Snapshot


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))


class Scores:
    """Writes a small file of its kind, and reads it into something that can be compared."""

    @staticmethod
    def write(path):
        net = network()
        first, second = (torch.tensor([[1.0, 0.5], [0.25, 3.0], [2.0, 4.0]]) * k for k in (1, 2))
        tables = {"a": {(net[0], "weight"): first}, "b": {(net[0], "weight"): second}}
        TaskScores(net, tables, parameters=[(layer, "weight") for layer in net], num_batches=2).save(path)

    @staticmethod
    def read(path):
        scores = TaskScores.load(path, network())
        tables = {task: [score.tolist() for score in scores[task].values()] for task in scores}
        return tables, scores.names, scores.unreached, scores.criterion, scores.num_batches


class Masks:
    @staticmethod
    def write(path):
        net = network()
        for layer in net:
            prune.custom_from_mask(layer, "weight", torch.arange(layer.weight.numel()).reshape(layer.weight.shape) % 2)
        save_masks(net, path, tasks={"a": {"0.weight": torch.ones(3, 2).bool()}}, facts={"amount": 0.5})

    @staticmethod
    def read(path):
        net = network()
        facts = load_masks(net, path)
        return facts, {name: mask.tolist() for name, mask in masks_of(net).items()}


class Removals:
    @staticmethod
    def write(path):
        gone = torch.tensor([0, 2])
        RemovalPlan((Cut("0", "out", -1, 3, gone), Cut("1", "in", -1, 3, gone)), {"": {"heads": 2}}).save(path)

    @staticmethod
    def read(path):
        plan = RemovalPlan.load(path)
        return [(c.target, c.side, c.dim, c.count, c.positions.tolist()) for c in plan.cuts], dict(plan.attributes)


class Checkpoints:
    @staticmethod
    def write(path):
        torch.manual_seed(3)
        save_checkpoint(path, model=network())

    @staticmethod
    def read(path):
        net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
        load_checkpoint(path, model=net)
        return {name: value.tolist() for name, value in net.state_dict().items()}, torch.rand(3).tolist()


class Models:
    @staticmethod
    def write(path):
        net = network()
        prune.custom_from_mask(net[0], "weight", torch.tensor([[1, 0], [0, 1], [1, 1]]))
        save_pruned(net, path, facts={"amount": 0.5})

    @staticmethod
    def read(path):
        net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1, bias=False))
        facts = load_pruned(net, path)
        return facts, str(net), {name: value.tolist() for name, value in net.state_dict().items()}


KINDS = [Scores, Masks, Removals, Checkpoints, Models]


def check(kind, path, damaged, expected):
    """A damaged file is refused by the one error, which names it, or its content is the very same."""
    path.write_bytes(damaged)
    try:
        content = kind.read(path)
    except FileFormatError as error:
        return error.path == path and str(path) in str(error) and str(error).startswith("path: must be ")
    assert content == expected
    return False


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def written(request, tmp_path):
    path = tmp_path / "file"
    request.param.write(path)
    return request.param, path, path.read_bytes(), request.param.read(path)


def test_truncations(written):
    kind, path, whole, expected = written
    refused = [check(kind, path, whole[:length], expected) for length in range(0, len(whole), 1 + len(whole) // 700)]
    assert all(refused)


def test_a_default_device_does_not_get_in_the_way(written):
    """What is made without a device would be on the meta device, which holds no values."""
    kind, path, _, expected = written
    model = network()
    read = {
        Scores: TaskScores.load,
        Masks: lambda path, model: load_masks(model, path),
        Models: lambda path, model: load_pruned(model, path),
    }
    torch.set_default_device("meta")
    try:
        if kind in read:
            read[kind](path, model)
        elif kind is Checkpoints:
            load_checkpoint(path, model=model)
        else:
            assert kind.read(path) == expected
    finally:
        torch.set_default_device(None)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def flipped(data, place, bit):
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def test_a_flipped_bit_of_each_byte(written):
    """By turns the first to the eighth, and of the large file of a checkpoint in every fifteenth byte."""
    kind, path, whole, expected = written
    places = range(0, len(whole), 15 if kind is Checkpoints else 1)
    refused = [check(kind, path, flipped(whole, place, place % 8), expected) for place in places]
    assert sum(refused) > 0.8 * len(refused)


@pytest.mark.slow
def test_every_flipped_bit(written):
    kind, path, whole, expected = written
    for place in range(len(whole)):
        for bit in range(8):
            check(kind, path, flipped(whole, place, bit), expected)


FOREIGN = {
    "empty": b"",
    "text": b"hello",
    "html": b"<!doctype html>" * 100,
    "zeros": bytes(1000),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files(written, content):
    kind, path, _, expected = written
    assert check(kind, path, content, expected)


@pytest.mark.parametrize("other", KINDS)
def test_files_of_another_kind(written, other):
    kind, path, _, expected = written
    if other is not kind:
        other.write(path)
        assert check(kind, path, path.read_bytes(), expected)


def test_a_torch_file_that_is_no_checkpoint(tmp_path):
    for content in ([1, 2], {"version": 1}, {"version": 1, "parts": {}, "random": {}}, {"version": "x"}, 3):
        torch.save(content, tmp_path / "file")
        assert check(Checkpoints, tmp_path / "file", (tmp_path / "file").read_bytes(), None)


def without_checksum(path, kind, change):
    """Write a file as version 0.1.0 did, with facts and tensors changed."""
    tensors, facts = read_tensors(path, kind=kind)
    if isinstance(changed := change(tensors, facts), tuple):
        tensors, facts = changed
    save_file(tensors, path, {"kind": kind, "version": "1", "facts": json.dumps(facts)})


SCORES, MASKS = "disparse_plugin.scores", "disparse_plugin.masks"
CHANGES = {
    "a score that is not finite": (Scores, SCORES, lambda t, f: t["0/0.weight"].fill_(torch.nan)),
    "a score without a task": (Scores, SCORES, lambda t, f: t.update({"2/0.weight": torch.ones(3, 2)})),
    "a task without scores": (Scores, SCORES, lambda t, f: t.pop("1/0.weight")),
    "whole numbers": (Scores, SCORES, lambda t, f: t.update({"0/0.weight": torch.ones(3, 2).int()})),
    "no names": (Scores, SCORES, lambda t, f: f.pop("names")),
    "names of another type": (Scores, SCORES, lambda t, f: f.update(names=[1])),
    "a task twice": (Scores, SCORES, lambda t, f: f.update(tasks=["a", "a"])),
    "reached and unreached": (Scores, SCORES, lambda t, f: f.update(unreached=["0.weight"])),
    "facts that are a list": (Scores, SCORES, lambda t, f: (t, [f])),
    "deep facts": (Scores, SCORES, lambda t, f: f.update(names=json.loads("[" * 900 + "]" * 900))),
    "a mask too short": (Masks, MASKS, lambda t, f: t.update({"0/0.weight": torch.zeros(0).byte()})),
    "a mask too long": (Masks, MASKS, lambda t, f: t.update({"0/0.weight": torch.zeros(2).byte()})),
    "a mask of another type": (Masks, MASKS, lambda t, f: t.update({"0/0.weight": torch.zeros(1).int()})),
    "a bit after the mask": (Masks, MASKS, lambda t, f: t.update({"0/0.weight": torch.tensor([1]).byte()})),
    "a mask not listed": (Masks, MASKS, lambda t, f: t.update({"0/x": torch.zeros(1).byte()})),
    "a mask missing": (Masks, MASKS, lambda t, f: t.pop("0/0.weight")),
    "a negative size": (Masks, MASKS, lambda t, f: f["shapes"][0].update({"0.weight": [-3, -2]})),
    "no group": (Masks, MASKS, lambda t, f: f.update(shapes=[])),
    "shapes of another type": (Masks, MASKS, lambda t, f: f.update(shapes=3)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_without_a_checksum_shapes_counts_and_ranges_are_checked(change, tmp_path):
    kind, name, edit = change
    path = tmp_path / "file"
    kind.write(path)
    expected = kind.read(path)
    without_checksum(path, name, lambda tensors, facts: None)
    assert kind.read(path) == expected
    without_checksum(
        path, name, lambda tensors, facts: result if isinstance(result := edit(tensors, facts), tuple) else None
    )
    assert check(kind, path, path.read_bytes(), expected)


class Unwilling(nn.Linear):
    """Takes half of a state, and then fails."""

    willing = True

    def load_state_dict(self, *arguments, **options):
        result = super().load_state_dict(*arguments, **options)
        if not self.willing:
            self.willing = True
            raise RuntimeError("I will not")
        return result


def test_a_checkpoint_is_loaded_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    save_checkpoint(path, first=nn.Linear(2, 1), second=Unwilling(2, 1))
    first, second, other = nn.Linear(2, 1), Unwilling(2, 1), nn.Linear(3, 1)
    second.willing = False
    before = Snapshot(nn.ModuleList([first, second]))
    with pytest.raises(RuntimeError, match="I will not"):
        load_checkpoint(path, first=first, second=second)
    second.__dict__.pop("willing")
    before.facts["attributes"] = before._facts()["attributes"]
    before.check()
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_checkpoint(path, first=first, second=other)
    before.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_symbolic_link_stays_one_and_the_mode_stays(kind, tmp_path):
    target, link = tmp_path / "target", tmp_path / "folder" / "link"
    link.parent.mkdir()
    link.symlink_to("../target")
    kind.write(link)  # the target is made
    target.chmod(0o640)
    before = target.stat().st_ino
    kind.write(link)
    assert link.is_symlink()
    assert target.stat().st_ino != before
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert kind.read(link) == kind.read(target)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["folder", "link", "target"]


def test_a_new_file_has_the_mode_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        Masks.write(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_an_error_that_names_the_path(kind, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match="path: must be writable, found File too large") as caught:
            kind.write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", KINDS)
def test_places_where_nothing_can_be_written(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match="path: must be writable") as caught:
        kind.write(tmp_path / "none" / "file")
    assert caught.value.filename == str(tmp_path / "none" / "file")
    with pytest.raises(IsADirectoryError, match="path: must be writable"):
        kind.write(tmp_path)
    assert not list(tmp_path.parent.glob(".*.tmp"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_or_a_device_is_not_replaced_by_a_file(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^path: must be the name of a file, found that .* is a device or a pipe"):
        kind.write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert list(tmp_path.iterdir()) == [tmp_path / "pipe"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_written_one_by_one(tmp_path):
    base = torch.arange(6.0)
    tensors = {"a": base, "b": base, "c": base[2:4], "d": torch.ones(1).expand(3), "e": torch.tensor(2)}
    write_tensors(tmp_path / "file", tensors, kind="test", facts={})
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_facts_that_json_cannot_hold(tmp_path):
    net = network()
    prune.random_unstructured(net[0], "weight", 1)
    with pytest.raises(TypeError, match="facts: must be what JSON can hold"):
        save_masks(net, tmp_path / "file", facts={"amount": torch.tensor(0.5)})
    assert not list(tmp_path.iterdir())


def test_the_error_survives_pickling():
    error = FileFormatError("run.pt", "a complete file", "its end missing")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.path, again.rule) == (str(error), error.path, error.rule)
