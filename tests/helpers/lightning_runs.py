"""A LightningModule of four tasks, and short runs of it; as a script, a run on two processes: ``FOLDER MODE``."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from callback_modes import EXCLUDED, MODES
from disparse_plugin import prunable_parameters
from disparse_plugin.lightning import DiSparsePruning, match_masks
from networks import PartlyShared, square_losses, vectors
from runs import masks_of

BATCHES = 4


class FourTasks(LightningModule):
    """Adam, because its states must reach the right tensors after a resume; ``attn_mask`` is not a pruning mask."""

    def __init__(self, seed=0, momentum=True):
        super().__init__()
        torch.manual_seed(seed)
        self.net = PartlyShared()
        self.register_buffer("attn_mask", torch.ones(2, 2))
        self.momentum = momentum
        self.seen, self.losses_of_a = [], []

    def task_losses(self, batch):
        losses = square_losses(self.net, batch)
        self.log("loss_of_a", losses["a"])
        return losses

    def training_step(self, batch, _):
        self.seen.append(float(batch.sum()))
        losses = self.task_losses(batch)
        self.losses_of_a.append(float(losses["a"]))
        return sum(losses.values())

    def test_step(self, batch):
        self.log("loss_of_d", square_losses(self.net, batch)["d"])

    def configure_optimizers(self):
        kind = torch.optim.Adam if self.momentum else torch.optim.SGD
        return kind(self.parameters(), lr=0.05)


class Loadable(FourTasks):
    """What the guide tells to write for ``load_from_checkpoint``."""

    def on_load_checkpoint(self, checkpoint):
        match_masks(self, checkpoint["state_dict"])


class Watch(Callback):
    """Remember the masks at the start of the training."""

    def on_train_start(self, trainer, module):
        self.first = masks_of(module)


class Sparsities(Logger):
    """Remember the sparsity that was logged at each step."""

    name, version = "sparsities", 0

    def __init__(self):
        super().__init__()
        self.values = []

    def log_metrics(self, metrics, step=None):
        self.values += [round(metrics["sparsity"], 3)] if "sparsity" in metrics else []

    def log_hyperparams(self, *_):
        pass


def pruning(mode, amount=0.5, **options):
    return DiSparsePruning(mode, amount, exclude=EXCLUDED, **{**MODES[mode], **options})


def trainer(folder, *callbacks, **options):
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    options = {**quiet, "accelerator": "cpu", "max_epochs": 2, "default_root_dir": folder, **options}
    return Trainer(callbacks=list(callbacks), **options)


def loader(**options):
    return DataLoader(vectors(BATCHES), batch_size=None, **options)


def fit(folder, module, *callbacks, ckpt_path=None, data=None, **options):
    trained = trainer(folder, *callbacks, **options)
    trained.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return trained


def keys(module):
    return prunable_parameters(module, exclude=[module.net.unused])


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def half(module):
    total = sum(layer.in_features * layer.out_features for layer, _ in keys(module))
    return total, total - round(0.5 * total)


def sparsity(module):
    total, kept = half(module)
    return round(1 - kept / total, 3)


def main(folder, mode):
    torch.set_num_threads(1)
    module = FourTasks()
    data = DataLoader(torch.stack(vectors(2 * BATCHES)), batch_size=None)
    ranks = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    trained = fit(folder, module, pruning(mode), data=data, **ranks)
    torch.save({"masks": masks_of(module), "seen": module.seen}, Path(folder) / f"{trained.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
