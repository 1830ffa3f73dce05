"""
Segmentation and an image label with SMP
========================================

Prune an SMP Unet with two outputs, a mask and an image label, in three lines.

Real photographs that ship inside the scikit-image and scikit-learn wheels; nothing is downloaded. The labels are made
here, and simple on purpose: the mask is the brighter side of Otsu's threshold of the whole picture (a classical
threshold, not a human annotation), and the image label says which picture a crop was taken from. Crops for training
come from the left 70 % of each picture, crops for testing from the rest. The numbers show that the pruned network still
works on both tasks; they are no benchmark.

    python examples/smp_two_task.py
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from skimage import data, filters
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from disparse_plugin import DiSparsePretrained, layer_adaptive, score_tasks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SMP's imports announce deprecations of their own
    import segmentation_models_pytorch as smp

PICTURES = {
    "astronaut": data.astronaut,
    "cat": data.chelsea,
    "coffee": data.coffee,
    "rocket": data.rocket,
    "retina": lambda: data.retina()[::3, ::3],
    "china": lambda: load_sample_image("china.jpg"),
    "flower": lambda: load_sample_image("flower.jpg"),
}
Batch = tuple[Tensor, Tensor, Tensor]


def load_pictures() -> list[tuple[Tensor, Tensor]]:
    """Return ``(image, mask)`` for every picture: float (3, H, W) and (1, H, W)."""
    pictures = []
    for load in PICTURES.values():
        image = torch.from_numpy(load().copy()).permute(2, 0, 1).float() / 255
        grey = image.mean(0)
        pictures.append((image, (grey > filters.threshold_otsu(grey.numpy())).float()[None]))
    return pictures


def random_crops(
    pictures: list[tuple[Tensor, Tensor]], train: bool, count: int, size: int, generator: torch.Generator
) -> Batch:
    """Cut ``count`` crops from the left 70 % (train) or the right 30 % (test) of random pictures."""
    images, masks, labels = [], [], []
    for label in torch.randint(len(pictures), (count,), generator=generator).tolist():
        image, mask = pictures[label]
        height, width = image.shape[1:]
        border = int(0.7 * width)
        first, last = (0, border - size) if train else (border, width - size)
        top = int(torch.randint(height - size + 1, (), generator=generator))
        left = int(torch.randint(first, last + 1, (), generator=generator))
        images.append(image[:, top : top + size, left : left + size])
        masks.append(mask[:, top : top + size, left : left + size])
        labels.append(label)
    return torch.stack(images), torch.stack(masks), torch.tensor(labels)


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Run the model once and return one loss per task: all that DiSparse needs to know about the model."""
    images, masks, labels = batch
    mask_logits, label_logits = model(images)
    return {
        "mask": F.binary_cross_entropy_with_logits(mask_logits, masks),
        "label": F.cross_entropy(label_logits, labels),
    }


def train(model: nn.Module, batches: list[Batch], lr: float) -> None:
    """Train on both tasks for one pass over the batches."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    for batch in batches:
        optimizer.zero_grad()
        sum(losses(model, batch).values()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch) -> str:
    """Return the mask's intersection over union and the label's accuracy."""
    images, masks, labels = batch
    mask_logits, label_logits = model.eval()(images)
    predicted, actual = mask_logits > 0, masks > 0.5
    iou = (predicted & actual).sum() / (predicted | actual).sum()
    accuracy = (label_logits.argmax(1) == labels).float().mean()
    return f"mask IoU {100 * iou:5.1f} %   label accuracy {100 * accuracy:5.1f} %"


def print_sparsity(model: nn.Module) -> None:
    """Print shape and sparsity of a few layers, and the sparsity of each part."""
    pruned = {name: module for name, module in model.named_modules() if hasattr(module, "weight_mask")}
    for name in [*list(pruned)[:2], *list(pruned)[-2:]]:
        mask = pruned[name].weight_mask
        print(f"  {name:32} {tuple(mask.shape)!s:20} {100 * (1 - mask.mean()):6.2f} % sparse")
    for part, _ in [*model.named_children(), ("", model)]:
        masks = [module.weight_mask for name, module in pruned.items() if name.startswith(part)]
        zeros, total = sum(int((mask == 0).sum()) for mask in masks), sum(mask.numel() for mask in masks)
        print(f"  {part or 'all':32} {total:>20,} {100 * zeros / total:6.2f} % sparse")


def main() -> None:
    """Train, prune to 90 %, fine-tune; print what happens to both tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", default="Unet", help="any SMP architecture that takes aux_params (default: Unet)")
    parser.add_argument("--encoder", default="resnet18", help="any SMP encoder (default: resnet18)")
    parser.add_argument("--weights", default=None, help="encoder weights to download, e.g. imagenet (default: none)")
    parser.add_argument("--amount", type=float, default=0.9, help="fraction of the weights to prune (default: 0.9)")
    parser.add_argument(
        "--steps", type=int, default=60, help="training steps; half as many after pruning (default: 60)"
    )
    parser.add_argument("--size", type=int, default=64, help="side of a crop in pixels (default: 64)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    pictures, start = load_pictures(), time.perf_counter()

    def crops(train: bool, count: int) -> Batch:
        batch = random_crops(pictures, train, count, options.size, generator)
        return tuple(part.to(options.device) for part in batch)

    model = getattr(smp, options.decoder)(
        options.encoder, encoder_weights=options.weights, classes=1, aux_params={"classes": len(PICTURES)}
    ).to(options.device)
    test = crops(train=False, count=128)
    train(model, [crops(train=True, count=8) for _ in range(options.steps)], lr=1e-3)
    print(f"dense             {evaluate(model, test)}")

    calibration = [crops(train=True, count=8) for _ in range(8)]
    model.eval()
    scores = score_tasks(model, losses, calibration, criterion=layer_adaptive("taylor"))
    prune.global_unstructured(
        scores.parameters, DiSparsePretrained, importance_scores=scores.importance(), amount=options.amount
    )

    print(f"pruned            {evaluate(model, test)}")
    train(model, [crops(train=True, count=8) for _ in range(options.steps // 2)], lr=1e-3)
    print(f"pruned, fine-tuned {evaluate(model, test)}")
    print_sparsity(model)
    for module, name in scores.parameters:
        prune.remove(module, name)  # a plain model again, with zeros
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
