"""Kinds of tasks: metrics against plain numpy, losses by hand, and what is not labelled."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from multitask.problem import tasks
from oracles.metrics import binary, depth, edges, keypoints, normals, segmentation

SIDE = 6


def draw(kind, seed, samples=5):
    """Outputs and targets of one kind, with a third of the pixels unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda channels: torch.randn(samples, channels, SIDE, SIDE, generator=generator)  # noqa: E731
    unknown = torch.rand(samples, SIDE, SIDE, generator=generator) < 1 / 3
    if kind == "segmentation":  # classes 0 to 4 of 7 occur; 5 is predicted only and 6 never
        output = normal(7)
        output[:, 6] = -100.0
        return output, torch.randint(5, unknown.shape, generator=generator).masked_fill(unknown, tasks.IGNORE)
    if kind == "depth":
        return normal(1) + 1, (normal(1).exp()).masked_fill(unknown[:, None], 0.0)
    if kind == "normals":
        target = F.normalize(normal(3), dim=1)
        output = target + 0.4 * normal(3)
        output[0, :, 0, 0] = 0.0
        return output, target.masked_fill(unknown[:, None], 0.0)
    if kind == "edges":
        return normal(1), torch.rand(samples, 1, SIDE, SIDE, generator=generator) < 0.3
    if kind == "keypoints":
        return normal(1), normal(1).masked_fill(unknown[:, None], torch.nan)
    return normal(1)[:, :, 0, 0], torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0])[:samples]


KINDS = {
    "segmentation": (tasks.segmentation("t", 7), lambda p, t: segmentation(p, t, 7, tasks.IGNORE)),
    "depth": (tasks.depth("t"), depth),
    "normals": (tasks.normals("t"), normals),
    "edges": (tasks.edges("t"), edges),
    "keypoints": (tasks.keypoints("t"), keypoints),
    "binary": (tasks.binary("t"), binary),
}


def measured(task, *batches):
    """What the task's metrics say after these batches, as plain numbers."""
    collection = task.metrics()
    for output, target in batches:
        collection.update(output, target)
    return {name: float(value) for name, value in collection.compute().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_metrics_agree_with_their_definitions(kind, seed):
    task, oracle = KINDS[kind]
    output, target = draw(kind, seed)
    found = measured(task, (output[:2], target[:2]), (output[2:], target[2:]))
    expected = oracle(output.double().numpy(), target.double().numpy())
    assert set(found) == set(task.better) == set(expected)
    assert {
        name: pytest.approx(value, abs=6e-3 if name == "median" else 1e-6) for name, value in expected.items()
    } == found


@pytest.mark.parametrize("kind", KINDS)
def test_better_points_from_bad_to_perfect(kind):
    task, _ = KINDS[kind]
    output, target = draw(kind, 0)
    bad = measured(task, (output, target))
    perfect = measured(task, (perfect_output(kind, target), target))
    for name, direction in task.better.items():
        assert perfect[name] > bad[name] if direction == "higher" else perfect[name] < bad[name]


def perfect_output(kind, target):
    """What a network would say that knows the target."""
    if kind == "segmentation":
        return F.one_hot(target.masked_fill(target == tasks.IGNORE, 0), 7).movedim(-1, 1).float()
    if kind in ("edges", "binary"):
        return (2 * target.float() - 1).reshape(len(target), 1, *target.shape[2:])
    return target.nan_to_num(0.0)


def test_a_lost_class_counts_zero_and_an_absent_one_not_at_all():
    """The authors' mIoU would be 1 here: they leave out the class without a hit."""
    target = torch.tensor([[[0, 0, 0, 1]]])
    always_zero = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 1, 4)
    assert measured(tasks.segmentation("t", 3), (always_zero, target))["miou"] == pytest.approx((3 / 4 + 0) / 2)


def test_unlabelled_pixels_are_not_errors():
    """The authors' pixel accuracy on Cityscapes would be 1/2 here."""
    target = torch.tensor([[[0, tasks.IGNORE]]])
    output = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    assert measured(tasks.segmentation("t", 2), (output, target)) == {"miou": 1.0, "pixel_accuracy": 1.0}


def test_logits_between_0_and_1_are_still_logits():
    """torchmetrics would take the first batch for probabilities, and its order against the second would be lost."""
    first = torch.tensor([[0.9], [0.6]]), torch.tensor([0.0, 1.0])
    second = torch.tensor([[0.7], [-2.0]]), torch.tensor([1.0, 0.0])
    together = tuple(torch.cat(parts) for parts in zip(first, second, strict=True))
    assert measured(tasks.binary("t"), first, second) == pytest.approx(measured(tasks.binary("t"), together))


@given(cut=st.integers(1, 4), kind=st.sampled_from(sorted(KINDS)))
def test_metrics_do_not_depend_on_the_batches(cut, kind):
    task, _ = KINDS[kind]
    output, target = draw(kind, 7)
    parts = (output[:cut], target[:cut]), (output[cut:], target[cut:])
    assert measured(task, *parts) == pytest.approx(measured(task, (output, target)), abs=1e-9)


def test_metrics_start_afresh():
    task, _ = KINDS["depth"]
    assert measured(task, draw("depth", 0)) == measured(task, draw("depth", 0))
    collection = task.metrics()
    collection.update(*draw("depth", 1))
    collection.reset()
    collection.update(*draw("depth", 0))
    assert {name: float(value) for name, value in collection.compute().items()} == measured(task, draw("depth", 0))


def test_classification_is_accuracy_and_cross_entropy():
    task = tasks.classification("t", 3)
    output, target = torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 0])
    assert measured(task, (output, target)) == {"accuracy": 0.75}
    assert task.loss(output, target) == F.cross_entropy(output, target)


def loss_by_hand(kind, output, target):
    """The mean over labelled pixels, after picking them."""
    if kind == "segmentation":
        return F.cross_entropy(output, target, ignore_index=tasks.IGNORE)
    if kind == "depth":
        return (output - target)[target > 0].abs().mean()
    if kind == "normals":
        length = output.norm(dim=1).clamp(min=1e-8)
        return (1 - (output * target).sum(1) / length)[target.abs().sum(1) > 0].mean()
    if kind == "keypoints":
        return (output - target)[~target.isnan()].abs().mean()
    probability = output.sigmoid().reshape(target.shape)
    return -torch.where(target > 0, probability.log(), (1 - probability).log()).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_means_over_what_is_labelled(kind):
    task, _ = KINDS[kind]
    output, target = draw(kind, 3)
    assert float(task.loss(output, target)) == pytest.approx(float(loss_by_hand(kind, output, target)), rel=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("edges", "binary")])
def test_a_batch_without_labels_is_no_reason_to_stop(kind):
    task, _ = KINDS[kind]
    output, target = draw(kind, 0)
    nothing = {"segmentation": tasks.IGNORE, "keypoints": torch.nan}.get(kind, 0)
    output.requires_grad_()
    loss = task.loss(output, torch.full_like(target, nothing))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(output.grad, torch.zeros_like(output))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "binary"])
def test_small_outputs_are_resized_bilinearly(kind):
    task, _ = KINDS[kind]
    output, target = draw(kind, 0)
    small = output[:, :, ::2, ::2]
    large = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    assert task.loss(small, target) == task.loss(large, target)
    assert measured(task, (small, target)) == measured(task, (large, target))


def test_labels_are_needed_for_a_gradient_only_where_they_are():
    """One labelled pixel: all others get no gradient, and a NaN target spoils nothing."""
    output = torch.zeros(1, 1, 2, 2, requires_grad=True)
    tasks.keypoints("t").loss(output, torch.tensor([[[[torch.nan, 1.0], [torch.nan, torch.nan]]]])).backward()
    assert np.array_equal(output.grad.numpy(), [[[[0, -1], [0, 0]]]])
