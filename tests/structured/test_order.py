"""The order in which channels go: by agreement, of equal ones by magnitude, then as they come."""

import copy
from fractions import Fraction

import torch
import torch_pruning as tp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from disparse_plugin import TaskScores
from disparse_plugin.structured import DiSparseImportance, remove_channels
from disparse_plugin.structured.order import ChannelRule, interleaved_order, removal_order
from layouts import layouts, oracle, weights_of
from oracles.agreement import Layout


@given(layouts(), st.sampled_from(["unanimous", "any", "at_least(2)"]))
def test_the_order_is_that_of_the_definition(layout, arbiter):
    tables, sizes = layout
    tasks = tuple(tables)
    scores = [
        {task: torch.tensor(table[index]) for task, table in tables.items() if index in table}
        for index in range(len(sizes))
    ]
    magnitudes = [torch.tensor(row).abs() for row in weights_of(sizes)]
    rule = ChannelRule.of(arbiter, None)
    places = removal_order(scores, [0] * len(sizes), tasks, rule, magnitudes)
    found = sorted(
        ((index, unit) for index, size in enumerate(sizes) for unit in range(size)),
        key=lambda entry: float(places[entry[0]][entry[1]]),
    )
    assert found == oracle(tables, sizes).by_agreement(arbiter)


def test_of_channels_that_no_task_needs_the_smaller_go():
    """All but two hidden units are dead, so they score zero for every task."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([5.0, -50.0, -50.0, -50.0, 5.0, -50.0, -50.0, -50.0]))
        net[0].weight *= torch.tensor([1.0, 9.0, 0.1, 8.0, 1.0, 0.2, 7.0, 6.0])[:, None]
    before = net[0].weight.detach().clone()
    x = torch.rand(16, 4)

    def losses(model, batch):
        out = model(batch)
        return {"a": out[:, 0].square().mean(), "b": out[:, 1].square().mean()}

    remove_channels(net, losses, [x], x, 2)
    kept = [row for row in range(8) if any(torch.equal(before[row], left) for left in net[0].weight)]
    size = before.abs().sum(1) + torch.tensor([float("inf"), 0, 0, 0, float("inf"), 0, 0, 0])
    assert kept == sorted(size.topk(6).indices.tolist())


class Trunk(nn.Module):
    """Two hidden layers and two heads, all of width 6."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(6, 2, bias=False)

    def forward(self, x):
        h = self.two(self.one(x).relu()).relu()
        return self.a(h), self.b(h)


@given(st.integers(0, 10**6))
def test_torch_pruning_is_given_the_order_of_the_definition(seed):
    """Few values of scores and weights, so that most channels tie; only the outputs of the two layers are scored."""
    draw = torch.Generator().manual_seed(seed)
    net = Trunk()
    layers = [net.one, net.two]
    rows = {task: [torch.randint(2, (6, 1), generator=draw).float() for _ in layers] for task in ("a", "b")}
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randint(-2, 3, (6, 1), generator=draw).expand_as(layer.weight))
    keys = [(layer, "weight") for layer in layers]
    tables = {
        task: {key: row.expand_as(key[0].weight).clone() for key, row in zip(keys, found, strict=True)}
        for task, found in rows.items()
    }
    importance = DiSparseImportance(
        TaskScores(net, tables, parameters=keys), reduction="sum", normalizer=None, across=None
    )
    pruner = tp.pruner.BasePruner(
        net, (torch.rand(1, 3),), importance=importance, global_pruning=True, pruning_ratio=0.5,
        ignored_layers=[net.a, net.b],
    )  # fmt: skip
    importance.attach(pruner)
    groups = list(pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types))
    order = [layers.index(group[0].dep.target.module) for group in groups]  # the last of equals
    places = [importance(group) for group in groups]
    expected = _layout(rows, [layer.weight.detach().abs() for layer in layers], order)
    spared = expected.protected([1, 1], "unanimous")
    wanted = [entry for entry in expected.by_agreement("unanimous") if entry not in spared]
    assert sorted(wanted, key=lambda entry: float(places[entry[0]][entry[1]])) == wanted


def _layout(rows, weights, order):
    """The channels' scores and magnitudes; the inputs of the second layer go with the outputs of the first."""
    tables = {}
    for task, (one, two) in rows.items():
        first = [3 * float(value) + float(two.sum()) for value in one]
        by_layer = [first, [6 * float(value) for value in two]]
        tables[task] = {place: by_layer[layer] for place, layer in enumerate(order)}
    sizes = [(weights[0].sum(1) + weights[1].sum(0)).tolist(), weights[1].sum(1).tolist()]
    return Layout(tables, [6, 6], [sizes[layer] for layer in order])


class Mixed(nn.Module):
    """Two convolutions with norms, and two linear layers: groups of three kinds."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Conv2d(n, 16, 3, padding=1, bias=False) for n in (3, 16))
        self.norm1, self.norm2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.three, self.four = nn.Linear(16, 12), nn.Linear(12, 8)
        self.a, self.b = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm2(self.two(self.norm1(self.one(x)).relu())).relu().mean((2, 3))
        h = self.four(self.three(h).relu()).relu()
        return self.a(h), self.b(h)


def test_isomorphic_groups_are_ranked_among_themselves():
    """The kinds: conv norm conv; conv norm linear; and linear linear twice (one with two heads: a kind of its own)."""
    torch.manual_seed(0)
    net, x = Mixed().eval(), torch.randn(4, 3, 8, 8)

    def losses(model, batch):
        a, b = model(batch)
        return {"a": a.square().mean(), "b": 100 * b.square().mean()}

    alone = {}
    for name in ("one", "two", "three", "four"):  # each group is of a kind of its own here, so each loses its share
        other = copy.deepcopy(net)
        exclude = [module for module in ("one", "two", "three", "four") if module != name]
        remove_channels(other, losses, [x], x, 0.5, exclude=exclude)
        alone[name] = other.get_submodule(name).weight.shape[0]
    remove_channels(net, losses, [x], x, 0.5, isomorphic=True)
    assert {name: net.get_submodule(name).weight.shape[0] for name in alone} == alone
    assert alone == {"one": 8, "two": 8, "three": 6, "four": 4}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 6)), min_size=1, max_size=6), st.data())
def test_kinds_lose_equal_shares_in_their_own_order(groups, data):
    kinds, sizes = zip(*groups, strict=True)
    total = {kind: sum(size for other, size in groups if other == kind) for kind in kinds}
    inside = {kind: iter(data.draw(st.permutations(range(total[kind])))) for kind in total}
    own = [torch.tensor([float(next(inside[kind])) for _ in range(size)]) for kind, size in groups]
    places = interleaved_order(kinds, lambda members: [own[n] for n in members], sizes)
    entries = [(n, unit) for n, size in enumerate(sizes) for unit in range(size)]
    order = sorted(entries, key=lambda entry: float(places[entry[0]][entry[1]]))
    expected = sorted(entries, key=lambda e: (Fraction(int(own[e[0]][e[1]]) + 1, total[kinds[e[0]]]), e))
    assert order == expected
