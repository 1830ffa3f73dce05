"""Scoring in pieces, and what scoring holds on to meanwhile."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from disparse_plugin import disparse_static, score_tasks
from disparse_plugin.criteria import Criterion
from disparse_plugin.scoring import accumulate
from networks import Snapshot, TwoHeads, digit_batches, digit_losses, square_losses, vectors


@pytest.fixture
def tiny_pieces(monkeypatch):
    monkeypatch.setattr(accumulate, "PIECE", 7)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("criterion", ["snip", "magnitude", "fisher", "gradient", "authors_pretrained"])
def test_pieces_give_the_scores_of_the_whole(criterion, memory_format, monkeypatch):
    model = TwoHeads().eval().to(memory_format=memory_format)
    whole = score_tasks(model, digit_losses, digit_batches(), criterion=criterion)
    monkeypatch.setattr(accumulate, "PIECE", 7)
    pieces = score_tasks(model, digit_losses, digit_batches(), criterion=criterion)
    for task in whole:
        assert all(torch.equal(pieces[task][key], score) for key, score in whole[task].items())


@pytest.mark.usefixtures("tiny_pieces")
def test_only_a_criterion_that_says_so_is_given_pieces():
    seen = []

    def recording(weight, grad):
        seen.append(weight.shape)
        return (weight * grad).abs()

    model = TwoHeads().eval()
    shapes = {module.weight.shape for module in (model.trunk[0], model.trunk[3], model.heads["a"])}
    score_tasks(model, digit_losses, digit_batches(1), criterion=recording)
    assert set(seen) == shapes
    seen.clear()
    score_tasks(model, digit_losses, digit_batches(1), criterion=Criterion("pieces", recording, elementwise=True))
    assert {shape[1:] for shape in seen} == {shape[1:] for shape in shapes}
    # Rows of 54 and 96 entries cannot be cut further; of 9, none fit two at a time.
    assert all(shape[0] == 1 for shape in seen)


@pytest.mark.usefixtures("tiny_pieces")
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("row", [0, 1, 5])
def test_one_bad_score_in_one_piece_is_found(value, row):
    model = TwoHeads().eval()
    with torch.no_grad():
        model.trunk[3].weight[row, 2, 1, 1] = 0.0
    bad = Criterion("bad", lambda weight, grad: torch.where(weight == 0, value, grad.abs()), elementwise=True)
    with pytest.raises(ValueError, match=r"for task 'a', batch 0, parameter trunk\.3\.weight \(criterion 'bad'\)"):
        score_tasks(model, digit_losses, digit_batches(2), criterion=bad)


def test_a_heads_graph_is_freed_after_its_own_backward():
    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = token = type("Token", (), {})()
            tokens.append(weakref.ref(token))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.append([token() is not None for token in tokens])
            return grad

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            features = self.trunk(x)
            return {"a": self.a(Watched.apply(features)), "b": self.b(Watched.apply(features))}

    tokens, alive = [], []
    score_tasks(Heads(), square_losses, vectors(1))
    assert alive == [[True, True], [False, True]]


def test_memory_grows_by_two_tensors_per_batch_and_task():
    def counting(batches):
        for batch in batches:
            gc.collect()
            counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
            yield batch

    counts, model = [], TwoHeads()
    score_tasks(model, digit_losses, counting(digit_batches(8)))
    assert counts[7] - counts[2] == 5 * 2 * len(model.heads)


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.usefixtures("tiny_pieces")
def test_a_criterion_that_works_in_place_changes_nothing_but_copies(registered):
    def in_place(weight, grad):
        return weight.mul_(grad).abs_()

    def beside(weight, grad):
        return (weight * grad).abs()

    class Sum(nn.Module):
        """Two weights whose gradients are one tensor."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False)

        def forward(self, x):
            return {"t": self.a(x) + self.b(x)}

    for model, losses, batches in (
        (TwoHeads().eval(), digit_losses, digit_batches()),
        (Sum(), square_losses, vectors()),
    ):
        before = Snapshot(model)
        scores = score_tasks(model, losses, batches, criterion=Criterion("mine", in_place, elementwise=registered))
        before.check()
        expected = score_tasks(model, losses, batches, criterion=beside)
        for task in scores:
            assert all(torch.equal(scores[task][key], score) for key, score in expected[task].items())


def test_a_last_step_that_works_in_place_changes_nothing_but_copies():
    model = TwoHeads().eval()
    before = Snapshot(model)
    rule = Criterion("mine", lambda weight, grad: grad.abs(), finish=lambda weight, total: weight.abs_().add_(total))
    score_tasks(model, digit_losses, digit_batches(1), criterion=rule)
    before.check()


def test_the_package_s_own_criteria_are_given_no_copies():
    """A copy of every weight for every task and batch is a third of what scoring costs beyond the gradients."""
    from disparse_plugin.criteria import resolve

    assert not any(resolve(name).may_write for name in ("snip", "magnitude", "fisher", "lamp", "damped(taylor, 0.5)"))
    assert resolve(lambda weight, grad: grad.abs()).may_write


def test_what_a_mask_has_removed_is_not_counted_among_the_zeros():
    """Nineteen of twenty scores are zero, because their weights are gone; a warning would be an error here."""
    model = TwoHeads().eval()
    disparse_static(model, digit_losses, digit_batches(1), 0.95)
    score_tasks(model, digit_losses, digit_batches(1))
