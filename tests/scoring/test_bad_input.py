"""Every mistake a user can make while scoring: its own error, and an untouched model."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader

from disparse_plugin import TaskScores, disparse_static, prunable_parameters, score_tasks
from disparse_plugin.analysis import GradientConflict
from disparse_plugin.criteria import Criterion
from networks import Snapshot, TwoHeads, digit_batches, digit_losses, square_losses, vectors

BATCHES = digit_batches(3)


def changed(change):
    """A loss function that applies ``change(losses, batch number)`` to sound losses."""

    def losses(model, batch):
        number = next(i for i, known in enumerate(BATCHES) if known is batch)
        return change(digit_losses(model, batch), number)

    return losses


def detached(losses, _):
    return {**losses, "b": losses["b"].detach()}


LOSSES = {
    "predictions of a detector": (
        lambda x, _: [{"boxes": x["a"]}],
        TypeError,
        r"found list in batch 0; .*these look like predictions: .* after model\.train\(\) only",
    ),
    "not a mapping": (lambda x, _: list(x.values()), TypeError, "must return a mapping .* found list in batch 0"),
    "empty": (lambda *_: {}, ValueError, "losses: must return at least one task, found an empty mapping in batch 0"),
    "no names": (lambda x, _: {1: x["a"]}, TypeError, "losses: task names must be str, found 1 of type int"),
    "a float": (lambda x, _: {"a": x["a"].item()}, TypeError, "the loss of task 'a' must be a tensor, found float"),
    "not a scalar": (
        lambda x, _: {"a": x["a"].expand(3)},
        ValueError,
        r"the loss of task 'a' must be one real number, found shape \(3,\)",
    ),
    "complex": (lambda x, _: {"a": x["a"] * 1j}, ValueError, "must be one real number, found shape .*complex64"),
    "a task appears": (
        lambda x, n: x if n else {"a": x["a"]},
        ValueError,
        r"every batch must return the same tasks, found \['a', 'b'\] in batch 1 after \['a'\] in batch 0",
    ),
    "a task vanishes": (lambda x, n: {"a": x["a"]} if n == 2 else x, ValueError, r"found \['a'\] in batch 2"),
    "nan": (
        lambda x, n: {**x, "b": x["b"] * (torch.nan if n == 1 else 1)},
        ValueError,
        "every loss must be finite, found nan for task 'b' in batch 1",
    ),
    "infinite": (
        lambda x, n: {**x, "a": x["a"] + (torch.inf if n == 2 else 0)},
        ValueError,
        "found inf for task 'a' in batch 2",
    ),
    "reaches nothing": (
        detached,
        ValueError,
        "losses: every task must reach at .* parameter, found none for task 'b'",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), LOSSES.values(), ids=LOSSES)
def test_losses(change, error, message):
    model = TwoHeads()
    before = Snapshot(model)
    for call in (score_tasks, lambda *args: disparse_static(*args, 0.9)):
        with pytest.raises(error, match=message):
            call(model, changed(change), BATCHES)
        before.check()


def test_a_gradient_that_is_not_finite_names_task_batch_and_parameter():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))

    def losses(model, batch):
        hidden = model[0](batch)
        # The square root has an infinite slope at zero, while the loss itself is fine.
        edge = (hidden - hidden.detach()).abs().sum().sqrt() if batch is batches[1] else hidden.sum()
        return {"smooth": model(batch).square().mean(), "edge": edge}

    batches = vectors()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"found NaN or infinity for task 'edge', batch 1, parameter 0\.weight"):
        score_tasks(model, losses, batches)
    before.check()


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, ValueError, "data: must hold at least one batch, found none"),
        (iter([]), {"num_batches": 2}, ValueError, "data: must hold at least one batch, found none"),
        (None, {}, TypeError, "data: must be an iterable of batches, found NoneType"),
        (
            BATCHES[0][0],
            {},
            TypeError,
            r"data: must be an iterable .* found one Tensor; a single batch is data=\[batch\]",
        ),
        ({"image": BATCHES[0][0]}, {}, TypeError, "data: must be an iterable of batches, found one dict"),
        ([DataLoader([1, 2])], {}, TypeError, "data: .* found a DataLoader in it, which holds batches .* data=loader"),
        (BATCHES, {"num_batches": True}, TypeError, "num_batches: must be an int .* found bool"),
        (BATCHES, {"exclude": 3}, TypeError, "exclude: must be a list"),
        (
            BATCHES,
            {"observe": GradientConflict},
            TypeError,
            "observe: must be an observer .* found the class GradientC",
        ),
        (BATCHES, {"observe": 3}, TypeError, "observe: must be an observer such as .* found int"),
        (BATCHES, {"criterion": Criterion}, TypeError, "criterion: must be a name or a callable"),
        (BATCHES, {"criterion": None}, TypeError, "criterion: must be a name or a callable"),
        (BATCHES, {"num_batches": 5}, ValueError, "found 5 with 3 in data; pass num_batches=3, or cycle"),
        (iter(BATCHES), {"num_batches": 5}, ValueError, "found 5 with 3 in data"),
        (
            iter(BATCHES),
            {"num_batches": 5, "cycle": True},
            ValueError,
            "found 5 with 3 in data; pass num_batches=3, or data that can be read again$",
        ),
        (BATCHES, {"num_batches": 0}, ValueError, "num_batches: must be at least 1, found 0"),
        (BATCHES, {"num_batches": 2.0}, TypeError, "num_batches: must be an int or None .all of data., found float"),
        (BATCHES, {"cycle": True}, ValueError, "num_batches: must be given with cycle=True"),
        (BATCHES, {"criterion": "nope"}, ValueError, "criterion: must be one of"),
        (BATCHES, {"criterion": lambda w, g: w.sum()}, ValueError, r"criterion: .* of the weight's shape"),
        (BATCHES, {"criterion": lambda w, g: 1.0}, ValueError, "criterion: .* found float"),
    ],
)
def test_data_and_options(data, options, error, message):
    model = TwoHeads()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        score_tasks(model, digit_losses, data, **options)
    before.check()


@pytest.mark.parametrize(
    ("choose", "error", "message"),
    [
        (lambda model: [], ValueError, "parameters: at least one"),
        (lambda model: [model.trunk[0]], TypeError, r"parameters: every entry must be a \(module, name\) pair"),
        (lambda model: [(model.trunk[0], "weight")] * 2, ValueError, "found trunk.0.weight more than once"),
        (lambda model: [(nn.Linear(2, 2), "weight")], ValueError, "must be part of the model, found Linear"),
        (lambda model: [(model.trunk[0], "kernel")], ValueError, "trunk.0.kernel must be a parameter, found NoneType"),
        (lambda model: [(model.trunk[1], "running_mean")], ValueError, "must be a parameter, found Tensor"),
    ],
)
def test_parameters(choose, error, message):
    model = TwoHeads()
    chosen = choose(model)
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        score_tasks(model, digit_losses, BATCHES, parameters=chosen)
    before.check()


@pytest.mark.parametrize(
    ("model", "losses", "message"),
    [
        ("resnet", digit_losses, "model: must be a torch.nn.Module, found str"),
        (None, digit_losses, "model: must be a torch.nn.Module, found NoneType"),
        (TwoHeads(), None, "losses: must be a function of model and batch .* found NoneType"),
        (TwoHeads(), {"a": 1.0}, "losses: must be a function of model and batch .* found dict"),
        (TwoHeads(), nn.MSELoss(), "losses: must be a function of model and batch .* found MSELoss"),
    ],
)
def test_what_is_no_model_and_no_function(model, losses, message):
    for call in (score_tasks, lambda *arguments: disparse_static(*arguments, 0.9)):
        with pytest.raises(TypeError, match=message):
            call(model, losses, BATCHES)


def test_an_error_of_the_losses_says_on_which_batch():
    with pytest.raises(ValueError, match="to unpack") as caught:
        score_tasks(TwoHeads(), digit_losses, [BATCHES[0], "an image"])
    assert any("on batch 1 of data, a str; data must be an iterable" in note for note in caught.value.__notes__)


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.a, self.b = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        hidden = self.attention(x, x, x)[0]
        return {"a": self.a(hidden), "b": self.b(hidden)}


@pytest.mark.parametrize("pruned", [False, True])
def test_a_weight_that_its_parent_reads(pruned):
    model = _Attention()
    if pruned:
        prune.random_unstructured(model.attention.out_proj, "weight", 0.5)
    batches = vectors(2, size=3, width=8)
    batches = [batch[None] for batch in batches]
    before = Snapshot(model)
    message = r"out_proj\.weight must be used by its own module's forward.*exclude=\['attention\.out_proj\.weight'\]"
    with pytest.raises(ValueError, match=message):
        score_tasks(model, square_losses, batches, parameters=prunable_parameters(model))
    before.check()
    with pytest.warns(UserWarning, match=r"1 of 3 cannot be masked .* attention\.out_proj\.weight \(a parent reads it"):
        scores = score_tasks(model, square_losses, batches)
    before.check()
    assert scores.names == ("a.weight", "b.weight")
    assert ("is stale" in scores.skipped["attention.out_proj.weight"]) == pruned
    chosen = prunable_parameters(model, exclude=["attention.out_proj.weight"])
    assert score_tasks(model, square_losses, batches, parameters=chosen).names == ("a.weight", "b.weight")


def test_tied_weights():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    with pytest.raises(
        ValueError, match=r"found none that can be masked: 0\.weight, 1\.weight \(0\.weight and 1\.weight tied\)"
    ):
        score_tasks(model, lambda m, x: {"a": m(x).sum()}, vectors())

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.decoder, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False), nn.Linear(5, 2)
            self.decoder.weight = self.embedding.weight

        def forward(self, x):
            hidden = self.embedding(x)
            return {"next": self.decoder(hidden), "label": self.head(hidden)}

    model, batches = Language(), [torch.arange(7)]
    with pytest.raises(ValueError, match=r"found embedding\.weight and decoder\.weight tied.*=\['decoder\.weight'\]"):
        score_tasks(model, square_losses, batches, parameters=prunable_parameters(model))
    # Tied weights that nobody wants to prune are no reason to refuse.
    head = [(model.head, "weight")]
    with pytest.raises(ValueError, match="found none for task 'next'"):
        score_tasks(model, square_losses, batches, parameters=head)
    only = score_tasks(model, lambda m, x: {"label": square_losses(m, x)["label"]}, batches, parameters=head)
    assert only.names == ("head.weight",)


def test_weights_that_torch_cannot_mask():
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 5)))
    with pytest.raises(ValueError, match=r"0\.weight must be a plain parameter, found one computed"):
        score_tasks(normed, lambda m, x: {"a": m(x).sum()}, vectors(), parameters=prunable_parameters(normed))
    with pytest.raises(ValueError, match=r"0\.weight must hold values, found the meta device"):
        score_tasks(nn.Sequential(nn.Linear(5, 5, device="meta")), lambda m, x: {"a": m(x).sum()}, vectors())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that lazy modules are in development
        lazy = nn.Sequential(nn.LazyLinear(5))
    with pytest.raises(ValueError, match=r"0\.weight must have a shape, found a lazy parameter; run one batch"):
        score_tasks(lazy, lambda m, x: {"a": m(x).sum()}, vectors())


def test_a_weight_that_was_parametrized_after_scoring():
    net = nn.Sequential(nn.Linear(5, 5))
    scores = score_tasks(net, lambda m, x: {"a": m(x).sum()}, vectors())
    parametrizations.weight_norm(net[0])
    with pytest.raises(ValueError, match="parameters: weight of ParametrizedLinear must still be a parameter"):
        scores.masks(0.5)


def test_prunable_parameters_of_another_model():
    with pytest.raises(ValueError, match=r"exclude: every entry must be a module of the model, .* found a Linear"):
        prunable_parameters(TwoHeads(), exclude=[nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("tables", "error", "message"),
    [
        (lambda layer: None, TypeError, "scores: must be a mapping from task .* found NoneType"),
        (
            lambda layer: {"a": {None: torch.ones(2, 2)}},
            TypeError,
            "every entry must be a .module, name. pair, found a N",
        ),
        (lambda layer: {0: {}}, TypeError, "scores: task names must be str, found int: 0"),
        (lambda layer: {"a": [torch.ones(2, 2)]}, TypeError, r"those of task 'a' must be a mapping .* found list"),
        (
            lambda layer: {"a": {"0.weight": torch.ones(2, 2)}},
            TypeError,
            r"be a \(module, name\) pair, found str '0\.we",
        ),
        (lambda layer: {}, ValueError, "scores: at least one task"),
        (lambda layer: {"a": {}}, ValueError, "found none for task 'a'"),
        (lambda layer: {"a": {(layer, "weight"): torch.ones(3)}}, ValueError, r"shape \(2, 2\), found \(3,\)"),
        (lambda layer: {"a": {(layer, "weight"): torch.ones(2, 2).long()}}, TypeError, "floating point.*int64"),
        (lambda layer: {"a": {(layer, "weight"): torch.full((2, 2), torch.nan)}}, ValueError, "must be finite"),
        (lambda layer: {"a": {(nn.Linear(2, 2), "weight"): torch.ones(2, 2)}}, ValueError, "must be part of the model"),
    ],
)
def test_scores_made_elsewhere(tables, error, message):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(error, match=message):
        TaskScores(model, tables(model[0]))


@pytest.mark.parametrize(
    ("arbiter", "error", "message"),
    [
        (lambda p: p[0], ValueError, r"arbiter: must return values in \[0, 1\], found nan"),
        (lambda p: p.nansum(0) * 2, ValueError, r"arbiter: must return values in \[0, 1\], found [1-9]"),
        (lambda p: p.nanmean(), ValueError, r"arbiter: must reduce the task axis only, to shape \(\d+,\), found \(\)"),
        (lambda p: p.nan_to_num().amax(0).long(), TypeError, "arbiter: must return a floating point tensor"),
        ("most", ValueError, "arbiter: must be one of"),
    ],
)
def test_arbiters(arbiter, error, message):
    scores = score_tasks(TwoHeads(), digit_losses, BATCHES)
    for call in (scores.importance, lambda rule: scores.masks(0.5, rule)):
        with pytest.raises(error, match=message):
            call(arbiter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.float32, torch.float64])
def test_scores_of_any_type_with_a_history_shared_by_two_tasks(dtype):
    """Fifty numbers that bfloat16 tells apart, with a history of gradients, twice the same."""
    model = nn.Sequential(nn.Linear(10, 5))
    order = torch.randperm(50).reshape(5, 10)
    score = torch.nn.Parameter(order.to(dtype))
    scores = TaskScores(model, {task: {(model[0], "weight"): score} for task in "ab"})
    key = (model[0], "weight")
    assert not scores["a"][key].requires_grad
    assert scores["a"][key].dtype == (torch.float32 if dtype == torch.half else dtype)
    torch.testing.assert_close(scores.importance()[key], (order + 1).double() / 50)
    assert torch.equal(scores.masks(0.5)[key], order >= 25)
    assert torch.equal(score.detach(), order.to(dtype))


def test_scores_know_their_tasks():
    scores = score_tasks(TwoHeads(), digit_losses, BATCHES)
    for task in ("c", ["a"]):
        with pytest.raises(KeyError, match="task: must be one of a, b, found"):
            scores[task]
    with pytest.raises(TypeError, match="module: must be a module of the model, found str"):
        scores.tasks_reaching("trunk.0", "weight")
    with pytest.raises(TypeError, match="path: must be a str or a Path, found int"):
        scores.save(3)
    assert list(scores) == ["a", "b"]
    assert len(scores) == 2
    assert "a" in scores
    assert "tasks=['a', 'b']" in repr(scores)
