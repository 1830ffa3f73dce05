"""Kinds of tasks: for each its loss, its metrics, and which way every metric is better.

Targets, by kind (``batch`` first): classification ``(n,)`` int64; binary ``(n,)`` of 0 and 1; segmentation
``(n, height, width)`` int64; depth, edges and keypoints ``(n, 1, height, width)``; normals ``(n, 3, height, width)``.
Every loss is a mean over what is labelled, and 0 (still with a gradient, of zeros) where nothing is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from .dense_metrics import (
    AUROC,
    AveragePrecision,
    DepthErrors,
    EdgeScores,
    MapError,
    NormalAngles,
    SegmentationScores,
    resize,
)
from .problem import Direction, Task

IGNORE = 255  # the class of unlabelled pixels


def classification(name: str, classes: int, *, weight: float = 1.0) -> Task:
    """One class per sample: cross-entropy, and the share of samples that are right."""
    return Task(name, classes, F.cross_entropy, functools.partial(_right, classes), {"accuracy": "higher"}, weight)


def binary(name: str, *, weight: float = 1.0) -> Task:
    """Yes or no per sample, from one logit: binary cross-entropy, average precision and area under the ROC curve.

    Both metrics are of the ranking, because no threshold is right for labels as rare as yeast's: a network trained
    with plain cross-entropy says "no" to every sample of a label with 2 % positives, and then accuracy is 98 % and
    balanced accuracy and F1 are stuck at 50 % and 0 whatever it has learnt. Average precision sees most of what
    happens to rare positives, but by chance is the share of positives; the area is 1/2 by chance for every label.
    """
    better: dict[str, Direction] = {"average_precision": "higher", "auroc": "higher"}
    return Task(name, 1, _binary_loss, _ranking, better, weight)


def segmentation(
    name: str, classes: int, *, ignore: int = IGNORE, weight: float = 1.0, class_weights: Tensor | None = None
) -> Task:
    """One class per pixel: cross-entropy, mean IoU and pixel accuracy, all without the pixels of class ``ignore``.

    With ``class_weights``, the loss is their weighted mean over the pixels.
    """
    better: dict[str, Direction] = {"miou": "higher", "pixel_accuracy": "higher"}

    def loss(output: Tensor, target: Tensor) -> Tensor:
        factors = None if class_weights is None else class_weights.to(output)
        total = F.cross_entropy(resize(output, target), target, factors, ignore_index=ignore, reduction="sum")
        known = target != ignore
        if factors is None:
            return total / known.sum().clamp(min=1)
        return total / factors[target[known]].sum().clamp(min=torch.finfo(factors.dtype).tiny)

    def metrics() -> MetricCollection:
        return _collection(scores=SegmentationScores(classes, ignore))

    return Task(name, classes, loss, metrics, better, weight)


def depth(name: str, *, weight: float = 1.0) -> Task:
    """A positive number per pixel: mean absolute error where the target is positive; see ``DepthErrors``."""
    shares: dict[str, Direction] = {"delta1": "higher", "delta2": "higher", "delta3": "higher"}

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return _mean_error(output, target, target > 0)

    def metrics() -> MetricCollection:
        return _collection(errors=DepthErrors())

    return Task(name, 1, loss, metrics, {"absolute": "lower", "relative": "lower", **shares}, weight)


def normals(name: str, *, weight: float = 1.0) -> Task:
    """A direction per pixel: 1 - cosine where the target is not the zero vector; see ``NormalAngles``."""
    shares: dict[str, Direction] = {"within_11": "higher", "within_22": "higher", "within_30": "higher"}

    def metrics() -> MetricCollection:
        return _collection(angles=NormalAngles())

    return Task(name, 3, _cosine_loss, metrics, {"mean": "lower", "median": "lower", **shares}, weight)


def edges(name: str, *, weight: float = 1.0) -> Task:
    """Edge or not per pixel, from one logit: binary cross-entropy; average precision and best F1, see ``EdgeScores``.

    For edges that are real numbers (Taskonomy's), and for which the paper takes the absolute error, use
    :func:`keypoints`.
    """

    def metrics() -> MetricCollection:
        return _collection(scores=EdgeScores())

    return Task(name, 1, _edge_loss, metrics, {"average_precision": "higher", "f1": "higher"}, weight)


def keypoints(name: str, *, weight: float = 1.0) -> Task:
    """A map of real numbers, such as a corner response: mean absolute error where the target is not NaN."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return _mean_error(output, target, ~target.isnan())

    def metrics() -> MetricCollection:
        return _collection(map=MapError())

    return Task(name, 1, loss, metrics, {"error": "lower"}, weight)


def dense(
    classes: Mapping[str, int],
    only: Sequence[str],
    weights: Mapping[str, float],
    kinds: Mapping[str, Callable[..., Task]] = MappingProxyType({}),
) -> tuple[Task, ...]:
    """Make the dense tasks of a data set that a user asked for.

    Args:
        classes: The tasks that there are, and the outputs of each.
        only: The tasks to make, in this order.
        weights: Of their losses, 1 where not named.
        kinds: Constructors of tasks that are not of the kind that their name says.

    Raises:
        ValueError: ``only`` is empty or names a task twice, or it or ``weights`` names one that there is not.
    """
    for argument, names in (("only", tuple(only)), ("weights", tuple(weights))):
        if unknown := set(names) - set(classes):
            raise ValueError(f"{argument}: needs tasks among {', '.join(classes)}, found {sorted(unknown)}; name those")
    if not only or len(set(only)) < len(only):
        raise ValueError(f"only: needs at least one task and each once, found {tuple(only)}; name each once")
    constructors: dict[str, Callable[..., Task]] = {
        "segmentation": functools.partial(segmentation, classes=classes.get("segmentation", 0)),
        "depth": depth,
        "normals": normals,
        "edges": edges,
        "keypoints": keypoints,
        **kinds,
    }
    return tuple(constructors[name](name, weight=weights.get(name, 1.0)) for name in only)


# Functions of the module, so that problems can be sent to other processes.
def _right(classes: int) -> MetricCollection:
    return _collection(accuracy=MulticlassAccuracy(classes, average="micro"))


def _ranking() -> MetricCollection:
    return _collection(average_precision=AveragePrecision(), auroc=AUROC())


def _collection(**metrics: Metric) -> MetricCollection:
    collection: dict[str, Any] = dict(metrics)
    return MetricCollection(collection, compute_groups=False)


def _binary_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output.flatten(), target.flatten().to(output.dtype))


def _edge_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(resize(output, target), target.to(output.dtype))


def _mean_error(output: Tensor, target: Tensor, known: Tensor) -> Tensor:
    error = torch.where(known, resize(output, target) - target, 0.0)  # first the choice: a NaN target has no gradient
    return error.abs().sum() / known.sum().clamp(min=1)


def _cosine_loss(output: Tensor, target: Tensor) -> Tensor:
    known = (target != 0).any(1)
    distance = 1 - F.cosine_similarity(resize(output, target), target, dim=1)
    return (distance * known).sum() / known.sum().clamp(min=1)
