"""Weights that a mask would not do for are found by what a forward does: left out by default, refused if listed."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from disparse_plugin import TaskScores, disparse_pretrained, prunable_parameters, score_tasks
from disparse_plugin.masks import clone_pruned, fold
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from networks import Around, Snapshot, square_losses, vectors


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return torch.where(weight >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, grad):
        return grad


def computing(kernel):
    """A linear layer that multiplies with ``kernel(weight)``."""

    class Computing(nn.Linear):
        def forward(self, x):
            return F.linear(x, kernel(self.weight), self.bias)

    return Computing


def placed(kernel):
    """Return a new tensor into which a kernel was written."""
    larger = torch.zeros(5, 5)
    larger[:, :] = kernel
    return larger


ANOTHER = {
    "standardised": (lambda w: (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True), "mean"),
    "batch norm": (lambda w: F.batch_norm(w[None], None, None, training=True)[0], "batch_norm"),
    "normalised": (lambda w: F.normalize(w, dim=1), "normalize"),
    "spectral": (lambda w: w / torch.linalg.matrix_norm(w, 2), "linalg_matrix_norm"),
    "noise": (lambda w: w + 0.1, "add"),
    "in place": (lambda w: w.clone().sub_(0.1), "sub"),
    "binary": (Sign.apply, "ge"),
    "signs of itself": (lambda w: w * w.sign(), "sign"),
    "times its transpose": (lambda w: w * w.t(), "mul"),
    "made orthogonal": (lambda w: 1.5 * w - 0.5 * (w @ w.t() @ w), "matmul"),
    "centred and placed": (lambda w: placed(w - w.mean()), "mean"),
    "dropped with a shift": (lambda w: F.alpha_dropout(w, 0.2, training=True), "alpha_dropout"),
}
# Torch's products with the transpose of a kernel of shape (5, 5), by functions other than F.linear.
PRODUCTS = {
    "linalg.matmul": lambda x, w: torch.linalg.matmul(x, w.t()),
    "linalg.multi_dot": lambda x, w: torch.linalg.multi_dot([x, w.t()]),
    "linalg.vecdot": lambda x, w: torch.linalg.vecdot(x[:, None], w[None]),
    "inner": torch.inner,
    "outer": lambda x, w: torch.stack([torch.outer(row, one).sum(0) for row, one in zip(x, w, strict=False)]),
    "chain_matmul": lambda x, w: torch.chain_matmul(x, w.t()),
    "convolution": lambda x, w: torch.convolution(
        x[..., None], w[..., None], None, [1], [0], [1], False, [0], 1
    ).squeeze(-1),
    "conv_tbc": lambda x, w: torch.conv_tbc(x[None], w.t()[None], torch.zeros(5)).squeeze(0),
    "sparse.mm": lambda x, w: torch.sparse.mm(x, w.t()),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None], w[None], w[None]).squeeze(0),
    "an operator": lambda x, w: torch.ops.aten.mm.default(x, torch.ops.aten.t.default(w)),
}
ITSELF = {
    "plain": lambda w: w,
    "scaled": lambda w: 0.5 * w,
    "scaled in place": lambda w: w.clone().mul_(0.5),
    "another type": lambda w: w.double().float(),
    "twice transposed": lambda w: w.t().mT.contiguous(),
    "a mask of its own": lambda w: w * torch.eye(5),
    "dropped": lambda w: F.dropout(w, 0.2),
    "in parts": lambda w: torch.cat(w.chunk(2)),
    "placed": placed,
}


def test_a_layer_that_multiplies_with_both():
    """With zeros where the mask has them, and with something that it computes: the mask does what it can."""

    class Both(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight) + F.linear(x, self.weight - self.weight.mean())

    assert score_tasks(Around(Both(5, 5)), square_losses, vectors()).skipped == {}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(("kernel", "step"), ANOTHER.values(), ids=ANOTHER)
def test_a_layer_that_multiplies_with_something_else(kernel, step, pruned):
    model = Around(computing(kernel)(5, 5))
    if pruned:
        prune.random_unstructured(model.first, "weight", 0.5)
        model(vectors(1)[0])
    before = Snapshot(model)
    with pytest.warns(
        UserWarning, match=rf"1 of 3 .*first\.weight \(Computing multiplies with something .*\({step}"
    ) as seen:
        scores = score_tasks(model, square_losses, vectors())
    before.check()
    assert len(seen) == 1
    assert scores.names == ("heads.a.weight", "heads.b.weight")
    assert list(scores.skipped) == ["first.weight"]
    with pytest.raises(ValueError, match=r"first\.weight must be what its layer multiplies with.*=\['first\.weight'\]"):
        score_tasks(model, square_losses, vectors(), parameters=prunable_parameters(model))
    before.check()


@pytest.mark.parametrize("kernel", ITSELF.values(), ids=ITSELF)
def test_a_layer_that_multiplies_with_its_weight_in_another_form(kernel):
    model = Around(computing(kernel)(5, 5))
    scores = disparse_pretrained(model, square_losses, vectors(), 0.5)
    assert scores.skipped == {}
    assert "first.weight" in scores.names
    used = kernel(model.first.weight)
    assert bool((used[model.first.weight_mask == 0] == 0).all())


def test_what_is_divided_by_a_weight_is_another():
    model = Around(computing(lambda w: torch.div(1.0, w))(5, 5))
    with pytest.warns(UserWarning, match=r"first\.weight \(Computing multiplies with something .*\(div\)"):
        score_tasks(model, square_losses, vectors())


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated", "ignore:parameters. 1 of 3 cannot be masked")
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_all_products_of_torch_are_seen(product):
    class Product(nn.Linear):
        def forward(self, x):
            return product(x, self.kernel(self.weight)) @ torch.eye(5)

    layer = Product(5, 5)
    for layer.kernel, skipped in ((lambda w: w - w.mean(1, keepdim=True), ["first.weight"]), (lambda w: w, [])):
        assert list(score_tasks(Around(layer), square_losses, [vectors(1)[0][:5]]).skipped) == skipped


def test_a_weight_kept_in_a_list_is_warned_of():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(5, 5, bias=False)
            self.tied = [self.encoder.weight]

        def forward(self, x):
            return F.linear(self.encoder(x).tanh(), self.tied[0].t())

    for call in (
        lambda model: score_tasks(model, square_losses, vectors()),
        lambda model: disparse_pretrained(model, square_losses, vectors(), 0.5),
        lambda model: GradualPruning(
            model, torch.optim.SGD(model.parameters(), 0.1), square_losses, amount=0.5, stop_at=9
        ),
    ):
        with pytest.warns(UserWarning, match=r"found first\.encoder\.weight in first\.tied, where no mask") as seen:
            call(Around(Tied()))
        assert len(seen) == 1


def test_a_penalty_on_a_weight_is_no_use_of_it():
    def losses(model, batch):
        penalty = sum(parameter.square().sum() for parameter in model.parameters())
        return {task: loss + 0.1 * penalty for task, loss in square_losses(model, batch).items()}

    assert score_tasks(Around(nn.Linear(5, 5)), losses, vectors()).skipped == {}


class Reads(nn.Module):
    """A parent that reads ``e.weight`` besides running ``e``, after it or before."""

    def __init__(self, early):
        super().__init__()
        self.early, self.t, self.e, self.h = early, nn.Linear(5, 5), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        weight = F.normalize(self.e.weight, dim=1) if self.early else None
        z = self.e(self.t(x)).relu()
        weight = self.e.weight if weight is None else weight
        return {"r": F.linear(z, weight.t()), "c": self.h(z)}


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in vectors(4):
        optimizer.zero_grad()
        sum(square_losses(model, batch).values()).backward()
        optimizer.step()
    return model


def test_a_weight_that_a_parent_reads_before_its_layer_runs():
    model = Reads(early=True)
    before = Snapshot(model)
    with pytest.warns(UserWarning, match=r"e\.weight \(a parent reads it earlier in the forward"):
        scores = score_tasks(model, square_losses, vectors())
    before.check()
    assert (scores.names, list(scores.skipped)) == (("t.weight", "h.weight"), ["e.weight"])
    with pytest.raises(
        ValueError, match=r"e\.weight must be read after its own layer has run.*exclude=\['e\.weight'\]"
    ):
        score_tasks(model, square_losses, vectors(), parameters=prunable_parameters(model))
    before.check()
    disparse_pretrained(model, square_losses, vectors(), 0.5, exclude=["e"])
    trained(model)
    batch = vectors(1)[0]
    assert torch.equal(fold(clone_pruned(model))(batch)["r"], model(batch)["r"])


def test_a_weight_that_a_parent_reads_after_its_layer_ran_can_be_masked():
    model = Reads(early=False)
    plain = copy.deepcopy(model)
    scores = disparse_pretrained(model, square_losses, vectors(1), 0.5, criterion="taylor")
    assert scores.skipped == {}
    loss = square_losses(plain, vectors(1)[0])["r"]
    (grad,) = torch.autograd.grad(loss, plain.e.weight)  # of both uses
    torch.testing.assert_close(scores["r"][model.e, "weight"], (plain.e.weight * grad).abs().detach())
    trained(model)
    batch = vectors(1)[0]
    assert torch.equal(fold(clone_pruned(model))(batch)["r"], model(batch)["r"])


def test_scores_remember_what_was_skipped(tmp_path):
    model = Around(computing(lambda w: w + 0.1)(5, 5))
    with pytest.warns(UserWarning, match="cannot be masked"):
        scores = score_tasks(model, square_losses, vectors())
    assert "skipped=1" in repr(scores)
    scores.save(tmp_path / "scores.safetensors")
    assert TaskScores.load(tmp_path / "scores.safetensors", model).skipped == scores.skipped


def test_an_interrupted_forward_leaves_nothing_watching():
    class Fails(nn.Linear):
        def forward(self, x):
            raise KeyboardInterrupt

    model = Around(Fails(5, 5))
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        score_tasks(model, square_losses, vectors())
    before.check()
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_task_that_reaches_only_what_is_skipped_is_told_so():
    model = nn.Sequential(computing(lambda w: w + 0.1)(5, 2))
    with pytest.raises(ValueError, match=r"found none for task 'a'.*all it reaches is left out: 0\.weight"):
        score_tasks(model, lambda m, x: {"a": m(x).sum()}, vectors())


class Routed(nn.Module):
    """A trunk, and two experts of which one runs in each batch."""

    def __init__(self):
        super().__init__()
        self.trunk, self.experts = nn.Linear(5, 5), nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(5, 4)})

    def forward(self, x):
        x = self.experts[int(x[0, 0] > 0)](self.trunk(x))
        return {task: head(x) for task, head in self.heads.items()}


def with_penalty(model, batch):
    penalty = 1e-4 * sum(parameter.square().sum() for parameter in model.parameters())
    return {task: loss + penalty for task, loss in square_losses(model, batch).items()}


ROUTES = [torch.full((3, 5), value) for value in (1.0, -1.0)]


@pytest.mark.filterwarnings("ignore:parameters. 1 of 5 are reached by no task")
def test_a_penalty_on_a_layer_that_does_not_run_is_no_use_of_it():
    model = Routed()
    scores = score_tasks(model, with_penalty, ROUTES)
    assert scores.skipped == {}
    assert set(scores.names) == {f"{name}.weight" for name, layer in model.named_modules() if type(layer) is nn.Linear}
    for number, expert in enumerate(model.experts):  # scored by the batch that it ran in
        alone = score_tasks(model, with_penalty, [ROUTES[1 - number]])
        assert torch.equal(scores["a"][expert, "weight"], alone["a"][expert, "weight"])


@pytest.mark.filterwarnings("ignore:parameters. 1 of 5 are reached by no task")
@pytest.mark.parametrize("scheduler", [DiSparseScheduler, GradualPruning])
def test_nor_does_it_end_a_run(scheduler):
    model = Routed()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    running = scheduler(model, optimizer, with_penalty, amount=0.5, update_every=3, stop_at=30)
    for step in range(12):
        optimizer.zero_grad()
        sum(with_penalty(model, ROUTES[step % 2]).values()).backward()
        optimizer.step()
        running.step(ROUTES[step % 2])
    assert running.completed == 12


def test_a_model_may_run_its_layers_in_threads():
    class Threaded(Around):
        def forward(self, x):
            x = self.first(x).tanh()
            with ThreadPoolExecutor(2) as pool:
                return dict(zip(self.heads, pool.map(lambda head: head(x), self.heads.values()), strict=True))

    torch.manual_seed(0)
    model = Threaded(nn.Linear(5, 5))
    expected = score_tasks(model, square_losses, vectors(2))
    for _ in range(10):
        scores = score_tasks(model, square_losses, vectors(2))
        assert all(torch.equal(scores[task][key], score) for task in expected for key, score in expected[task].items())
    assert torch.overrides._get_current_function_mode() is None


def test_sparse_gradients_of_an_embedding_are_scored_as_dense_ones():
    def built(sparse):
        torch.manual_seed(0)
        return Around(nn.Sequential(nn.Embedding(9, 5, sparse=sparse), nn.Linear(5, 5)))

    batches, found = [torch.tensor([[1, 1, 4]]), torch.tensor([[2, 4, 8]])], []
    for sparse in (True, False):
        model = built(sparse)
        keys = [(model.first[0], "weight"), (model.first[1], "weight")]
        scores = score_tasks(model, square_losses, batches, parameters=keys)
        found.append([scores["a"][key] for key in keys])
    assert all(map(torch.equal, *found))
