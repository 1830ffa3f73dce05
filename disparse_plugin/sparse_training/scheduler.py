"""Dynamic sparse training: drop the smallest weights, grow those that a task strongly asks for, at a constant count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .. import arbiters
from .._support.distributed import check_same, failing_together
from .._support.double import comparable
from .._support.shards import reshard
from .._support.user_warning import warn_user
from ..agreement import patterns
from ..agreement.patterns import NofM, Pattern
from ..arbiters import Arbiter
from ..criteria import Criterion, ScoreFunction, resolve
from ..kinds import check_flag, whole_number
from ..maskable import select, warn_of_skipped
from ..parameters import Exclude, ParameterKey, keys_by_name, listed, stored, unwrap
from ..scoring.losses import Batch, TaskLosses, check_callable_losses
from .blocks import BlockExchange
from .exchange import Exchange, random_scores
from .initial_masks import initial_masks
from .live_masks import LiveMasks, check_goes_with_shards, counts_of
from .mask_scheduler import MaskScheduler, given
from .schedules import (
    STOP_AFTER,
    CosineDecay,
    Schedule,
    check_drop_fraction,
    check_steps,
    checked,
    describe,
    describe_arbiter,
    given_since,
    step_of,
)
from .shared_out_exchange import SharedOutExchange
from .step_scores import StepScores, check_grad_scaler, check_growth_criterion

RANDOM = "random"

EXEMPT_IS_DEPRECATED = (
    "exempt: is deprecated; for layers that stay dense and count in the total pass distribution={'NAME.weight': 1.0, "
    "...}, and for what is to be left out altogether exclude=[...]"
)


@dataclasses.dataclass(frozen=True)
class MaskUpdate:
    """What one update did.

    Attributes:
        step: The number of completed optimizer steps.
        drop_fraction: The share of each layer's alive weights that was to be exchanged.
        exchanged: For each layer, how many weights were dropped, and as many grown.
    """

    step: int
    drop_fraction: float
    exchanged: Mapping[str, int]


class DiSparseScheduler(MaskScheduler[MaskUpdate]):
    """Train a sparse network and let it move its weights to where any task wants them (DiSparse dynamic).

    Every ``update_every`` optimizer steps, in each layer l with ``a_l`` alive of ``n_l`` weights::

        k_l     = min(round(f_t * a_l), n_l - a_l)       f_t = drop_fraction / 2 * (1 + cos(pi * t / stop_at))
        dropped = the k_l alive weights with the smallest abs(w)
        grown   = the k_l masked weights with the highest arbiter over tasks of percentile of abs(dL_task/dw)

    The gradients are those of the sparse network that is trained, on the batch of the step, from one forward and one
    backward per task; the percentiles of a task are among the layer's masked weights. Weights that are dropped in an
    update cannot grow in it. The number of alive weights of each layer never changes. A layer whose weight is frozen
    exchanges none until it is trained. (Sun et al., CVPR 2022, dynamic setting; Evci et al., ICML 2020, for one task.)

    Masks, weights and optimizer moments change in place: modules, Parameters, the optimizer, wrappers and compiled
    graphs stay. Masked weights are exactly 0 and stay so; regrown ones start at 0 with fresh moments.

    Special cases: ``joint(losses)`` in place of ``losses`` is RigL, ``criterion="random"`` is SET, ``drop_fraction=0``
    is static sparse training.

    Under ``torch.distributed``, make it and call :meth:`step` on every rank; the ranks' scores are added up and all
    make the same masks. An EMA (``AveragedModel``) is to be made after the scheduler and before the next forward.

    Attributes:
        completed: Number of completed optimizer steps.
        masks: The masks, with ``keys`` and ``names`` of the masked parameters.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> def losses(model, x):
        ...     out = model(x)
        ...     return {"a": out[:, 0].square().mean(), "b": (out[:, 1] - 1).square().mean()}
        >>> scheduler = DiSparseScheduler(net, optimizer, losses, amount=0.75, update_every=2, stop_at=8)
        >>> for _ in range(4):
        ...     batch = torch.randn(32, 8)
        ...     optimizer.zero_grad()
        ...     sum(losses(net, batch).values()).backward()
        ...     optimizer.step()
        ...     update = scheduler.step(batch)
        >>> update.step, sum(int(layer.weight_mask.sum()) for layer in (net[0], net[2]))
        (4, 40)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        losses: TaskLosses,
        *,
        amount: float | None = None,
        distribution: str | Mapping[ParameterKey | str, float] | None = None,
        drop_fraction: float | Schedule = 0.5,
        update_every: int = 100,
        stop_at: float = STOP_AFTER,
        total_steps: int | None = None,
        criterion: str | Criterion | ScoreFunction = "gradient",
        arbiter: str | Arbiter = "unanimous",
        pattern: str | Pattern = "weights",
        parameters: Iterable[ParameterKey] | None = None,
        exclude: Exclude = (),
        exempt: Iterable[nn.Module | str] = (),
        regrow_dropped: bool = False,
        grad_scaler: GradScaler | None = None,
        seed: int = 0,
    ) -> None:
        """Mask the model.

        Args:
            model: The model, dense or (with ``distribution="existing"``) pruned; wrappers are looked through.
            optimizer: What trains it; of a kind in :mod:`disparse_plugin.sparse_training.optimizer_state`.
            losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task. Batches may miss
                tasks; a layer that no task of an update reaches stays as it is. Where training uses ``autocast``, use
                it inside.
            amount: How much of the weights is pruned: a fraction (float) or a count (int).
            distribution: ``"erk"`` (the default), ``"uniform"``, densities by pair or qualified name (layers without
                one share what is left by ERK), or ``"existing"`` for the masks that are on the model; see
                :mod:`disparse_plugin.sparse_training.densities`. Which weights of a layer stay at first is random.
            drop_fraction: The share to exchange at step 0, decaying by a cosine; or a function of the step.
            update_every: Optimizer steps between updates.
            stop_at: No update from this step on (int), or from this fraction of the training on (float).
            total_steps: The optimizer steps of the training; needed where ``stop_at`` is a fraction.
            criterion: What a task asks for: a criterion that tells masked weights apart by their gradient, or
                ``"random"``.
            arbiter: How the tasks' wishes are joined.
            pattern: ``"weights"``, or any ``"n:m"`` such as ``"2:4"``: of every m weights along the input dimension
                exactly n are alive at every step, and weights drop and grow inside their block. ``amount`` is then left
                out, and so is ``distribution`` (or ``"existing"``).
            parameters: ``(module, name)`` pairs; by default those of :func:`~disparse_plugin.prunable_parameters` that
                can be masked.
            exclude: Modules, names or glob patterns, as in :func:`~disparse_plugin.prunable_parameters`: neither
                scored nor pruned nor counted. A layer that stays dense and counts has the density 1.0.
            exempt: Deprecated. Modules or qualified names that stay dense and count in the total.
            regrow_dropped: Whether a weight may be grown in the update that drops it, as in RigL's own code.
            grad_scaler: Scale the losses as training does, so that half precision gradients neither vanish nor
                overflow; an update whose gradients overflow is put off to the next step.
            seed: For the first masks and ``criterion="random"``.

        Raises:
            TypeError: If an argument is of the wrong type, or the optimizer is not known.
            ValueError: If a value is out of range or does not fit the model. The model is as before.
        """
        arguments = given(locals())
        root, exclude = unwrap(model), tuple(exclude) if isinstance(exclude, Iterator) else exclude
        reshard(root)
        with failing_together():
            if dense := listed("exempt", exempt):
                warn_user(EXEMPT_IS_DEPRECATED, DeprecationWarning)
            self._generator = torch.Generator("cpu").manual_seed(whole_number("seed", seed))
            self._every = check_steps("update_every", update_every)
            self._stop = step_of("stop_at", stop_at, total_steps)
            check_drop_fraction(fixed := drop_fraction)
            self._fraction: Schedule = fixed if callable(fixed) else CosineDecay(fixed, self._stop)
            check_flag("regrow_dropped", regrow_dropped)
            self._arbiter, self._regrow = arbiters.resolve(arbiter), bool(regrow_dropped)
            check_callable_losses(losses)
            check_grad_scaler(grad_scaler)
            rule = None if criterion == RANDOM else check_growth_criterion(resolve(criterion))
            selection = select(root, parameters, exclude)
            keys, names = selection.keys, selection.names
            self._pattern = patterns.resolve(pattern)
            check_goes_with_shards(keys, self._pattern, grad_scaler)
            first = initial_masks(keys, names, amount, distribution, dense, self._generator, self._pattern)
            options = self._described(drop_fraction, rule, arbiter)
        alive = counts_of([stored(*keys[index]) for index in first], list(first.values()))
        settings: dict[str, Any] = {"alive": alive, **options}
        check_same("settings", settings, "give all ranks the same options")
        warn_of_skipped(selection.skipped, len(keys))
        self._told = set[str]()  # of which weights it was said that they are frozen
        self._frozen([stored(*key) for key in keys], names)
        revocable = not selection.listed
        masks = LiveMasks(root, optimizer, {keys[index]: mask for index, mask in first.items()}, revocable=revocable)
        again = self._beginning_again({**arguments, "exclude": exclude, "exempt": dense}, root) if revocable else None
        super().__init__(
            model, losses, masks, optimizer, settings, self._every if self._every < self._stop else None,
            skipped=selection.skipped, begin_again=again,
        )  # fmt: skip
        self._scores = None if rule is None else StepScores(model, losses, rule, masks, grad_scaler, every_batch=False)

    def _described(
        self, drop_fraction: float | Schedule, rule: Criterion | None, arbiter: str | Arbiter
    ) -> dict[str, Any]:
        """Return what a run that goes on from this one must have in common with it."""
        return {
            "update_every": self._every,
            "stop_at": self._stop,
            "drop_fraction": describe(drop_fraction),
            "criterion": RANDOM if rule is None else rule.name,
            "arbiter": describe_arbiter(arbiter),
            "regrow_dropped": self._regrow,
            **given_since(pattern=self._pattern),
        }

    def _beginning_again(self, arguments: Mapping[str, Any], root: nn.Module) -> Callable[[Sequence[str]], None]:
        """Return what makes this anew with the same arguments, but without some parameters."""

        def begin_again(names: Sequence[str]) -> None:
            without = {
                "exclude": [*arguments["exclude"], *names],
                "distribution": _without(arguments["distribution"], names, root),
            }
            DiSparseScheduler.__init__(self, **{**arguments, **without})

        return begin_again

    def _change(self, batches: Sequence[Batch]) -> MaskUpdate | None:
        if self.completed >= self._stop:  # it was put off, or step() is not called after every step
            self._next = None
            return None
        with failing_together():
            fraction = checked(self._fraction, self.completed, "drop_fraction")
            alive = self.masks.current()
        check_same("drop_fraction", fraction, "give all ranks the same function of the step")
        new = alive
        exchange = self._exchange(fraction)
        if any(exchange.count(*layer) for layer in self._sizes()):
            chosen = self._exchanged(batches, alive, fraction)
            if chosen is None:
                return None
            frozen = self._frozen(self.masks.parameters(), self.masks.names)
            choices = zip(frozen, alive, chosen, strict=True)
            new = [before if stays else after for stays, before, after in choices]
            self.masks.check_alike(new, "keep the weights of all ranks equal (DistributedDataParallel does)")
            self.masks.rewrite(new)
        exchanged = self.masks.counts([after & ~before for before, after in zip(alive, new, strict=True)])
        return MaskUpdate(self.completed, fraction, dict(zip(self.masks.names, exchanged, strict=True)))

    def _frozen(self, parameters: Sequence[nn.Parameter], names: Sequence[str]) -> list[bool]:
        """Tell which weights are not trained: what would grow there stays 0, so none drops. Of each it is said once."""
        frozen = [not parameter.requires_grad for parameter in parameters]
        found = [name for name, is_frozen in zip(names, frozen, strict=True) if is_frozen]
        if not self._told.issuperset(found):
            self._told.update(found)
            warn_user(
                f"parameters: {len(found)} of {len(names)} are frozen (first: {found[0]}): their masks stay as they "
                f"are until they are trained; to keep them whole, leave them out with exclude={found}"
            )
        return frozen

    def _exchanged(self, batches: Sequence[Batch], alive: Sequence[Tensor], fraction: float) -> list[Tensor] | None:
        tasks: tuple[str, ...]
        if self._scores is None:
            rows, tasks = random_scores(self.masks.parameters(), self._generator), (RANDOM,)
        else:
            sums = self._scores.on(batches)
            if sums is None:
                return None
            rows, tasks = sums.by_parameter(), self._scores.tasks
        if self.masks.sharded:
            spread = SharedOutExchange(fraction, self._arbiter, tasks, self._regrow)
            return [spread.new_mask(*layer) for layer in zip(self.masks.parameters(), alive, rows, strict=True)]
        weights = [comparable(parameter.detach()) for parameter in self.masks.parameters()]
        near = [comparable(mask) for mask in alive]
        rows = [{task: comparable(row) for task, row in of_layer.items()} for of_layer in rows]
        with failing_together():
            chosen = self._exchange(fraction, tasks).new_masks(weights, near, rows, self.masks.kept)
        return [after.to(before.device) for before, after in zip(alive, chosen, strict=True)]

    def _sizes(self) -> list[tuple[int, int]]:
        """Return, for each layer, how many weights are alive (always the same), and how many there are."""
        sizes = [parameter.numel() for parameter in self.masks.parameters()]
        return list(zip(self._settings["alive"], sizes, strict=True))

    def _exchange(self, fraction: float, tasks: Sequence[str] = ()) -> Exchange:
        if isinstance(self._pattern, NofM):
            n, m = self._pattern.n, self._pattern.m
            return BlockExchange(fraction, self._arbiter, tasks, self._regrow, n=n, m=m)
        return Exchange(fraction, self._arbiter, tasks, self._regrow)

    def _following(self) -> int | None:
        following = (self.completed // self._every + 1) * self._every
        return following if following < self._stop else None

    def _needs_batches(self) -> bool:
        return self._scores is not None

    def _own_state(self) -> dict[str, Any]:
        scores = {} if self._scores is None else self._scores.state_dict()
        return {"generator": self._generator.get_state(), "scores": scores}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        generator = torch.Generator("cpu")
        generator.set_state(state["generator"].cpu())
        if self._scores is not None:
            self._scores.load_state_dict(state["scores"])
        self._generator = generator


def _without(
    distribution: str | Mapping[ParameterKey | str, float] | None, names: Sequence[str], root: nn.Module
) -> str | Mapping[ParameterKey | str, float] | None:
    """Leave parameters out of densities by pair or name."""
    if not isinstance(distribution, Mapping):
        return distribution
    known = keys_by_name(root)
    gone = {*names, *(known[name] for name in names)}
    return {key: density for key, density in distribution.items() if key not in gone}
