"""What score_tasks computes, and that it leaves the model alone."""

import copy
import io
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from disparse_plugin import TaskScores, layer_adaptive, prunable_parameters, score_tasks
from networks import Around, PartlyShared, Snapshot, TwoHeads, digit_batches, digit_losses, square_losses, vectors
from oracles.agreement import lamp

DEFINITIONS = {
    "snip": lambda w, grads: sum(np.abs(w * g) for g in grads),
    "taylor": lambda w, grads: sum(np.abs(w * g) for g in grads),
    "magnitude": lambda w, grads: np.abs(w),
    "fisher": lambda w, grads: sum((w * g) ** 2 for g in grads),
    "gradient": lambda w, grads: sum(np.abs(g) for g in grads),
    "authors_pretrained": lambda w, grads: w**2 * sum(np.abs(g) for g in grads),
}


def gradients_by_backward(model, losses, batches, module):
    """Each task's gradients of ``module.weight``, one backward of a fresh graph per task and batch."""
    found = {}
    for batch in batches:
        for task in losses(model, batch):
            model.zero_grad()
            losses(model, batch)[task].backward()
            if module.weight.grad is not None:
                found.setdefault(task, []).append(module.weight.grad.double().cpu().numpy().copy())
            model.zero_grad()
    return found


@pytest.mark.parametrize("criterion", DEFINITIONS)
def test_scores_follow_their_definition(criterion, device):
    model = PartlyShared().to(device)
    batches = [batch.to(device) for batch in vectors()]
    with pytest.warns(UserWarning, match=r"unused\.weight"):
        scores = score_tasks(model, square_losses, batches, criterion=criterion)
    for module, name in scores.parameters:
        expected = gradients_by_backward(model, square_losses, batches, module)
        assert set(scores.tasks_reaching(module, name)) == set(expected)
        weight = module.weight.detach().double().cpu().numpy()
        for task, grads in expected.items():
            found = scores[task][module, name]
            assert found.device.type == device.type
            assert found.dtype == torch.float32
            np.testing.assert_allclose(found.cpu(), DEFINITIONS[criterion](weight, grads), rtol=2e-5, atol=1e-9)


def test_membership_is_read_off_the_graph():
    model = PartlyShared()
    with pytest.warns(UserWarning, match="reached by no task"):
        scores = score_tasks(model, square_losses, vectors())
    reached = {name: scores.tasks_reaching(*key) for name, key in zip(scores.names, scores.parameters, strict=True)}
    assert reached == {
        "abc.weight": ("a", "b", "c"),
        "ab.weight": ("a", "b"),
        "heads.a.weight": ("a",),
        "heads.b.weight": ("b",),
        "heads.c.weight": ("c",),
        "d.weight": ("d",),
    }
    assert scores.unreached == ("unused.weight",)
    assert scores.tasks_reaching(model.unused, "weight") == ()


def test_one_forward_per_batch():
    model, calls = TwoHeads(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    score_tasks(model, digit_losses, digit_batches(3))
    assert len(calls) == 3


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_model_is_left_as_found(train, frozen, pruned):
    model = TwoHeads()
    model.train(train)
    model.trunk[0].requires_grad_(not frozen)
    if pruned:
        prune.random_unstructured(model.trunk[3], "weight", 0.5)
    digit_losses(model, digit_batches(1)[0])["a"].backward()
    before = Snapshot(model)
    score_tasks(model, digit_losses, digit_batches())
    before.check()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_model_is_left_as_found_when_the_loss_raises(error):
    model, batches = TwoHeads(), digit_batches(3)
    model.heads["a"].requires_grad_(False)
    prune.random_unstructured(model.trunk[0], "weight", 0.5)
    before = Snapshot(model)

    def losses(model, batch):
        result = digit_losses(model, batch)
        model.eval()
        np.random.rand()
        random.random()
        if batch is batches[1]:
            raise error("half-way")
        return result

    with pytest.raises(error, match="half-way"):
        score_tasks(model, losses, batches)
    before.check()


def test_the_forward_sees_the_present_mode():
    model, seen = TwoHeads(), []

    def losses(model, batch):
        seen.append(model.training)
        return digit_losses(model, batch)

    score_tasks(model.eval(), losses, digit_batches(1))
    score_tasks(model.train(), losses, digit_batches(1))
    assert seen == [False, True]


def test_works_where_the_caller_has_gradients_off():
    model, batches = TwoHeads().eval(), digit_batches()
    expected = score_tasks(model, digit_losses, batches)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = score_tasks(model, digit_losses, batches)
        for key in expected.parameters:
            for task in expected.tasks_reaching(*key):
                assert torch.equal(found[task][key], expected[task][key])


def test_works_after_an_evaluation_in_any_mode():
    """Which leaves the product of the pruning hook in the module, of whatever kind it is."""
    model, batches = TwoHeads().eval(), digit_batches()
    key = (model.trunk[3], "weight")
    prune.random_unstructured(*key, 0.5)
    found = []
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            model(batches[0][0])
        found.append(score_tasks(model, digit_losses, batches)["a"][key])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_an_inner_step_is_differentiated_through():
    """As a step of MAML: scores are ``|w dL/dw|`` of the module's own weights, from which the others are made."""
    model, batch = Around(nn.Linear(5, 5)), vectors(1)[0]

    def losses(model, batch):
        weights = dict(model.named_parameters())
        inner = sum(square_losses(model, batch).values())
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True, allow_unused=True)
        fast = {name: w if g is None else w - 0.5 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
        outputs = torch.func.functional_call(model, fast, (batch,))
        return {task: output.square().mean() for task, output in outputs.items()}

    scores = score_tasks(model, losses, [batch], criterion="snip")
    for task, loss in losses(model, batch).items():
        keys = list(scores[task])
        grads = torch.autograd.grad(loss, [getattr(*key) for key in keys], retain_graph=True)
        for key, grad in zip(keys, grads, strict=True):
            torch.testing.assert_close(scores[task][key], (grad * getattr(*key)).abs())


@pytest.mark.parametrize("copied", [copy.deepcopy, AveragedModel, lambda model: torch.save(model, io.BytesIO())])
def test_losses_that_copy_the_model_are_told_to_do_it_before(copied):
    model = TwoHeads()
    before = Snapshot(model)

    def losses(model, batch):
        copied(model)
        return digit_losses(model, batch)

    with pytest.raises(TypeError, match=r"losses: must not copy or save the model while it .* before"):
        score_tasks(model, losses, digit_batches(1))
    before.check()


class Keeps(nn.Linear):
    """Keeps what it computes, as an attention keeps its biases in evaluation, and others their activations."""

    def __init__(self):
        super().__init__(5, 5)
        self.last, self.cache, self.seen, self.calls = None, {}, [], 0

    def forward(self, x):
        self.calls += 1
        scale = self.cache.setdefault("scale", self.weight.square().sum())
        self.last = self.new = super().forward(x) / scale
        self.seen.append(self.last)
        return self.last


def test_modules_keep_nothing_of_the_graph():
    model = Around(Keeps())
    score_tasks(model, square_losses, vectors(1))
    kept = model.first
    assert (kept.last, kept.cache, kept.seen, hasattr(kept, "new")) == (None, {}, [], False)
    assert kept.calls == 1  # what is no tensor is the module's own business
    copy.deepcopy(model)


def test_scores_of_a_pruned_model_use_the_effective_weight():
    model = TwoHeads().eval()
    key = (model.trunk[3], "weight")
    prune.random_unstructured(*key, 0.5)
    alive = model.trunk[3].weight_mask.bool()
    scores = score_tasks(model, digit_losses, digit_batches(), criterion="snip")
    dense = score_tasks(model, digit_losses, digit_batches(), criterion="gradient")
    assert (scores["a"][key][~alive] == 0).all()
    # The gradient of the effective weight does not vanish where the mask is zero; this is what growing needs.
    assert (dense["a"][key][~alive] > 0).any()
    loss = sum(digit_losses(model, batch)["a"] for batch in digit_batches(1))
    grad = torch.autograd.grad(loss, model.trunk[3].weight_orig)[0]
    single = score_tasks(model, digit_losses, digit_batches(1))
    torch.testing.assert_close(single["a"][key], (grad * model.trunk[3].weight).abs())


@pytest.mark.parametrize("pruned", [False, True])
def test_a_module_used_twice_gets_both_gradients(pruned):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return {"a": self.layer(self.layer(x).tanh()), "b": self.layer(x)}

    model = Twice()
    if pruned:
        prune.random_unstructured(model.layer, "weight", 0.4)
    scores = score_tasks(model, square_losses, vectors(1))
    leaf = model.layer.weight_orig if pruned else model.layer.weight
    grad = torch.autograd.grad(square_losses(model, vectors(1)[0])["a"], leaf)[0]
    torch.testing.assert_close(scores["a"][model.layer, "weight"], (grad * model.layer.weight).abs().detach())


def test_a_criterion_can_be_any_callable():
    model, key = TwoHeads().eval(), None
    scores = score_tasks(model, digit_losses, digit_batches(), criterion=lambda weight, grad: weight * grad)
    key = scores.parameters[0]
    grads = gradients_by_backward(model, digit_losses, digit_batches(), key[0])["b"]
    weight = key[0].weight.detach().double().numpy()
    np.testing.assert_allclose(scores["b"][key], sum(weight * g for g in grads), rtol=1e-4, atol=1e-8)


def test_a_callable_that_returns_its_input_does_not_corrupt_anything():
    model = TwoHeads().eval()
    before = Snapshot(model)
    scores = score_tasks(model, digit_losses, digit_batches(2), criterion=lambda weight, grad: weight)
    before.check()
    key = scores.parameters[0]
    torch.testing.assert_close(scores["a"][key], 2 * key[0].weight.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_of_scores(dtype):
    model = TwoHeads().eval().to(dtype)
    batches = [(images.to(dtype), labels) for images, labels in digit_batches()]
    scores = score_tasks(model, digit_losses, batches)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {score.dtype for task in scores for score in scores[task].values()} == {expected}


def test_num_batches_and_cycle():
    model = TwoHeads().eval()
    batches = digit_batches(3)
    key = (model.trunk[0], "weight")
    assert score_tasks(model, digit_losses, iter(batches), num_batches=2).num_batches == 2
    once = score_tasks(model, digit_losses, batches)
    twice = score_tasks(model, digit_losses, batches, num_batches=6, cycle=True)
    torch.testing.assert_close(twice["a"][key], 2 * once["a"][key])
    forever = score_tasks(model, digit_losses, itertools.cycle(batches), num_batches=6)
    torch.testing.assert_close(forever["a"][key], twice["a"][key])


def test_data_is_not_read_further_than_asked():
    taken = []
    data = (taken.append(1) or batch for batch in digit_batches(5))
    score_tasks(TwoHeads(), digit_losses, data, num_batches=2)
    assert len(taken) == 2


def test_progress_bar(capfd):
    score_tasks(TwoHeads(), digit_losses, digit_batches(3), progress=True)
    assert "3/3" in capfd.readouterr().err
    score_tasks(TwoHeads(), digit_losses, digit_batches(3), criterion="lamp", progress=True)
    assert "last steps: 100%" in capfd.readouterr().err
    score_tasks(TwoHeads(), digit_losses, digit_batches(3), criterion="lamp")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("criterion", ["layer_adaptive(damped(taylor, 0.5))", "lamp", "damped(fisher, 0.25)"])
def test_last_steps_in_threads_are_those_of_one(criterion, monkeypatch):
    model = TwoHeads().eval()
    one = score_tasks(model, digit_losses, digit_batches(2), criterion=criterion)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    two = score_tasks(model, digit_losses, digit_batches(2), criterion=criterion)
    assert all(torch.equal(two[task][key], score) for task in one for key, score in one[task].items())


class _NoReadback(TorchDispatchMode):
    """Fails when a tensor is read back to the host, by ``.item()``, ``bool()`` or data-dependent indexing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "masked_select"}, func
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_inside_the_batch_loop():
    def guarded(batches):
        with _NoReadback():
            yield from batches

    with pytest.raises(AssertionError), _NoReadback():
        torch.ones(1).item()
    score_tasks(TwoHeads(), digit_losses, guarded(digit_batches(3)))


def test_wrappers_are_looked_through():
    model = TwoHeads().eval()
    wrapped = nn.DataParallel(model)
    scores = score_tasks(wrapped, digit_losses, digit_batches())
    assert scores.names[0] == "trunk.0.weight"


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("how", ["wrapper", "closure", "in place"])
def test_compiled_models_are_scored_in_eager_mode(how, pruned):
    model = TwoHeads().eval()
    if pruned:
        prune.random_unstructured(model.trunk[3], "weight", 0.5)
    expected = score_tasks(model, digit_losses, digit_batches())
    compiled = torch.compile(model, backend="eager")
    if how == "in place":
        model.compile(backend="eager")
        compiled = model
    compiled(digit_batches(1)[0][0])
    losses = (lambda _, batch: digit_losses(compiled, batch)) if how == "closure" else digit_losses
    found = score_tasks(compiled, losses, digit_batches())
    assert found.names == expected.names
    for key in expected.parameters:
        for task in expected.tasks_reaching(*key):
            assert torch.equal(found[task][key], expected[task][key])


def test_a_loader_without_a_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from digit_batches(3)

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    assert score_tasks(TwoHeads(), digit_losses, loader).num_batches == 3
    with pytest.raises(ValueError, match="found 4 with 3 in data"):
        score_tasks(TwoHeads(), digit_losses, loader, num_batches=4)


def test_layer_adaptive_leaves_pruned_entries_out():
    model = TwoHeads().eval()
    prune.l1_unstructured(model.trunk[3], "weight", 0.5)
    key, alive = (model.trunk[3], "weight"), model.trunk[3].weight_mask.bool()
    plain = score_tasks(model, digit_losses, digit_batches(), criterion="gradient")["a"][key]
    adapted = score_tasks(model, digit_losses, digit_batches(), criterion=layer_adaptive("gradient"))["a"][key]
    np.testing.assert_allclose(adapted[alive], lamp(plain[alive]), rtol=1e-5)
    assert (adapted[~alive] == 0).all()


def test_save_and_load(tmp_path):
    model, path = PartlyShared(), tmp_path / "scores.safetensors"
    with pytest.warns(UserWarning, match="no task"):
        scores = score_tasks(model, square_losses, vectors(), criterion="fisher")
    scores.save(path)
    other = PartlyShared()
    loaded = TaskScores.load(path, nn.DataParallel(other))
    assert (loaded.tasks, loaded.names, loaded.unreached) == (scores.tasks, scores.names, scores.unreached)
    assert (loaded.criterion, loaded.num_batches) == ("fisher", 3)
    assert loaded.parameters[0] == (other.abc, "weight")
    first, second = scores.masks(0.7), loaded.masks(0.7)
    assert all(torch.equal(first[a], second[b]) for a, b in zip(scores.parameters, loaded.parameters, strict=True))


def test_scores_can_be_limited_to_some_parameters():
    model = TwoHeads()
    chosen = prunable_parameters(model, exclude=[model.heads])
    scores = score_tasks(model, digit_losses, digit_batches(), parameters=chosen)
    assert scores.names == ("trunk.0.weight", "trunk.3.weight")


class Renormed(nn.Linear):
    """Gives itself new values before it uses them, as some networks for EEG do."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


class Shrinking(nn.Linear):
    """Overwrites its values."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)


@pytest.mark.parametrize("first", [lambda: Renormed(5, 5), lambda: nn.Embedding(5, 5, max_norm=0.1)])
def test_parameters_that_the_forward_changes_are_as_before(first):
    model = nn.Sequential(first(), nn.Linear(5, 2))
    data = [torch.randn(3, 5) if isinstance(model[0], Renormed) else torch.arange(5)]
    before = Snapshot(model)
    score_tasks(model, lambda model, x: dict(zip("ab", model(x).square().mean(0), strict=True)), data)
    before.check()


def test_what_cannot_be_put_back_is_said():
    model = nn.Sequential(Shrinking(5, 5), nn.Linear(5, 2))
    with pytest.warns(UserWarning, match=r"must not write to its parameters .*\(first: 0.weight\)") as caught:
        score_tasks(model, lambda model, x: dict(zip("ab", model(x).square().mean(0), strict=True)), vectors(1))
    assert caught[0].filename == __file__


def test_whether_parameters_ask_for_gradients_is_as_before():
    model = TwoHeads()

    def losses(model, batch):
        model.requires_grad_(False)
        model.requires_grad_(True)
        model.trunk[0].bias.requires_grad_(False)
        return digit_losses(model, batch)

    score_tasks(model, losses, digit_batches(1))
    assert all(parameter.requires_grad for parameter in model.parameters())
