"""How often the host waits for an accelerator, counted on the simulated one; every wait stalls a GPU."""

import pytest
import torch

from disparse_plugin import disparse_static, score_tasks
from disparse_plugin.analysis import GradientConflict
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from networks import TwoHeads, digit_batches, digit_losses

# What is reached. An update of dynamic masks waits four times, and twice for all layers that the same tasks reach, here
# of three kinds; gradual pruning, whose criterion looks at layer after layer, more often the more there are,
# and asks once whether shares are still right.
SCORES, MASKS, IMPORTANCE, UPDATE, GRADUAL = 4, 2, 1, 4 + 2 * 3, 21


def on(device, count):
    return [(images.to(device), labels.to(device)) for images, labels in digit_batches(count)]


class Watched:
    """Batches that note, whenever one is asked for, how often the host has waited since the one before."""

    def __init__(self, batches, waits):
        self.batches, self.waits, self.found = batches, waits, []

    def __iter__(self):
        for batch in self.batches:
            self.waits.clear()
            yield batch
            self.found.append(dict(self.waits))
        self.waits.clear()


@pytest.mark.parametrize("criterion", ["snip", "fisher", "gradient", "authors_pretrained", "layer_adaptive(taylor)"])
@pytest.mark.parametrize("masked", [False, True])
def test_none_in_the_loop_over_batches(device, waits, criterion, masked):
    model = TwoHeads().to(device)
    if masked:
        disparse_static(model, digit_losses, on(device, 1), 0.5)
    data = Watched(on(device, 4), waits)
    score_tasks(model, digit_losses, data, criterion=criterion)
    assert data.found == [{}] * 4


def test_none_in_the_loop_where_gradients_are_observed(device, waits):
    data = Watched(on(device, 3), waits)
    score_tasks(TwoHeads().to(device), digit_losses, data, observe=GradientConflict())
    assert data.found == [{}] * 3


def test_after_the_loop_a_few_however_many_batches(device, waits):
    """Whether all losses and scores are finite is read at once, and so is how many are zero."""
    model, batches = TwoHeads().to(device), on(device, 5)
    waits.clear()
    score_tasks(model, digit_losses, batches)
    assert sum(waits.values()) <= SCORES, waits


def test_a_cut_waits_twice(device, waits):
    scores = score_tasks(TwoHeads().to(device).eval(), digit_losses, on(device, 2))
    waits.clear()
    scores.masks(0.9)
    assert sum(waits.values()) <= MASKS, waits
    waits.clear()
    scores.importance()
    assert sum(waits.values()) <= IMPORTANCE, waits


def updates(scheduler, optimizer, model, batches):
    for batch in batches:
        optimizer.zero_grad()
        sum(digit_losses(model, batch).values()).backward()
        optimizer.step()
        yield scheduler.step, batch


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_an_update_of_dynamic_masks(device, waits, make):
    model, batches = TwoHeads().to(device), on(device, 4)
    optimizer = make(model.parameters(), lr=0.01)
    scheduler = DiSparseScheduler(model, optimizer, digit_losses, amount=0.8, update_every=2, stop_at=100)
    for number, (step, batch) in enumerate(updates(scheduler, optimizer, model, batches), 1):
        waits.clear()
        assert (step(batch) is not None) == (number % 2 == 0)
        assert sum(waits.values()) <= (UPDATE if number % 2 == 0 else 0), waits


def test_an_update_of_gradual_pruning(device, waits):
    model, batches = TwoHeads().to(device), on(device, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = GradualPruning(model, optimizer, digit_losses, amount=0.8, update_every=2, stop_at=100)
    for number, (step, batch) in enumerate(updates(scheduler, optimizer, model, batches), 1):
        waits.clear()
        step(batch)
        assert sum(waits.values()) <= (GRADUAL if number % 2 == 0 else 0), waits
