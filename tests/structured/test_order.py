"""The order in which channels go: by agreement, of equal ones by magnitude, then as they come."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from disparse_plugin.structured import remove_channels
from disparse_plugin.structured.order import ChannelRule, removal_order
from layouts import layouts, oracle, weights_of


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
