"""Labels that are taken from their samples: what moves, what stays, and what it comes back as."""

import collections
import types

import pytest
import torch

from disparse_plugin.analysis import permute_labels


def test_permuted_labels_keep_inputs_and_distributions():
    x, y, z = torch.randn(7, 2), torch.arange(7), torch.arange(70, 140, 10)
    generator = torch.Generator().manual_seed(0)
    for batch in ((x, {"y": y, "pair": (z, y)}), [x, {"y": y, "pair": (z, y)}]):
        found = permute_labels(batch, generator)
        assert type(found) is type(batch)
        assert found[0] is x
        labels = found[1]
        assert sorted(labels["y"].tolist()) == y.tolist()
        assert not (labels["y"] == y).any()
        assert torch.equal(labels["pair"][0], 70 + 10 * labels["pair"][1]), "tensors of one entry move together"
        assert not torch.equal(labels["pair"][1], labels["y"]), "entries come apart"


def test_permuted_labels_of_a_mapping_come_apart_whatever_comes_first():
    batch = {"label": torch.arange(9), "image": torch.arange(9)}
    found = permute_labels(batch, torch.Generator())
    assert list(found) == ["label", "image"]
    assert not (found["label"] == found["image"]).any()


class Fields(collections.UserDict):
    """A batch whose entries are attributes too, as those of Hugging Face's tokenizers."""

    def __getattr__(self, key):
        try:
            return self.__dict__["data"][key]
        except KeyError:
            raise AttributeError(key) from None


class ReadOnly(collections.abc.Mapping):
    def __init__(self, entries):
        self._entries = entries

    def __getitem__(self, key):
        return self._entries[key]

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)


class Changing(ReadOnly, collections.abc.MutableMapping):
    """A shallow copy of it shares its entries."""

    def __setitem__(self, key, value):
        self._entries[key] = value

    def __delitem__(self, key):
        del self._entries[key]


class Pairs(ReadOnly):
    def __init__(self, entries, more):
        super().__init__(entries)


Labels = collections.namedtuple("Labels", ["first", "second"])


KINDS = [dict, collections.OrderedDict, Fields, ReadOnly, Changing, types.MappingProxyType]


@pytest.mark.parametrize("kind", KINDS)
def test_a_permuted_batch_is_of_the_kind_that_it_was(kind):
    x, y = torch.randn(5, 2), torch.arange(5)
    batch = kind({"x": x, "y": y, "both": Labels(y, 10 * y), "inner": kind({"z": y})})
    found = permute_labels(batch, torch.Generator())
    assert type(found) is kind
    assert type(found["inner"]) is kind
    assert type(found["both"]) is Labels
    assert list(found) == list(batch)
    assert found["x"] is x
    for moved in (found["y"], found["both"].first, found["inner"]["z"]):
        assert sorted(moved.tolist()) == y.tolist()
        assert not (moved == y).any()
    assert torch.equal(found["both"].second, 10 * found["both"].first)
    assert batch["y"] is y, "the batch itself has changed"
    assert batch["inner"]["z"] is y


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        (torch.zeros(3), TypeError),
        (Pairs({"x": torch.zeros(3), "y": torch.zeros(3)}, 0), TypeError),
        ((torch.zeros(3), "label"), TypeError),
        ((torch.zeros(3),), ValueError),
        ({"x": torch.zeros(3)}, ValueError),
        ((torch.zeros(1), torch.zeros(1)), ValueError),
        ((torch.zeros(3), (torch.zeros(3), torch.zeros(4))), ValueError),
    ],
)
def test_batches_that_cannot_be_permuted(batch, error):
    with pytest.raises(error, match=r"batch: .*permute="):
        permute_labels(batch, torch.Generator())


def test_a_list_of_one_thing_per_sample_is_permuted_as_a_list():
    images, boxes = torch.arange(4.0)[:, None], [torch.arange(4) + 10 * sample for sample in range(4)]
    targets = [{"boxes": box, "label": torch.tensor(number)} for number, box in enumerate(boxes)]
    _, moved, found = permute_labels((images, [box[:3] for box in boxes], targets), torch.Generator())
    assert sorted(int(box[0]) for box in moved) == [0, 10, 20, 30]
    assert all(int(box[0]) != 10 * place for place, box in enumerate(moved))
    assert all(torch.equal(box, int(box[0]) + torch.arange(3)) for box in moved)
    assert sorted(int(target["label"]) for target in found) == [0, 1, 2, 3]
    assert all(int(target["label"]) != place for place, target in enumerate(found))
    assert all(torch.equal(target["boxes"], boxes[int(target["label"])]) for target in found)
