"""Metrics of dense and binary tasks that torchmetrics lacks, or has with a catch, as torchmetrics classes.

A class that judges one task in several ways is one metric whose ``compute`` returns a dictionary: one pass over the
pixels, and no compute groups. (``MetricCollection`` merges metrics whose states are equal after the first batch, so
two thresholds with equal counts there would silently become one.)

All sums are float64, so that they do not depend on how the split is cut into batches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryPrecisionRecallCurve,
    MulticlassConfusionMatrix,
)


def resize(output: Tensor, target: Tensor) -> Tensor:
    """Bring an output to the height and width of its target, bilinearly (half-pixel centres)."""
    size = target.shape[-2:]
    if output.shape[-2:] == size:
        return output
    return F.interpolate(output, size=size, mode="bilinear", align_corners=False)


class AveragePrecision(BinaryAveragePrecision):
    """Average precision of logits. torchmetrics takes a batch of logits inside [0, 1] for probabilities; here never."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits and their targets of 0 and 1, any shape."""
        super().update(preds.flatten().double().sigmoid(), target.flatten().long())


class AUROC(BinaryAUROC):
    """Area under the ROC curve of logits; see :class:`AveragePrecision`."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits and their targets of 0 and 1, any shape."""
        super().update(preds.flatten().double().sigmoid(), target.flatten().long())


class EdgeScores(BinaryPrecisionRecallCurve):
    """Average precision of edge logits, and F1 at the threshold that is best for the whole split.

    At a fixed threshold, F1 is stuck at 0 as long as a network gives no pixel of a rare class more than one half,
    however well it ranks them. The best threshold of the split is the "optimal data-set scale" that edge detectors are
    judged by (Arbelaez et al., TPAMI 2011), here without tolerance in position.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits ``(batch, 1, h, w)`` and targets ``(batch, 1, height, width)`` of 0 and 1."""
        super().update(resize(preds, target).double().sigmoid(), target.long())

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Return both scores, each a scalar."""
        precision, recall, _ = super().compute()
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return {"average_precision": (precision[:-1] * (recall[:-1] - recall[1:])).sum(), "f1": f1.max()}


class SegmentationScores(MulticlassConfusionMatrix):
    """Mean IoU and pixel accuracy, from one confusion matrix of the whole split.

    The IoU of a class is TP / (TP + FP + FN). Its mean is over the classes that occur in the target or in the
    prediction of any labelled pixel: a class that is there and never predicted counts 0, and so does a class that is
    predicted and never there. (The authors' code leaves out every class without a true positive, so that losing a
    class raises their mIoU.) Pixel accuracy is over labelled pixels only.

    Args:
        classes: Number of classes.
        ignore: Target value of unlabelled pixels.
    """

    def __init__(self, classes: int, ignore: int) -> None:
        super().__init__(num_classes=classes, ignore_index=ignore)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add class scores ``(batch, classes, h, w)`` and targets ``(batch, height, width)``, int64."""
        super().update(resize(preds, target).argmax(1), target)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Return ``miou`` and ``pixel_accuracy``."""
        table = super().compute().double()  # rows: target, columns: prediction
        hits, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
        return {
            "miou": (hits[union > 0] / union[union > 0]).mean(),
            "pixel_accuracy": hits.sum() / table.sum(),
        }


class PaperIoU(SegmentationScores):
    """The mean IoU of the authors' code: only over classes with a true positive, so that it rises when one is lost."""

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Return ``paper_miou``, a scalar; 0 where no pixel is right."""
        table = MulticlassConfusionMatrix.compute(self).double()
        hits, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
        found = hits > 0
        return {"paper_miou": (hits[found] / union[found]).sum() / found.sum().clamp(min=1)}


class _Sums(Metric):
    """A metric that is made of float64 sums over pixels."""

    full_state_update = False
    labelled: Tensor  # how many pixels were added

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, name: str, values: Tensor) -> None:
        setattr(self, name, getattr(self, name) + values.sum(dtype=torch.float64))


class DepthErrors(_Sums):
    """Errors of positive quantities where the target is positive (elsewhere it is unknown).

    ``absolute`` is the mean of abs(p - t), ``relative`` of abs(p - t) / t, and ``delta1`` to ``delta3`` are the shares
    of pixels with max(p / t, t / p) < 1.25, 1.25^2, 1.25^3 (Eigen et al., NeurIPS 2014). A prediction of zero or less
    is outside all of them.
    """

    def __init__(self) -> None:
        super().__init__("labelled", "absolute", "relative", "delta1", "delta2", "delta3")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add predictions ``(batch, 1, h, w)`` and targets ``(batch, 1, height, width)``."""
        known = target > 0
        truth, guess = target[known].double(), resize(output, target)[known].double()
        error = (guess - truth).abs()
        ratio = torch.where(guess > 0, torch.maximum(guess / truth, truth / guess), torch.inf)
        self._add("labelled", known)
        self._add("absolute", error)
        self._add("relative", error / truth)
        for power in (1, 2, 3):
            self._add(f"delta{power}", ratio < 1.25**power)

    def compute(self) -> dict[str, Tensor]:
        """Return the two errors and the three shares."""
        names = ("absolute", "relative", "delta1", "delta2", "delta3")
        return {name: getattr(self, name) / self.labelled for name in names}


class NormalAngles(_Sums):
    """Angles in degrees between predicted and true normals where the target is not the zero vector.

    ``mean``, ``median``, and the shares ``within_11``, ``within_22``, ``within_30`` of angles below 11.25, 22.5 and 30
    degrees. Lengths do not matter; a predicted zero vector is 90 degrees off. The median comes from a histogram with
    bins of 0.01 degrees, so that no angle has to be kept: it is within 0.005 degrees of the exact one.
    """

    BINS = 18_000  # of 0.01 degrees
    total: Tensor
    histogram: Tensor

    def __init__(self) -> None:
        super().__init__("labelled", "total", "within_11", "within_22", "within_30")
        self.add_state("histogram", torch.zeros(self.BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add predictions ``(batch, 3, h, w)`` and targets ``(batch, 3, height, width)``."""
        guess, truth = resize(output, target).double(), target.double()
        cosine = (F.normalize(guess, dim=1) * F.normalize(truth, dim=1)).sum(1)
        angles = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))[(truth != 0).any(1)]
        self._add("labelled", torch.ones_like(angles))
        self._add("total", angles)
        for name, limit in (("within_11", 11.25), ("within_22", 22.5), ("within_30", 30.0)):
            self._add(name, angles < limit)
        bins = (angles * (self.BINS / 180)).long().clamp(max=self.BINS - 1)
        self.histogram = self.histogram + torch.bincount(bins, minlength=self.BINS)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean, the median and the three shares."""
        middle = torch.stack([(self.labelled - 1).div(2).floor(), self.labelled.div(2).floor()])  # ranks, from 0
        bins = torch.searchsorted(self.histogram.cumsum(0), middle, right=True).double()
        shares = {name: getattr(self, name) / self.labelled for name in ("within_11", "within_22", "within_30")}
        median = (bins.mean() + 0.5) * 180 / self.BINS
        return {"mean": self.total / self.labelled, "median": median, **shares}


class MapError(_Sums):
    """Mean absolute error of a real-valued map where the target is not NaN."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__("labelled", "total")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add predictions ``(batch, channels, h, w)`` and targets ``(batch, channels, height, width)``."""
        known = ~target.isnan()
        self._add("labelled", known)
        self._add("total", (resize(output, target)[known].double() - target[known].double()).abs())

    def compute(self) -> dict[str, Tensor]:
        """Return the mean absolute error."""
        return {"error": self.total / self.labelled}
