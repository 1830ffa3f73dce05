"""Random tasks on random parameters, as a TaskScores and as the oracle's layout of the same numbers."""

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import TaskScores
from oracles.agreement import Layout

TIED = st.integers(0, 3).map(float)
SPREAD = st.floats(0, 1, width=32).map(float)
EITHER = st.sampled_from([TIED, SPREAD])


def weights_of(sizes):
    """The weights of the models made here: few magnitudes, some of them zero, of either sign."""
    return [[((7 * place + 3 * index) % 5 - 2) / 2 for place in range(size)] for index, size in enumerate(sizes)]


def build(tables, sizes, device="cpu"):
    """Make a model with one row vector per parameter, and the scores given as ``tables[task][parameter]``."""
    model = nn.ModuleList([nn.Linear(size, 1, bias=False) for size in sizes])
    for layer, row in zip(model, weights_of(sizes), strict=True):
        layer.weight.data.copy_(torch.tensor([row]))
    model = model.to(device)
    scores = {
        task: {
            (model[index], "weight"): torch.tensor([row], dtype=torch.float32, device=device)
            for index, row in table.items()
        }
        for task, table in tables.items()
    }
    return model, TaskScores(model, scores, parameters=[(layer, "weight") for layer in model])


@st.composite
def layouts(draw, values=EITHER, max_tasks=6):
    """Draw ``(tables, sizes)``: 1 to 6 tasks; every parameter is reached by some of them, every task reaches some."""
    kind = draw(values)
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    tasks = [f"task{number}" for number in range(draw(st.integers(1, max_tasks)))]
    reach = [draw(st.lists(st.sampled_from(tasks), min_size=1, unique=True)) for _ in sizes]
    for task in tasks:
        if not any(task in reached for reached in reach):
            reach[draw(st.integers(0, len(sizes) - 1))].append(task)
    tables = {
        task: {
            index: draw(st.lists(kind, min_size=size, max_size=size))
            for index, size in enumerate(sizes)
            if task in reach[index]
        }
        for task in tasks
    }
    return tables, sizes


@st.composite
def large_layouts(draw):
    """Enough entries that a sample is not all of them; heavy ties, unequal tasks, huge spreads."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    levels = draw(st.sampled_from([2, 7, 10**6]))
    sizes = draw(st.lists(st.integers(20, 300), min_size=2, max_size=4))
    tasks = [f"task{k}" for k in range(draw(st.integers(1, 4)))]
    tables = {}
    for task in tasks:
        reached = draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, unique=True))
        tables[task] = {
            i: (torch.randint(levels, (sizes[i],), generator=generator) / levels).square().tolist() for i in reached
        }
    tables[tasks[0]] |= {
        i: torch.rand(n, generator=generator).tolist()
        for i, n in enumerate(sizes)
        if all(i not in table for table in tables.values())
    }
    return tables, sizes


def kept_entries(masks, parameters):
    """The ``(parameter, place)`` pairs that masks keep."""
    return {
        (index, place)
        for index, key in enumerate(parameters)
        for place, keep in enumerate(masks[key].flatten().tolist())
        if keep
    }


def oracle(tables, sizes, alive=None):
    """The layout of the same numbers; with ``alive`` the tables hold these places of each parameter only."""
    if alive is None:
        return Layout(tables, sizes, weights_of(sizes))
    weights = [[row[place] for place in alive[index]] for index, row in enumerate(weights_of(sizes))]
    return Layout(tables, [len(row) for row in weights], weights)


def prune_places(model, places):
    """Prune the given ``{parameter: places}`` the way any torch user might have done before."""
    for index, layer in enumerate(model):
        mask = torch.ones_like(layer.weight)
        mask.view(-1)[sorted(places.get(index, ()))] = 0
        prune.custom_from_mask(layer, "weight", mask)
