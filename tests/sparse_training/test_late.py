"""Updates that come late: put off because gradients overflow, or because ``step`` is not called after every step."""

import pytest
import torch

from disparse_plugin.sparse_training import GradualPruning
from networks import digit_batches, digit_losses
from runs import Run, masks_of


def late(run, steps, every):
    """Call the scheduler after several optimizer steps at a time."""
    reports = []
    for batch in digit_batches(steps):
        for _ in range(every):
            run.optimizer.zero_grad()
            sum(digit_losses(run.model, batch).values()).backward()
            run.optimizer.step()
        reports.append(run.scheduler.step(batch))
    return [report.step for report in reports if report is not None]


@pytest.mark.parametrize(("stop_at", "steps"), [(10, [6, 9]), (9, [6]), (7, [6]), (5, [])])
def test_no_update_is_made_from_stop_at_on(stop_at, steps):
    run = Run(update_every=4, stop_at=stop_at, drop_fraction=lambda step: 0.3)
    assert late(run, 5, 3) == steps


def test_an_update_that_is_put_off_until_stop_at_is_left_out():
    overflows = [False]

    def losses(model, batch):
        return {task: loss * (torch.inf if overflows[0] else 1) for task, loss in digit_losses(model, batch).items()}

    run = Run(losses=losses, update_every=2, stop_at=5, grad_scaler=torch.amp.GradScaler("cpu"))
    run.losses = digit_losses
    assert [update.step for update in run.train(3)] == [2]
    overflows[0] = True
    assert run.train(1, first=3) == []
    overflows[0], before = False, masks_of(run.model)
    assert run.train(3, first=4) == []
    after = masks_of(run.model)
    assert all(torch.equal(after[name], mask) for name, mask in before.items())
    assert run.scheduler.completed == 7


def test_the_last_stage_of_gradual_pruning_is_made_late():
    class Gradual(Run):
        scheduler_class = GradualPruning

    run = Gradual(update_every=4, stop_at=7)
    assert late(run, 5, 3) == [6, 9]
    assert run.scheduler.unfinished() is None
