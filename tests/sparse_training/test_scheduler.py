"""Inside real training loops: accumulation, mixed precision, compiled models, missing tasks, and nothing disturbed."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from disparse_plugin import prunable_parameters
from disparse_plugin.masks import fold
from disparse_plugin.sparse_training import DiSparseScheduler, joint
from networks import PartlyShared, Snapshot, TwoHeads, digit_batches, digit_losses, square_losses, vectors
from runs import Run, alive_count, alive_places, given_losses, masked_model, masks_of, weights_total


def equal_masks(one, other):
    one, other = masks_of(one), masks_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def backward(run, batch, factor=1.0):
    (factor * sum(run.losses(run.model, batch).values())).backward()


def test_the_total_is_exact_at_every_step_and_the_masks_do_move():
    run = Run(stop_at=16)
    start, target = masks_of(run.model), weights_total(run.model) - round(0.8 * weights_total(run.model))
    for step in range(20):
        run.train(1, first=step)
        assert alive_count(run.model) == target
    assert not all(torch.equal(mask, start[name]) for name, mask in masks_of(run.model).items())


@pytest.mark.parametrize("options", [{}, {"criterion": "random"}, {"arbiter": "mean", "regrow_dropped": True}])
def test_the_default_device_of_torch_does_not_matter(options):
    """A tensor that lands on it by mistake has no data there."""
    model, batches = TwoHeads(), digit_batches(3)
    torch.set_default_device("meta")
    try:
        run = Run(model=model, update_every=1, **options)
        before = masks_of(model)
        for batch in batches:
            backward(run, batch)
            run.optimizer.step()
            run.scheduler.step(batch)
        run.scheduler.load_state_dict(run.scheduler.state_dict())
    finally:
        torch.set_default_device(None)
    assert not all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 8)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Linear(8, 1)})

    def forward(self, x):
        hidden = self.rnn(x)[0]
        return {task: head(hidden) for task, head in self.heads.items()}


def test_a_folded_recurrent_layer_computes_with_its_own_weights():
    """It keeps a list of its weights beside the parameters, which must not go on holding the masked copies."""
    model, batch = Recurrent(), torch.randn(5, 4, 8)
    keys = [(model.rnn, "weight_ih_l0"), (model.rnn, "weight_hh_l0"), (model.heads["a"], "weight")]
    run = Run(model=model, losses=square_losses, parameters=keys, amount=0.5, update_every=1)
    backward(run, batch)
    run.optimizer.step()
    run.scheduler.step(batch)
    expected = {task: output.detach() for task, output in model(batch).items()}
    fold(model)
    assert [*map(id, model.rnn._flat_weights)] == [*map(id, model.rnn.parameters())]
    assert all(torch.equal(output, expected[task]) for task, output in model(batch).items())
    assert int((model.rnn.weight_ih_l0 == 0).sum()) > 0
    sum(output.sum() for output in model(batch).values()).backward()
    assert model.rnn.weight_ih_l0.grad is not None


def test_dense_layers_stay_dense_without_churn():
    run = Run(distribution={"trunk.0.weight": 1.0})
    momentum = []
    for step in range(6):
        run.train(1, first=step)
        assert bool((run.model.trunk[0].weight_mask == 1).all())
        momentum.append(run.optimizer.state[run.model.trunk[0].weight_orig]["momentum_buffer"].clone())
    assert all(bool((buffer != 0).all()) for buffer in momentum)


def test_an_update_leaves_everything_but_masks_weights_and_moments():
    """BatchNorm statistics, gradients, random states, modes, hooks: as before, also when the losses fail."""
    run = Run(update_every=1)
    run.train(1)
    snapshot = Snapshot(run.model)
    changes = ("weight_mask", "weight_orig")
    snapshot.values = {name: value for name, value in snapshot.values.items() if not name.endswith(changes)}
    snapshot._tensors = lambda: ((n, t) for n, t in Snapshot._tensors(snapshot) if not n.endswith(changes))
    snapshot.identities = {n: i for n, i in snapshot.identities.items() if not n.endswith(changes)}
    snapshot.facts["effective"] = None
    facts = snapshot._facts
    snapshot._facts = lambda: {**facts(), "effective": None}
    run.optimizer.step()
    snapshot.values = {name: value.detach().clone() for name, value in snapshot._tensors()}
    assert run.scheduler.step(digit_batches(1)[0]) is not None
    snapshot.check()


def raising(losses):
    raise ValueError("depth is missing")


def not_a_number(losses):
    return {**losses, "b": losses["b"] * torch.nan}


def infinite(losses):
    return {task: loss * 1e38 * 1e38 for task, loss in losses.items()}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (raising, "depth is missing"),
        (not_a_number, "must be finite, found nan for task 'b'"),
        (infinite, "must be finite, found inf for task 'a'"),
    ],
)
def test_losses_that_fail_leave_the_masks_as_they_were(failure, message):
    changes = []
    run = Run(
        losses=lambda model, batch: changes[0](digit_losses(model, batch)) if changes else digit_losses(model, batch),
        update_every=1,
    )
    run.train(1)
    before = masks_of(run.model)
    run.losses = digit_losses  # training itself goes on
    changes.append(failure)
    with pytest.raises(ValueError, match=message):
        run.train(1, first=1)
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(run.model).items())
    assert all(not module._forward_hooks for module in run.model.modules())
    changes.clear()
    assert run.train(1, first=2)


def test_accumulated_batches_count_as_one_step_and_all_are_scored():
    batches = digit_batches(8, size=2)
    accumulated = Run(update_every=1)
    for pair in range(4):
        two = batches[2 * pair : 2 * pair + 2]
        accumulated.optimizer.zero_grad()
        for batch in two:
            backward(accumulated, batch, 0.5)
            if batch is two[0]:
                assert accumulated.scheduler.step(batch) is None  # a call between micro-batches does nothing
        accumulated.optimizer.step()
        assert accumulated.scheduler.step(*two).step == pair + 1
    assert accumulated.scheduler.completed == 4


def test_the_scores_of_several_batches_add_up():
    """One step on two batches grows as one step on a batch whose losses have the two gradients added up."""
    one, two = {"a": {0: [0.0, 1.0, 4.0, 3.0]}}, {"a": {0: [0.0, -3.0, -1.0, -3.0]}}
    model = masked_model([[1.0, 0.0, 0.0, 0.0]], [[True, False, False, False]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = DiSparseScheduler(
        model,
        optimizer,
        lambda model, gradients: given_losses(gradients)(model, None),
        distribution="existing",
        update_every=1,
        stop_at=2,
        drop_fraction=lambda step: 1.0,
    )
    optimizer.step()
    scheduler.step(one, two)  # absolute values added: 4, 5, 6
    assert alive_places(model) == [{3}]


def amp_step(run, scaler, batch, infinite=False):
    run.optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sum(run.losses(run.model, batch).values())
    scaler.scale(loss).backward()
    if infinite:
        run.model.heads["a"].weight_orig.grad[0, 0] = torch.inf
    scaler.step(run.optimizer)
    scaler.update()
    return run.scheduler.step(batch)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_grad_scaler_skips_do_not_count(fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run = Run(lambda p: torch.optim.Adam(p, lr=0.01, fused=fused), update_every=2, grad_scaler=scaler)
    batches = digit_batches(6)
    before = masks_of(run.model)
    assert amp_step(run, scaler, batches[0]) is None
    assert amp_step(run, scaler, batches[1], infinite=True) is None
    assert run.scheduler.completed == 1
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(run.model).items())
    assert amp_step(run, scaler, batches[2]).step == 2


def test_an_update_whose_scaled_gradients_overflow_is_put_off_with_a_smaller_scale():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17)
    scales = []

    def losses(model, batch):
        found = digit_losses(model, batch)
        for loss in found.values():
            loss.register_hook(lambda grad: grad.to(torch.float16).float())  # 2^17 is infinite in half precision
        return found

    run = Run(losses=losses, update_every=1, grad_scaler=scaler)
    before = masks_of(run.model)
    run.losses = digit_losses
    for step in range(3):
        updates = run.train(1, first=step)
        scales.append(bool(updates))
        if not updates:
            assert all(torch.equal(mask, before[name]) for name, mask in masks_of(run.model).items())
    assert scales == [False, False, True]  # 2^17 and 2^16 overflow, 2^15 does not


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_is_not_compiled_again_by_updates(backend):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, x):
            features = self.trunk(x).tanh()
            return {"a": self.a(features), "b": self.b(features)}

    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = Plain()
        used = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        run = Run(model=used, losses=square_losses, update_every=2)
        graphs = []
        for batch in vectors(9):
            run.optimizer.zero_grad()
            backward(run, batch)
            run.optimizer.step()
            run.scheduler.step(batch)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        if compiled:
            assert graphs[0] == graphs[-1] == 1
        runs.append(model)
    assert equal_masks(*runs)
    assert alive_count(runs[0]) == weights_total(runs[0]) - round(0.8 * weights_total(runs[0]))


def test_a_batch_of_one():
    model = PartlyShared()
    run = Run(model=model, losses=square_losses, update_every=1, exclude=["unused"])
    for batch in vectors(4, size=1):
        run.optimizer.zero_grad()
        backward(run, batch)
        run.optimizer.step()
        assert sum(run.scheduler.step(batch).exchanged.values()) > 0


def test_a_layer_that_is_no_longer_reached_is_told_once():
    """Re-entrant checkpointing, a detached trunk, a frozen part: nothing was exchanged there, and nothing said."""
    detached = []

    def losses(model, batch):
        images, labels = batch
        features = model.trunk(images)
        features = features.detach() if detached else features
        return {task: F.cross_entropy(head(features), labels) for task, head in model.heads.items()}

    run = Run(losses=losses, update_every=1)
    run.train(2)
    detached.append(True)
    run.losses = digit_losses  # training itself goes on
    with pytest.warns(UserWarning, match=r"2 of 4 are .*: trunk.0.weight, trunk.3.weight; .* exclude=\[...\]") as told:
        update = run.train(2, first=2)[-1]
    assert len(told) == 1
    assert told[0].filename.endswith("runs.py")
    assert update.exchanged["trunk.3.weight"] == 0


def test_layers_of_a_task_that_misses_in_the_batch_stay_as_they_are():
    def losses(model, batch):
        found = square_losses(model, batch)
        return {task: loss for task, loss in found.items() if task != "c" or bool(batch[0, 0] > 0)}

    model = PartlyShared()
    run = Run(model=model, losses=losses, update_every=1, amount=0.6)
    seen = set()
    for number, batch in enumerate(vectors(8, seed=3)):
        before = masks_of(model)
        run.optimizer.zero_grad()
        backward(run, batch)
        run.optimizer.step()
        # By turns is not for good: only what no task ever reaches is told, once, when all known tasks were there.
        unreached = "1 of 7 are reached by no task's loss, .*: unused.weight; if that"
        with pytest.warns(UserWarning, match=unreached) if number == 1 else contextlib.nullcontext():
            update = run.scheduler.step(batch)
        present = bool(batch[0, 0] > 0)
        seen.add(present)
        unchanged = torch.equal(before["heads.c.weight_mask"], masks_of(model)["heads.c.weight_mask"])
        assert unchanged == (update.exchanged["heads.c.weight"] == 0) == (not present)
        assert update.exchanged["unused.weight"] == 0
        assert update.exchanged["abc.weight"] > 0
    assert seen == {True, False}


def test_other_names_for_the_special_cases():
    rigl = Run(losses=joint(digit_losses))
    assert sum(rigl.train(2)[0].exchanged.values()) > 0
    static = Run(drop_fraction=0.0)
    before = masks_of(static.model)
    assert sum(static.train(2)[0].exchanged.values()) == 0
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(static.model).items())


def test_a_step_without_a_batch_is_refused_unless_growth_is_random():
    with pytest.raises(TypeError, match="batch: step"):
        Run().scheduler.step()
    assert Run(criterion="random").scheduler.step() is None


def test_an_optimizer_that_never_steps_is_pointed_out(monkeypatch):
    monkeypatch.setattr("disparse_plugin.sparse_training.completed_steps.PATIENCE", 3)
    run = Run()
    batch = digit_batches(1)[0]
    run.scheduler.step(batch)
    run.scheduler.step(batch)
    with pytest.warns(UserWarning, match="optimizer: must be the one whose step"):
        run.scheduler.step(batch)


def test_an_optimizer_that_another_took_the_place_of_is_pointed_out(monkeypatch):
    monkeypatch.setattr("disparse_plugin.sparse_training.completed_steps.PATIENCE", 3)
    run = Run()
    run.train(2)
    batch = digit_batches(1)[0]
    run.scheduler.step(batch)
    run.scheduler.step(batch)
    with pytest.warns(UserWarning, match="optimizer: must be the one .*, and for another optimizer make another"):
        run.scheduler.step(batch)


def test_losses_of_half_precision_are_scaled_as_a_grad_scaler_scales_them():
    def losses(model, batch):
        return {task: (loss + 2).half() for task, loss in digit_losses(model, batch).items()}

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)  # 2 * 2^15 is more than a float16 can be
    run = Run(losses=losses, grad_scaler=scaler, update_every=1)
    for batch in digit_batches(3):
        run.optimizer.zero_grad()
        scaler.scale(sum(losses(run.model, batch).values())).backward()
        scaler.step(run.optimizer)
        scaler.update()
        assert run.scheduler.step(batch) is not None


def test_it_goes_on_from_the_masks_of_a_pruned_model():
    from disparse_plugin import disparse_static

    model = TwoHeads()
    disparse_static(model, digit_losses, digit_batches(2), amount=0.9)
    before = masks_of(model)
    run = Run(model=model, amount=None, distribution="existing")
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items())
    with pytest.raises(ValueError, match="distribution: the model must not carry masks"):
        DiSparseScheduler(model, run.optimizer, digit_losses, amount=0.9, stop_at=5)
    run.train(4)
    for name, mask in masks_of(model).items():
        assert int(mask.sum()) == int(before[name].sum())


def test_on_every_device(device):
    model = TwoHeads().to(device)
    run = Run(model=model, update_every=1, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    total = alive_count(model)
    for images, labels in digit_batches(4):
        batch = images.to(device), labels.to(device)
        run.optimizer.zero_grad()
        backward(run, batch)
        run.optimizer.step()
        assert sum(run.scheduler.step(batch).exchanged.values()) > 0
        assert alive_count(model) == total
    for module, _ in prunable_parameters(model):
        assert module.weight_mask.device == module.weight_orig.device
        assert bool((module.weight_orig[module.weight_mask == 0] == 0).all())
    other = Run(model=TwoHeads().to(device), update_every=1, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    other.scheduler.load_state_dict(run.scheduler.state_dict())
    assert equal_masks(other.model, model)


def test_float64_and_frozen_layers():
    model = TwoHeads().double()
    for parameter in model.trunk.parameters():
        parameter.requires_grad_(False)
    batches = [(images.double(), labels) for images, labels in digit_batches(4)]
    with pytest.warns(UserWarning, match=r"2 of 4 are frozen \(first: trunk.0.weight\).*exclude=\['trunk.0.weight'"):
        run = Run(model=model, update_every=1)
    for batch in batches:
        run.optimizer.zero_grad()
        backward(run, batch)
        run.optimizer.step()
        run.scheduler.step(batch)
    assert not any(p.requires_grad for p in model.trunk.parameters())
    assert all(module.weight_mask.dtype == torch.float64 for module, _ in prunable_parameters(model))


def test_a_step_whose_losses_failed_is_counted_when_they_work():
    run = Run(update_every=100)
    working, fail = run.scheduler._losses, [True]

    def losses(model, batch):
        if fail.pop() if fail else False:
            raise OSError("the disk was busy")
        return working(model, batch)

    run.scheduler._losses = losses
    (batch,) = digit_batches(1)
    backward(run, batch)
    run.optimizer.step()
    with pytest.raises(OSError, match="busy"):
        run.scheduler.step(batch)
    assert run.scheduler.completed == 0
    run.optimizer.step()
    run.scheduler.step(batch)
    assert run.scheduler.completed == 2
