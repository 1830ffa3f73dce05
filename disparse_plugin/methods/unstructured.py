"""DiSparse as pruning methods of ``torch.nn.utils.prune``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .._support.double import knows_double
from .._support.user_warning import warn_user
from ..agreement.amounts import check_amount, count_to_prune
from ..agreement.budgets import Amount, Budget, check_room
from ..agreement.ranking import lowest
from ..agreement.tallies import count_true, counts_true
from ..arbiters import Arbiter, resolve
from ..parameters import ParameterKey, alive_mask
from ..scoring.given import check_scores
from ..scoring.task_scores import TaskScores
from .base import ScoredPruning


class _AgreementPruning(ScoredPruning):
    """Prune the lowest agreement scores; what the two public methods share."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float) -> None:
        """Remember how much to prune.

        Args:
            amount: A fraction of the entries still alive (float in [0, 1]) or a count (int).

        Raises:
            TypeError: If ``amount`` is neither int nor float.
            ValueError: If ``amount`` is out of range.
        """
        check_amount(amount)
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """Return the mask that leaves out the lowest agreement scores; called by torch.

        Args:
            t: Agreement scores, any shape, values in [0, 1].
            default_mask: The mask so far, same shape; its zeros stay zero.

        Returns:
            The new mask, of the type and shape of ``default_mask``. Exactly ``round(amount * alive)`` entries are newly
            zero; of equal scores the one that comes first is pruned first (:meth:`TaskScores.importance` has none).

        Raises:
            ValueError: If ``t`` does not hold agreement scores, or ``amount`` is a count larger than what is alive.
        """
        alive = default_mask.reshape(-1) != 0
        scores = _entries(t, alive)
        _check_agreement_scores(t, scores, type(self).__name__)
        return _without(default_mask, alive, lowest(scores, count_to_prune(self.amount, scores.numel())))

    def _check(self, scores: Tensor, alive: Tensor | None) -> None:
        count_to_prune(self.amount, scores.numel() if alive is None else count_true(alive))

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, importance_scores: Tensor | None = None
    ) -> prune.BasePruningMethod:
        """Prune one tensor by the scores given for it, as every method of ``torch.nn.utils.prune``.

        Args:
            module: The module.
            name: The tensor's name in it, e.g. ``"weight"``.
            amount: A fraction of the entries still alive (float in [0, 1]) or a count (int).
            importance_scores: Scores of the tensor's shape, of which only the order matters:
                ``scores.importance()[module, name]``, or any finite tensor.

        Returns:
            The hook that is now on the module.

        Raises:
            TypeError: If ``amount`` is neither int nor float, or the scores are not a floating point tensor.
            ValueError: If there are no scores, they are not finite or of another shape, or ``amount`` is out of range.
                The module is as before.

        Example:
            >>> layer = nn.Linear(4, 1)
            >>> agreement = torch.tensor([[0.1, 0.9, 0.2, 0.7]])
            >>> hook = DiSparseStatic.apply(layer, "weight", 0.5, importance_scores=agreement)
            >>> layer.weight_mask
            tensor([[0., 1., 0., 1.]])
        """
        return cls._on_one_tensor(module, name, importance_scores, amount)

    @classmethod
    def bind(cls, scores: TaskScores, arbiter: str | Arbiter = "unanimous", *, min_keep: float = 0) -> type[Self]:
        """Make a class that carries the scores, for clients that cannot pass ``importance_scores``.

        Lightning's ``ModelPruning(pruning_fn=DiSparseStatic.bind(scores), parameters_to_prune=scores.parameters,
        use_lottery_ticket_hypothesis=False)`` is one of them. Every time it prunes, the class checks that the vector it
        is handed is the weights it was bound to: the same parameters in the same order, the same entries alive.

        Args:
            scores: The scores.
            arbiter: As in :meth:`TaskScores.importance`.
            min_keep: As in :meth:`TaskScores.masks`.

        Returns:
            A subclass to be used in place of this one. With ``prune.global_unstructured``, its ``amount`` may also be
            one for each part, as in :meth:`TaskScores.masks`.

        Raises:
            TypeError: If ``scores`` is not a :class:`TaskScores`, or ``min_keep`` is neither int nor float.
            ValueError: If the arbiter is unknown, or ``min_keep`` is out of range.

        Example:
            >>> from disparse_plugin import score_tasks
            >>> net = nn.Linear(4, 2)
            >>> losses = lambda model, x: {"a": model(x)[:, 0].mean(), "b": model(x)[:, 1].mean()}
            >>> scores = score_tasks(net, losses, [torch.ones(1, 4)])
            >>> prune.global_unstructured(scores.parameters, DiSparseStatic.bind(scores), amount=0.75)
            >>> int(net.weight_mask.sum())
            2
        """
        check_scores(scores)
        resolve(arbiter)
        Budget(min_keep=min_keep)
        bound = {"_scores": scores, "_arbiter": arbiter, "_min_keep": min_keep, "_unbound": cls}
        return type(f"Bound{cls.__name__}", (_Bound, cls), bound)


class DiSparseStatic(_AgreementPruning):
    """Prune at initialisation what all tasks rank low (DiSparse static; Sun et al., CVPR 2022).

    With ``scores = score_tasks(model, losses, data, criterion="snip")`` on an untrained model::

        prune.global_unstructured(scores.parameters, DiSparseStatic, importance_scores=scores.importance(), amount=0.9)

    removes exactly 90 % of the weights in ``scores.parameters``: those with the smallest *largest percentile over
    tasks*. Without scores it raises; it never falls back to magnitudes.

    Example:
        >>> from disparse_plugin import score_tasks
        >>> net = nn.Linear(10, 2)
        >>> losses = lambda model, x: {"a": model(x)[:, 0].square().mean(), "b": model(x)[:, 1].square().mean()}
        >>> scores = score_tasks(net, losses, [torch.randn(8, 10)])
        >>> prune.global_unstructured(
        ...     scores.parameters, DiSparseStatic, importance_scores=scores.importance(), amount=0.9
        ... )
        >>> prune.is_pruned(net), int(net.weight_mask.sum())
        (True, 2)
    """


class DiSparsePretrained(_AgreementPruning):
    """Prune trained weights that all tasks rank low (DiSparse pre-trained; Sun et al., CVPR 2022).

    The same cut as :class:`DiSparseStatic`; what differs is when the scores are taken and by which criterion:
    ``score_tasks(model, losses, data, criterion="taylor")`` on the trained model is the paper's, which gives whole
    layers away at high sparsity. The default of :func:`disparse_pretrained`, :mod:`disparse_plugin.damped_shares`, is
    ``criterion="layer_adaptive(damped(taylor, 0.25))"`` with ``importance("sum")``. Fine-tune afterwards.

    Example:
        >>> from disparse_plugin import disparse_pretrained
        >>> net = nn.Linear(10, 2)
        >>> losses = lambda model, x: {"a": model(x)[:, 0].square().mean(), "b": model(x)[:, 1].square().mean()}
        >>> scores = disparse_pretrained(net, losses, [torch.randn(8, 10)], amount=0.5)
        >>> int(net.weight_mask.sum())
        10
    """


class _Bound:
    """Mixin that takes the agreement scores from the class instead of from the caller."""

    _scores: TaskScores
    _arbiter: str | Arbiter
    _min_keep: float
    _unbound: type[_AgreementPruning]

    def __init__(self, amount: Amount) -> None:
        self.budget = Budget(amount, self._min_keep)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        alive = default_mask.reshape(-1) != 0
        _check_same_entries(_entries(t, alive), self._scores.parameters, self._scores.names)
        masks = self._scores.masks(self.budget, self._arbiter)
        keep = [
            masks[key].reshape(-1) if (now := alive_mask(*key)) is None else masks[key][now]
            for key in self._scores.parameters
        ]
        return _without(default_mask, alive, ~torch.cat(keep))

    @classmethod
    def apply(cls, module: nn.Module, name: str, amount: float, importance_scores: Tensor | None = None) -> Any:
        if importance_scores is not None:
            raise ValueError(
                f"importance_scores: {cls.__name__} carries its own, found others; leave them out, or use the unbound "
                "class"
            )
        if (module, name) not in cls._scores.parameters:
            raise ValueError(
                f"name: {name!r} of {type(module).__name__} must be among the parameters that the scores were made "
                "for, found it is not"
            )
        importance = cls._scores.importance(cls._arbiter, min_keep=cls._min_keep)[module, name]
        alive = importance.numel() if (now := alive_mask(module, name)) is None else count_true(now)
        protected = Budget(amount, cls._min_keep).kept_of(importance.numel(), alive)
        check_room(count_to_prune(amount, alive), alive, protected)
        return cls._unbound.apply(module, name, amount, importance_scores=importance)


def _entries(t: Tensor, alive: Tensor) -> Tensor:
    """Return the alive entries, flat; where all are alive, which is the usual case, nothing is gathered."""
    flat = t.detach().reshape(-1)
    return flat if count_true(alive) == alive.numel() else flat[alive]


def _without(default_mask: Tensor, alive: Tensor, pruned: Tensor) -> Tensor:
    """Return ``default_mask`` with the marked ones of its alive entries set to zero."""
    mask = torch.zeros_like(default_mask, memory_format=torch.contiguous_format)
    mask.view(-1).masked_scatter_(alive, (~pruned).to(mask.dtype))
    return mask


def _check_agreement_scores(t: Tensor, entries: Tensor, method: str) -> None:
    """Tell weights from scores by their gradient; where they have none, biases and norms by values at which they begin.

    Raises:
        ValueError: If they ask for a gradient, or a value is outside [0, 1].

    Warns:
        UserWarning: If they are not float64, or several are exactly 0 or 1: what importance() returns is float64, and
            no two are equal.
    """
    how = "pass importance_scores=scores.importance() for all of scores.parameters, with scores = score_tasks(...)"
    if t.requires_grad:
        raise ValueError(
            f"importance_scores: {method} needs agreement scores for every parameter, found weights in their place; "
            f"{how}"
        )
    if t.numel() and not bool(((t >= 0) & (t <= 1)).all()):
        worst = t[~((t >= 0) & (t <= 1))].reshape(-1)[0].item()
        raise ValueError(
            f"importance_scores: {method} needs agreement scores in [0, 1], found {worst} (weights or raw scores); "
            f"{how}"
        )
    if t.dtype != (torch.float64 if knows_double(t.device) else torch.float32):
        warn_user(
            f"importance_scores: {method} needs agreement scores, which are float64, found {t.dtype}: raw scores of a "
            f"task in [0, 1], or rounded ones, of which many are equal; {how}"
        )
    elif (repeated := max(counts_true([entries == 0, entries == 1]))) > 1:
        warn_user(
            f"importance_scores: of agreement scores no two are equal, found {repeated} of exactly 0 or 1, as biases "
            f"and norms have that no scores were passed for; {how}, and for nothing else"
        )


def _check_same_entries(found: Tensor, parameters: Sequence[ParameterKey], names: Sequence[str]) -> None:
    """Check that a vector of alive weights is that of the given parameters, and say what differs if not."""
    expected = []
    for module, name in parameters:
        weight, alive = getattr(module, name).detach(), alive_mask(module, name)
        expected.append(weight.reshape(-1) if alive is None else weight[alive])
    if sum(part.numel() for part in expected) != found.numel():
        raise ValueError(
            f"parameters: the bound scores are for {len(names)} parameters with "
            f"{sum(part.numel() for part in expected)} alive entries, found {found.numel()} alive entries; prune "
            "exactly scores.parameters (biases and parameters that no task reaches are not in it)"
        )
    for name, part, vector in zip(names, expected, found.split([part.numel() for part in expected]), strict=True):
        if not torch.equal(part.to(vector), vector):
            raise ValueError(
                "parameters: the bound scores are for the current weights of scores.parameters in that order, found "
                f"other values from {name} on; pass scores.parameters as they are, of the same model object, and no "
                "importance_scores"
            )
