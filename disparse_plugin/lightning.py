"""DiSparse as a callback of Lightning; needs ``pip install 'disparse-plugin[lightning]'``.

The ``LightningModule`` needs one method, ``task_losses(batch)``, which returns one scalar loss per task::

    def task_losses(self, batch):
        mask, label = self(batch["image"])
        return {"mask": dice(mask, batch["mask"]), "label": cross_entropy(label, batch["label"])}

    def training_step(self, batch, batch_idx):
        return sum(self.task_losses(batch).values())

Everything else is in the callback, whose arguments can all be plain values, as in a YAML file::

    trainer:
      callbacks:
        - class_path: disparse_plugin.lightning.DiSparsePruning
          init_args: {mode: pretrained, amount: 0.9, criterion: layer_adaptive(taylor)}
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from .arbiters import Arbiter
from .callbacks import Fit, Mode, Options, PrunedFits
from .criteria import Criterion, ScoreFunction
from .masks.state_dicts import match_masks
from .scoring.losses import Batch, TaskLosses

try:
    from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.utilities import CombinedLoader
except ImportError as missing:
    raise ImportError(
        "disparse_plugin.lightning needs Lightning; install it with: pip install 'disparse-plugin[lightning]'"
    ) from missing

__all__ = ["DiSparsePruning", "match_masks"]

_METHOD = "task_losses"


class DiSparsePruning(Callback):
    """Prune a multi-task ``LightningModule`` while ``Trainer.fit`` runs.

    ``mode="static"``: score the untrained model, prune it once, train it sparse. ``"pretrained"``: the same on trained
    weights, at once or after ``start_at`` steps. ``"gradual"``: in stages, by :class:`GradualPruning`. ``"dynamic"``:
    sparse from the first step, by :class:`DiSparseScheduler`.

    Masks are in every checkpoint, and a run that goes on from one (``ckpt_path``) has them before the weights are
    loaded, strictly; so have ``validate``, ``test`` and ``predict``. A further ``fit`` of the same model goes on where
    the last one stopped. Under DDP all ranks score their own data, and have the same masks. The share of the listed
    weights that is masked is logged as ``sparsity`` at every step.

    ``task_losses`` is called for scoring in the precision of the training; what it logs is then not logged.

    Example:
        >>> callback = DiSparsePruning(mode="pretrained", amount=0.9, criterion="layer_adaptive(taylor)")
        >>> callback, callback.sparsity
        (DiSparsePruning(mode='pretrained', amount=0.9, criterion='layer_adaptive(taylor)'), 0.0)
    """

    def __init__(
        self,
        mode: Mode,
        amount: int | float | None = None,  # int as well, because configuration files are read by this annotation
        *,
        criterion: str | Criterion | ScoreFunction | None = None,
        arbiter: str | Arbiter | None = None,
        pattern: str = "weights",
        exclude: Sequence[nn.Module | str] = (),
        fold: bool = False,
        min_keep: int | float | None = None,
        num_batches: int | None = None,
        start_at: int | float | None = None,
        update_every: int | None = None,
        stop_at: int | float | None = None,
        distribution: str | dict[str, float] | None = None,
        drop_fraction: float | None = None,
        exempt: list[str] | None = None,
        regrow_dropped: bool | None = None,
        seed: int | None = None,
    ) -> None:
        """Take the options; the model is not touched before ``fit``. Options left out have the defaults of the core.

        Args:
            mode: ``"static"``, ``"pretrained"``, ``"gradual"`` or ``"dynamic"``.
            amount: How much of the weights is pruned in the end, those masked before included: a fraction (float),
                or a count (int). Left out with an ``n:m`` pattern. (The one-shot functions count what is still alive.)
            criterion: A name, also ``"layer_adaptive(NAME)"``, or what the core takes; by default ``"snip"`` at the
                start, ``"layer_adaptive(damped(taylor, 0.25))"`` for ``"pretrained"`` and ``"gradual"``, and
                ``"gradient"`` for ``"dynamic"``, which also takes ``"random"``.
            arbiter: A name, also ``"at_least(K)"``, or what the core takes; by default ``"sum"`` where ``"pretrained"``
                or ``"gradual"`` have their default criterion, else ``"unanimous"``.
            pattern: ``"weights"``, ``"n:m"`` such as ``"2:4"``, or ``"channels"`` (masked; not ``"dynamic"``), as in
                :meth:`~disparse_plugin.TaskScores.masks`.
            exclude: Names or glob patterns of what is left out, e.g. a loss network, or modules: neither scored nor
                pruned nor counted.
            fold: Make the masks of its layers permanent when ``fit`` has ended. A further ``fit`` brings them back.
            min_keep: Not ``"dynamic"``: how many weights stay in every tensor at least (int), or which fraction of it
                (float), as in :meth:`~disparse_plugin.TaskScores.masks`.
            num_batches: One-shot modes: how many training batches of each rank to score on (16); the data is read again
                from the start if it has fewer.
            start_at: ``"pretrained"``: prune after this optimizer step (int; those of earlier fits count), or
                after this fraction of the training (float: 0.25 is one cut after a quarter of it), on the last
                ``num_batches`` batches, or as many as there are; no checkpoint holds them, so a fit that begins or
                resumes less than that before scores on fewer, and warns. ``"gradual"``: the first stage, likewise.
            update_every: ``"gradual"``, ``"dynamic"``: optimizer steps between changes (100).
            stop_at: ``"gradual"``, ``"dynamic"``: the step (int) or fraction of the training (float) of the last stage,
                or from which on nothing changes; by default a half, and three quarters, of the first ``fit``.
            distribution: ``"dynamic"``: as in :class:`DiSparseScheduler`, densities by name.
            drop_fraction: ``"dynamic"``: the share to exchange at first.
            exempt: ``"dynamic"``: deprecated; names of modules or weights that stay dense and count in the total.
            regrow_dropped: ``"dynamic"``: as in :class:`DiSparseScheduler`.
            seed: ``"dynamic"``: for the first masks and ``criterion="random"``.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If a value is out of range, a name is unknown, or an option is of another mode.
        """
        self._fits = PrunedFits(
            Options(
                mode=mode,
                amount=amount,
                criterion=criterion,
                arbiter=arbiter,
                pattern=pattern,
                exclude=exclude,
                fold=fold,
                min_keep=min_keep,
                num_batches=num_batches,
                start_at=start_at,
                update_every=update_every,
                stop_at=stop_at,
                distribution=distribution,
                drop_fraction=drop_fraction,
                exempt=exempt,
                regrow_dropped=regrow_dropped,
                seed=seed,
            )
        )

    def __repr__(self) -> str:
        """Show what was chosen."""
        return f"{type(self).__name__}({self._fits.options})"

    @property
    def sparsity(self) -> float:
        """The share of the listed weights that is masked."""
        return self._fits.sparsity

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the model follow the masks of checkpoints.

        Raises:
            TypeError: If the module does not say the losses of its tasks.
            ValueError: If the strategy shards weights, or weights are averaged beside the masks.
        """
        if trainer.strategy.restore_checkpoint_after_setup:
            raise ValueError(
                f"strategy: must keep whole weights on every rank, found {type(trainer.strategy).__name__}; use one "
                "device or 'ddp'"
            )
        self._fits.follow(None)
        if stage == "fit":
            _check_has_task_losses(pl_module)
            _check_not_averaged(trainer)
            self._fits.expect(pl_module)
        self._fits.follow(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start: weights and masks are loaded, optimizers exist."""
        fit = Fit(
            model=pl_module,
            losses_for=functools.partial(_task_losses_in, trainer, pl_module),
            optimizers=trainer.optimizers,
            grad_scaler=getattr(trainer.precision_plugin, "scaler", None),
            resumed=trainer.ckpt_path is not None,
            draws=False,
            total_steps=_total_steps(trainer),
        )
        self._fits.begin(fit)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune before the first step."""
        self._fits.before_training(_ScoringBatches(trainer, pl_module), trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Batch,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Change masks when it is time, and log the sparsity."""
        self._fits.after_batch(batch, trainer.global_step)
        pl_module.log("sparsity", self.sparsity, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the masks permanent if asked; checkpoints of the training were written before, with masks."""
        self._fits.end(pl_module, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Leave the model as an ordinary one."""
        self._fits.follow(None)
        if stage != "fit":  # a checkpoint with masks may have been loaded
            self._fits.end_evaluation(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run goes on from; the masks themselves are in the model's state, unless folded."""
        return self._fits.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint. Of one made in another mode, only the masks are taken over."""
        self._fits.load_state_dict(state_dict)


def _check_not_averaged(trainer: Trainer) -> None:
    """Refuse lightning's own averages: they copy the dense model before any mask is made, buffer by buffer.

    Raises:
        ValueError: If one is among the callbacks.
    """
    kind = getattr(callbacks, "WeightAveraging", ())  # newer versions have it
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, kind):
            raise ValueError(
                f"callbacks: masks that are made in a fit are not in averages that {type(callback).__name__} begins "
                "before it; prune before the fit (disparse_pretrained), run the model once under torch.no_grad() "
                "(torch copies no pruned model otherwise), and leave this callback out; or average by hand and call "
                "disparse_plugin.masks.apply_masks"
            )


def _check_has_task_losses(model: nn.Module) -> None:
    """Check that a LightningModule tells its losses task by task.

    Raises:
        TypeError: If it does not.
    """
    if not callable(getattr(model, _METHOD, None)):
        raise TypeError(
            f"model: must have a method {_METHOD}(batch) that runs it once and returns one scalar loss per task, found "
            f"none in {type(model).__name__}; add e.g. def {_METHOD}(self, batch): return "
            f"{{'depth': ..., 'mask': ...}} and use sum(self.{_METHOD}(batch).values()) in training_step"
        )


def _task_losses_in(trainer: Any, model: Any, *, scaled: bool) -> TaskLosses:
    """Make of ``model.task_losses`` what the core calls: in the precision of the training, and without logging.

    Args:
        trainer: The trainer.
        model: The LightningModule.
        scaled: Whether the caller scales the losses as a ``GradScaler`` does. Without, half precision gradients could
            vanish, so where training scales, full precision is used.
    """
    precision = trainer.precision_plugin
    context = precision.train_step_context
    if not scaled and getattr(precision, "scaler", None) is not None:
        context = contextlib.nullcontext

    def losses(_: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        with _not_logging(model), context():
            found: Mapping[str, Tensor] = getattr(model, _METHOD)(batch)
        return found

    return losses


@contextlib.contextmanager
def _not_logging(model: nn.Module) -> Iterator[None]:
    """Let ``self.log`` do nothing: what is computed for scoring is no result of a training step."""
    vars(model)["log"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(model)["log"]


def _total_steps(trainer: Trainer) -> int | None:
    """Return at how many optimizer steps a fit ends, or None where nobody knows.

    ``estimated_stepping_batches`` is infinite without an end, -1 for data without a length, and takes the accumulation
    of the first epoch for that of all. With manual optimization it is right if every batch is one step.
    """
    estimate = trainer.estimated_stepping_batches
    if not 0 < estimate < float("inf"):
        return None
    changing = [own for own in trainer.callbacks if isinstance(own, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if not changing or trainer.max_epochs in (None, -1):
        return int(estimate)
    batches = trainer.num_training_batches
    steps = sum(math.ceil(batches / changing[-1].get_accumulate_grad_batches(i)) for i in range(trainer.max_epochs))
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


class _ScoringBatches:
    """The training batches as ``training_step`` gets them, read by iterators of their own."""

    def __init__(self, trainer: Trainer, model: LightningModule) -> None:
        self._trainer, self._model = trainer, model

    def __iter__(self) -> Iterator[Batch]:
        loader = CombinedLoader(self._trainer.train_dataloader, "max_size_cycle")
        loader.flattened = [_twin(part) for part in loader.flattened]
        for batch, *_ in loader:
            batch = self._trainer.precision_plugin.convert_input(batch)
            batch = self._model._on_before_batch_transfer(batch, dataloader_idx=0)
            yield self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _twin(part: Any) -> Any:
    """Copy a DataLoader without its iterator: with persistent workers, another pass would reset the training's."""
    if not isinstance(part, DataLoader):
        return part
    twin = copy.copy(part)
    twin._iterator = None
    return twin
