"""A model of four tasks as the Hugging Face Trainer wants it, and short trainings of it.

As a script, a training on two processes: ``FOLDER MODE``, by ``torch.distributed.run``.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from callback_modes import EXCLUDED, MODES
from client_runs import client, our_callback
from disparse_plugin import prunable_parameters
from disparse_plugin.masks import masks_of
from networks import PartlyShared, square_losses, vectors

EXAMPLES, SIZE = 16, 4
STEPS = EXAMPLES // SIZE  # of an epoch


class FourTasks(nn.Module):
    """``attn_mask`` is not a pruning mask; ``trained_on`` are the batches of the training, in their order."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = PartlyShared()
        self.register_buffer("attn_mask", torch.ones(2, 2))
        self.trained_on = []

    def forward(self, x):
        if self.training:
            self.trained_on.append(x)
        return {"loss": sum(square_losses(self.net, x).values())}


def pretrained_model():
    """The same network as a ``PreTrainedModel``; a class made when asked, because it needs transformers."""
    transformers = client("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "four_tasks"

    class FourTasksModel(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.net = PartlyShared()
            self.post_init()

        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight)

        def forward(self, x):
            return {"loss": sum(square_losses(self.net, x).values())}

    return FourTasksModel(Config())


class Losses:
    """The losses per task; ``scored_on`` are the batches that the callback drew."""

    def __init__(self):
        self.scored_on = []

    def __call__(self, model, batch):
        self.scored_on.append(batch["x"])
        return square_losses(model.net, batch["x"])


def callback(mode, amount=0.5, losses=None, **options):
    return our_callback().DiSparseTrainerCallback(
        losses or Losses(), mode, amount, **{"exclude": EXCLUDED, **MODES[mode], **options}
    )


def trainer(folder, model, *callbacks, model_init=None, **options):
    transformers = client("transformers")
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    plain = {"lr_scheduler_type": "constant", "learning_rate": 0.01, "max_grad_norm": 0, "remove_unused_columns": False}
    options = {**quiet, **plain, "use_cpu": True, "num_train_epochs": 3, "per_device_train_batch_size": SIZE, **options}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **options)
    data = [{"x": row} for row in torch.cat(vectors(EXAMPLES // 4))]
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data[:SIZE],
        model_init=model_init,
        callbacks=list(callbacks),
    )


def train(folder, model, *callbacks, resume=None, **options):
    trained = trainer(folder, model, *callbacks, **options)
    trained.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trained


def keys(model):
    return prunable_parameters(model, exclude=[model.net.unused])


def half(model):
    total = sum(layer.in_features * layer.out_features for layer, _ in keys(model))
    return total, total - round(0.5 * total)


def main(folder, mode):
    torch.set_num_threads(1)
    model = FourTasks()
    trained = train(folder, model, callback(mode), ddp_backend="gloo", ddp_find_unused_parameters=True)
    state = {"masks": masks_of(model), "trained_on": model.trained_on}
    torch.save(state, Path(folder) / f"{trained.args.process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
