"""Random multi-task networks: shared, private, frozen, tied, unused and recurrent parts; their losses and data."""

import dataclasses

import torch
from hypothesis import strategies as st
from torch import nn

TYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)
LAST = {"mean": lambda y: y.mean(), "square": lambda y: y.square().mean(), "abs": lambda y: (y - 0.1).abs().sum(),
        "logsumexp": lambda y: y.logsumexp(-1).mean(), "one entry": lambda y: y.reshape(-1)[0] ** 2}  # fmt: skip
WIDTH = 4


class Conv(nn.Module):
    """A convolution over a row of numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x.unsqueeze(1)).mean(1)


class Recurrent(nn.Module):
    """One linear layer that runs three times."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for _ in range(3):
            x = self.cell(x).tanh()
        return x


class Rnn(nn.Module):
    """A GRU, whose weights are no layers of their own, behind a linear layer that is one."""

    def __init__(self):
        super().__init__()
        self.first, self.rnn = nn.Linear(WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return self.rnn(self.first(x).unsqueeze(1))[0].squeeze(1)


class Normed(nn.Module):
    """What scoring in training mode must put back: running statistics and the state of the random generator."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.norm(self.linear(x)))


class Dead(nn.Module):
    """A layer whose units never fire: all scores are zero."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        nn.init.constant_(self.linear.bias, -100.0)

    def forward(self, x):
        return x + self.linear(x).relu()


BLOCKS = {"linear": lambda: nn.Linear(WIDTH, WIDTH), "conv": Conv, "recurrent": Recurrent, "rnn": Rnn,
          "normed": Normed, "dead": Dead}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that is needed to build the same network again.

    ``reach[task]`` are the blocks that the task runs through, in order.
    """

    blocks: tuple
    reach: dict
    frozen: frozenset
    unused: bool
    tied: bool
    last: dict
    dtype: torch.dtype
    training: bool
    seed: int

    def build(self):
        torch.manual_seed(self.seed)
        return Net(self).to(self.dtype).train(self.training)

    def losses(self, scale=None, order=None):
        """Losses of these tasks, each times its scale, in this order."""
        tasks = list(self.reach) if order is None else order

        def losses(model, batch):
            outputs = model(batch)
            return {task: LAST[self.last[task]](outputs[task]) * (scale or {}).get(task, 1.0) for task in tasks}

        return losses

    def data(self, count=2, batch=3):
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.randn(batch, WIDTH, generator=generator, dtype=torch.float64).to(self.dtype) for _ in range(count)
        ]


class Net(nn.Module):
    """The network of a recipe."""

    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe
        self.blocks = nn.ModuleList([BLOCKS[kind]() for kind in recipe.blocks])
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, 2) for task in recipe.reach})
        if recipe.unused:
            self.unused = nn.Linear(WIDTH, 3)
        if recipe.tied:
            self.tied, self.also_tied = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.also_tied.weight = self.tied.weight
        for index in recipe.frozen:
            self.blocks[index].requires_grad_(False)

    def forward(self, x):
        if self.recipe.tied:
            x = x + self.also_tied(self.tied(x).tanh())
        return {task: self.heads[task](self._through(reached, x)) for task, reached in self.recipe.reach.items()}

    def _through(self, reached, x):
        for index in reached:
            x = torch.tanh(self.blocks[index](x))
        return x


@st.composite
def recipes(draw, types=TYPES):
    blocks = tuple(draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4)))
    tasks = [f"task{number}" for number in range(draw(st.integers(1, 4)))]
    some = st.sets(st.integers(0, len(blocks) - 1))
    return Recipe(
        blocks,
        {task: tuple(sorted(draw(some))) for task in tasks},
        frozenset(draw(some) if draw(st.booleans()) else ()),
        draw(st.booleans()),
        draw(st.booleans()),
        {task: draw(st.sampled_from(sorted(LAST))) for task in tasks},
        draw(st.sampled_from(types)),
        draw(st.booleans()),
        draw(st.integers(0, 99)),
    )
