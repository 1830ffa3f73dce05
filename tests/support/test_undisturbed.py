"""Whatever a forward does to a model's buffers, and whatever fails, the model is as it was."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import score_tasks
from disparse_plugin._support.undisturbed import undisturbed
from networks import Snapshot, square_losses, vectors


class Meddling(nn.Module):
    """A layer whose forward does things to its buffers, and a BatchNorm beside it, which must be restored as well."""

    def __init__(self, meddle):
        super().__init__()
        self.layer, self.meddle = nn.Linear(5, 4), meddle
        self.register_buffer("count", torch.zeros(3))
        self.register_buffer("wide", torch.zeros(1).expand(4))
        self.register_buffer("nothing", None)
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        with torch.inference_mode():
            self.register_buffer("frozen", torch.ones(2))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        self.meddle(self)
        y = self.norm(self.layer(x))
        return {"a": y[:, :2], "b": y[:, 2:]}


def in_inference(module):
    with torch.inference_mode():
        module.frozen.add_(1)


def born(module):
    module.register_buffer("late", torch.ones(7), persistent=False)


def gone(module):
    if "count" in module._buffers:
        del module.count


WAYS = {
    "added to": lambda module: module.count.add_(1),
    "replaced": lambda module: setattr(module, "count", module.count + 1),
    "replaced by one with a graph": lambda module: setattr(module, "count", module.layer.weight.sum() * module.count),
    "resized to more": lambda module: module.count.resize_(30).fill_(5),
    "resized to less": lambda module: module.count.resize_(1).fill_(5),
    "given other memory": lambda module: module.count.set_(torch.ones(9)),
    "given other data": lambda module: setattr(module.count, "data", torch.ones(2, 2)),
    "expanded, written through its base": lambda module: module.wide[:1].add_(1),
    "expanded, replaced": lambda module: setattr(module, "wide", torch.ones(4)),
    "made in inference mode": in_inference,
    "born": born,
    "gone": gone,
    "made from nothing": lambda module: setattr(module, "nothing", torch.ones(2)),
    "made persistent": lambda module: module.register_buffer("passing", module.passing + 1),
}


def memory(model):
    return {name: (buffer.untyped_storage()._cdata, buffer.stride()) for name, buffer in model.named_buffers()}


def persistent(model):
    return list(model.state_dict())


@pytest.mark.parametrize("meddle", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("fails", [False, True])
def test_buffers_are_as_they_were(meddle, fails):
    model = Meddling(meddle)
    before, names = Snapshot(model), persistent(model)
    where = memory(model)

    def losses(net, batch):
        found = square_losses(net, batch)
        if fails:
            raise KeyError("half-way")
        return found

    if fails:
        with pytest.raises(KeyError, match="half-way"):
            score_tasks(model, losses, vectors())
    else:
        score_tasks(model, losses, vectors())
    before.check()
    assert persistent(model) == names
    assert memory(model) == where


def test_one_that_cannot_be_restored_does_not_keep_the_others():
    class Stubborn(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") == "copy_":
                raise RuntimeError("I stay")
            return super().__torch_function__(function, types, args, kwargs or {})

    model = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5))
    model[0].running_mean = torch.zeros(5).as_subclass(Stubborn)
    prune.random_unstructured(model[1], "weight", 2)
    values = {name: value.clone() for name, value in model[1].state_dict().items()}

    def run():
        with undisturbed(model, ()):
            model(torch.randn(4, 5))
            model.eval()

    with pytest.raises(RuntimeError, match="I stay"):
        run()
    assert model.training
    assert model[1].training
    for name, value in model[1].state_dict().items():
        assert torch.equal(value, values[name]), name


def test_a_sparse_buffer():
    model = nn.Sequential(nn.Linear(5, 4))
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    with undisturbed(model, ()):
        model.adjacency = torch.zeros(3, 3).to_sparse()
    assert torch.equal(model.adjacency.to_dense(), torch.eye(3))
