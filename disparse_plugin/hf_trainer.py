"""DiSparse as a callback of the Hugging Face Trainer; needs ``pip install 'disparse-plugin[transformers]'``.

The Trainer passes no batch to callbacks, so the callback draws its own from the training data, and it needs the losses
task by task, as everywhere in this package::

    def losses(model, batch):
        mask, label = model.heads(batch["pixel_values"])
        return {"mask": dice(mask, batch["mask"]), "label": cross_entropy(label, batch["label"])}

    trainer = Trainer(model, args, train_dataset=data, callbacks=[DiSparseTrainerCallback(losses, "pretrained", 0.9)])
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from .arbiters import Arbiter
from .callbacks import Fit, Mode, Options, PrunedFits
from .criteria import Criterion, ScoreFunction
from .scoring.losses import Batch, TaskLosses, check_callable_losses

try:
    from accelerate.utils import send_to_device
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as missing:
    raise ImportError(
        "disparse_plugin.hf_trainer needs transformers and accelerate; install them with: pip install "
        "'disparse-plugin[transformers]'"
    ) from missing

__all__ = ["DiSparseTrainerCallback"]

_STATE = "disparse"


class DiSparseTrainerCallback(TrainerCallback, ExportableState):
    """Prune a multi-task model while ``Trainer.train`` runs.

    The modes are those of :class:`disparse_plugin.lightning.DiSparsePruning`: ``"static"``, ``"pretrained"``,
    ``"gradual"`` and ``"dynamic"``. Every checkpoint has the masks, as ``weight_orig`` and ``weight_mask``, and
    ``train(resume_from_checkpoint=...)`` has them before the weights are loaded; so has ``load_best_model_at_end``,
    which warns of a best model from before the pruning ended (``eval_delay`` leaves those out). A further ``train()``
    goes on where the last one stopped. The share of the listed weights that is masked is in the logs as ``sparsity``;
    integrations such as TensorBoard, which the Trainer calls first, do not see it.

    Scores are those of random batches of the training data, collated as for training, not of the batch of the step,
    which the Trainer keeps to itself. They depend on ``args.seed``, the step and the rank only, so that a run that goes
    on from a checkpoint draws the same ones; an ``IterableDataset`` is read on from its start instead.

    ``from_pretrained`` of a checkpoint with masks would initialise the pruned weights anew: save a folded model
    (``fold=True``, then ``trainer.save_model()``).

    Example:
        >>> losses = lambda model, batch: {"a": model(batch["x"])[0].mean(), "b": model(batch["x"])[1].mean()}
        >>> callback = DiSparseTrainerCallback(losses, "dynamic", 0.9, update_every=100, stop_at=15_000)
        >>> callback, callback.sparsity
        (DiSparseTrainerCallback(mode='dynamic', amount=0.9, update_every=100, stop_at=15000), 0.0)
    """

    def __init__(
        self,
        losses: TaskLosses,
        mode: Mode,
        amount: float | None = None,
        *,
        criterion: str | Criterion | ScoreFunction | None = None,
        arbiter: str | Arbiter | None = None,
        pattern: str = "weights",
        exclude: Sequence[nn.Module | str] = (),
        fold: bool = False,
        min_keep: float | None = None,
        num_batches: int | None = None,
        start_at: float | None = None,
        update_every: int | None = None,
        stop_at: float | None = None,
        distribution: str | Mapping[str, float] | None = None,
        drop_fraction: float | None = None,
        exempt: Sequence[str] | None = None,
        regrow_dropped: bool | None = None,
        seed: int | None = None,
    ) -> None:
        """Take the options; the model is not touched before it is trained.

        Args:
            losses: ``losses(model, batch)`` runs the model once and returns one scalar loss per task. ``model`` is the
                one given to the Trainer, ``batch`` what its collator makes, on the model's device.
            mode: ``"static"``, ``"pretrained"``, ``"gradual"`` or ``"dynamic"``.
            amount: How much of the weights is pruned in the end, those masked before included: a fraction (float),
                or a count (int).
            criterion: As in :class:`disparse_plugin.lightning.DiSparsePruning`.
            arbiter: As there.
            pattern: As there.
            exclude: Names, glob patterns or modules that are left out.
            fold: Make the masks of its layers permanent when ``train`` has ended; a further ``train`` has them back.
            min_keep: As there, and so are all that follow.
            num_batches: One-shot modes.
            start_at: ``"pretrained"`` and ``"gradual"``.
            update_every: ``"gradual"`` and ``"dynamic"``.
            stop_at: ``"gradual"`` and ``"dynamic"``.
            distribution: ``"dynamic"``.
            drop_fraction: ``"dynamic"``.
            exempt: ``"dynamic"``.
            regrow_dropped: ``"dynamic"``.
            seed: ``"dynamic"``.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If a value is out of range, a name is unknown, or an option is of another mode.
        """
        check_callable_losses(losses)
        self._losses, self._one_shot = losses, mode in ("static", "pretrained")
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
        self._batches: _RandomBatches | None = None
        self._of_class = 1  # how many callbacks of this class the Trainer has

    def __repr__(self) -> str:
        """Show what was chosen."""
        return f"{type(self).__name__}({self._fits.options})"

    @property
    def sparsity(self) -> float:
        """The share of the listed weights that is masked."""
        return self._fits.sparsity

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """Let the model follow the masks of checkpoints, which are loaded before the training begins."""
        _check_arguments(args, self._one_shot)
        self._fits.follow(given["model"])
        own = state.stateful_callbacks.get(type(self).__name__)
        self._of_class = len(own) if isinstance(own, list) else 1

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """Start: weights, masks and optimizer states are loaded. Prune before the first step.

        Raises:
            ValueError: If the run goes on from a checkpoint whose masks the model has not got.
        """
        model: nn.Module = given["model"]
        resumed = state.global_step > 0
        if resumed:
            self._check_followed(model)
        self._fits.follow(model)
        self._fits.expect(model)
        saved = self._taken_from(state)
        if resumed and _STATE in saved:
            self._fits.load_state_dict(_decoded(saved[_STATE]))
        self._batches = _RandomBatches(given["train_dataloader"], args, state)
        self._fits.begin(self._fit(model, state, given["optimizer"]))
        model.train()
        self._fits.before_training([self._batches], state.global_step)

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """Note a batch whose gradient is accumulated."""
        self._after_batch(state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """Change masks when it is time."""
        self._after_batch(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """Add the sparsity to what is logged of the training."""
        if not {"loss", "train_loss"}.isdisjoint(given["logs"]):
            given["logs"]["sparsity"] = state.log_history[-1]["sparsity"] = self.sparsity

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """Let the next checkpoint begin an own list: of several callbacks, the Trainer appends states at every save."""
        own = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(own, list):
            own.clear()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """Make the masks permanent if asked; checkpoints were written before, with masks."""
        self._fits.end(given["model"], state.global_step)
        self._batches = None

    def state(self) -> dict[str, Any]:
        """Return what a later run goes on from, as text in ``trainer_state.json``: one bit per weight or less."""
        return {"args": {}, "attributes": {}, _STATE: _encoded(self._fits.state_dict())}

    def _check_followed(self, model: nn.Module) -> None:
        """Refuse weights that were loaded before the model had the masks of their checkpoint.

        Raises:
            ValueError: If they were.
        """
        if self._fits.follows(None):
            raise ValueError(
                "callbacks: must hold the callback when the Trainer is made, for a run that goes on from a "
                "checkpoint, found that the weights were loaded without it; use Trainer(..., callbacks=[callback])"
            )
        if not self._fits.follows(model):
            raise ValueError(
                "model_init: must be left out for a run that goes on from a checkpoint, found that the weights were "
                "loaded into another model than the callback has seen when the Trainer was made; use "
                "Trainer(model=model_init(), ..., callbacks=[callback])"
            )

    def _taken_from(self, state: TrainerState) -> Mapping[str, Any]:
        """Take out what the checkpoint holds of this callback: the Trainer keeps a list where a class has several.

        They take turns from the front. What is left is an empty list, to which the next checkpoint's are appended.
        """
        # It is absent in the checkpoint of a dense run.
        own: dict[str, Any] | list[dict[str, Any]] = state.stateful_callbacks.setdefault(type(self).__name__, {})
        if isinstance(own, dict):
            return own
        del own[: -self._of_class]  # older checkpoints hold those of earlier ones too
        return own.pop(0) if own else {}

    def _after_batch(self, state: TrainerState) -> None:
        self._fits.after_batch(self._batches, state.global_step)

    def _fit(self, model: nn.Module, state: TrainerState, optimizer: Any) -> Fit:
        def losses_for(*, scaled: bool) -> TaskLosses:  # noqa: ARG001
            # The forward of a model that accelerate has prepared is in the precision of the training by itself.
            return lambda _, batches: self._losses(model, next(batches))

        return Fit(
            model=model,
            losses_for=losses_for,
            optimizers=[getattr(optimizer, "optimizer", optimizer)],  # accelerate's wrapper has no state of its own
            grad_scaler=getattr(optimizer, "scaler", None),
            resumed=state.global_step > 0,
            draws=True,
            total_steps=state.max_steps,
        )


class _RandomBatches:
    """Random batches of the training data; which ones depends on the seed, the step and the rank only.

    It stands for the batch wherever the core passes one on, so that none is read unless losses are asked for.
    """

    def __init__(self, loader: DataLoader[Any], args: TrainingArguments, state: TrainerState) -> None:
        self._loader, self._args, self._state = loader, args, state
        self._streamed = isinstance(loader.dataset, IterableDataset)
        self._step, self._passes = -1, 0
        self._batches: Iterator[Batch] = iter(())

    def __next__(self) -> Batch:
        if self._step != self._state.global_step and not self._streamed:
            self._step, self._passes, self._batches = self._state.global_step, 0, iter(())
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self._another_pass())
            batch = next(self._batches)
        return send_to_device(batch, self._args.device)

    def _another_pass(self) -> DataLoader[Any]:
        at = (self._args.seed, self._step + 1, self._args.process_index, self._passes)
        self._passes += 1
        seed = int(np.random.SeedSequence(at).generate_state(1)[0])
        return DataLoader(
            self._loader.dataset,
            batch_size=self._args.train_batch_size,
            shuffle=None if self._streamed else True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=self._loader.collate_fn,
        )


def _check_arguments(args: TrainingArguments, one_shot: bool) -> None:
    if args.fsdp or args.deepspeed:
        raise ValueError("args: must keep whole weights on every rank, found fsdp or deepspeed; use neither")
    if args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "args: restore_callback_states_from_checkpoint must be False, found True: the Trainer would make a new "
            "callback without its losses; this one takes its state from the checkpoint by itself"
        )
    if one_shot and args.fp16:
        raise ValueError(
            "args: fp16 must be False with mode='static' and 'pretrained', found True: without a scale, half "
            "precision gradients vanish; use bf16, or prune before the training with disparse_static or "
            "disparse_pretrained"
        )


def _encoded(state: Mapping[str, Any]) -> str:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _decoded(text: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    return state
