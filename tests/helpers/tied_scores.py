"""Scores and weights that tie all the time, in every type and partly masked already, and their oracle."""

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from disparse_plugin import TaskScores
from oracles.agreement import Layout

# The same numbers in every type, both zeros among them; sums of them are exact.
SCORES = (-2.0, -0.5, -0.0, 0.0, 0.0, 0.5, 2.0)
WEIGHTS = (-1.5, -1.0, -0.0, 0.0, 0.5, 1.0)
WEIGHT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCORE_TYPES = (torch.float32, torch.float64)


class Bare(nn.Module):
    """A module that holds one weight of any shape."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


@dataclasses.dataclass(frozen=True)
class Tied:
    """Numbers of several tasks on several tensors; lists are in row-major order.

    ``tables[task][tensor]`` are scores, ``weights[tensor]`` weights, ``alive[tensor]`` whether an entry is alive.
    """

    shapes: list
    tables: dict
    weights: list
    alive: list
    weight_type: torch.dtype = torch.float32
    score_type: torch.dtype = torch.float32

    def build(self, device="cpu"):
        """A fresh model and its scores; masks are attached only where something is dead."""
        made = [
            Bare(torch.tensor(row, dtype=self.weight_type).view(shape))
            for row, shape in zip(self.weights, self.shapes, strict=True)
        ]
        model = nn.ModuleList(made).to(device)
        for layer, row, shape in zip(model, self.alive, self.shapes, strict=True):
            if not all(row):
                prune.custom_from_mask(layer, "weight", torch.tensor(row, device=device).view(shape))
        scores = {
            task: {
                (model[index], "weight"): torch.tensor(row, dtype=self.score_type, device=device).view(
                    self.shapes[index]
                )
                for index, row in table.items()
            }
            for task, table in self.tables.items()
        }
        return model, TaskScores(model, scores, parameters=[(layer, "weight") for layer in model])

    def places(self):
        """Of each tensor, the places of the entries alive."""
        return [[place for place, there in enumerate(row) if there] for row in self.alive]

    def oracle(self):
        """The layout of the entries alive."""
        places = self.places()
        tables = {
            task: {index: [row[place] for place in places[index]] for index, row in table.items()}
            for task, table in self.tables.items()
        }
        weights = [[row[place] for place in own] for row, own in zip(self.weights, places, strict=True)]
        return Layout(tables, [len(own) for own in places], weights)

    def there(self, entries):
        """Put ``(tensor, number among the alive)`` back in place."""
        places = self.places()
        return {(index, places[index][number]) for index, number in entries}

    @property
    def size(self):
        return sum(sum(row) for row in self.alive)


@st.composite
def tied(draw, shapes=((3,), (2, 3), (2, 4), (3, 2, 2)), max_tensors=4, max_tasks=3):
    """Draw a :class:`Tied`; every task reaches something alive, everything is reached."""
    chosen = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=max_tensors))
    tasks = [f"task{number}" for number in range(draw(st.integers(1, max_tasks)))]
    reach = [draw(st.lists(st.sampled_from(tasks), min_size=1, unique=True)) for _ in chosen]
    reach[0] = tasks
    sizes = [math.prod(shape) for shape in chosen]
    row = {size: st.lists(st.sampled_from(SCORES), min_size=size, max_size=size) for size in sizes}
    tables = {
        task: {index: draw(row[size]) for index, size in enumerate(sizes) if task in reach[index]} for task in tasks
    }
    weights = [draw(st.lists(st.sampled_from(WEIGHTS), min_size=size, max_size=size)) for size in sizes]
    masked = draw(st.booleans())
    alive = [draw(st.lists(st.booleans(), min_size=size, max_size=size)) if masked else [True] * size for size in sizes]
    alive[0][0] = True
    types = draw(st.sampled_from(WEIGHT_TYPES)), draw(st.sampled_from(SCORE_TYPES))
    return Tied(chosen, tables, weights, alive, *types)


def kept_places(model, masks=None):
    """The ``(tensor, place)`` pairs that masks keep; by default those that the model carries."""
    found = [layer.weight_mask if masks is None else masks[layer, "weight"] for layer in model]
    return {(i, place) for i, mask in enumerate(found) for place in mask.flatten().nonzero().flatten().tolist()}
