"""
Segmentation and an image label with SMP
========================================

Prune an SMP Unet with two outputs, a mask and an image label, and look at the masks of the dense and the pruned models.

Real photographs that ship inside the scikit-image and scikit-learn wheels; nothing is downloaded. The labels are made
here, and simple on purpose: the mask is the brighter side of Otsu's threshold of the whole picture (a classical
threshold, not a human annotation), and the image label says which picture a crop was taken from. Crops for training
come from the left 70 % of each picture, crops for testing from the rest. The numbers show that the pruned network still
works on both tasks; they are no benchmark.

No download; a minute and a half on a free CPU core:

    python examples/smp_two_task.py
    python examples/smp_two_task.py --decoder FPN --encoder mobilenet_v2 --amount 0.8
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from pathlib import Path

import torch
from skimage import data, filters
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from disparse_plugin import disparse_pretrained, fold, joint, sparsity_report

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


def train(model: nn.Module, batches: list[Batch], lr: float, name: str) -> None:
    """Train on both tasks for one pass over the batches."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    for batch in tqdm(batches, desc=name, leave=False):
        optimizer.zero_grad()
        sum(losses(model, batch).values()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch) -> tuple[float, float, Tensor]:
    """Return the mask's intersection over union, the label's accuracy, and the predicted masks."""
    images, masks, labels = batch
    mask_logits, label_logits = model.eval()(images)
    predicted, actual = mask_logits > 0, masks > 0.5
    iou = (predicted & actual).sum() / (predicted | actual).sum()
    return float(iou), float((label_logits.argmax(1) == labels).float().mean()), predicted


def draw(path: Path, batch: Batch, predicted: dict[str, Tensor], columns: int = 7) -> None:
    """Show one test crop of every photograph, its mask, and the masks of all models."""
    from matplotlib.figure import Figure

    images, masks, labels = (part.cpu() for part in batch)
    shown = [int((labels == label).nonzero()[0]) for label in range(columns) if (labels == label).any()]
    rows = {"photograph": images.permute(0, 2, 3, 1), "wanted": masks[:, 0]}
    rows |= {name: found[:, 0].cpu().float() for name, found in predicted.items()}
    figure = Figure(figsize=(1.25 * len(shown), 1.3 * len(rows)), dpi=120, layout="constrained")
    for line, (name, pictures) in zip(figure.subplots(len(rows), len(shown), squeeze=False), rows.items(), strict=True):
        for axes, place in zip(line, shown, strict=True):
            axes.imshow(pictures[place].numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    figure.savefig(path)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", default="Unet", help="any SMP architecture that takes aux_params (default: Unet)")
    parser.add_argument("--encoder", default="resnet18", help="any SMP encoder (default: resnet18)")
    parser.add_argument("--weights", default=None, help="encoder weights to download, e.g. imagenet (default: none)")
    parser.add_argument("--amount", type=float, default=0.9, help="fraction of the weights to prune (default: 0.9)")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of crops, weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for smp_two_task.png (default: this one)")
    parser.add_argument("--quick", action="store_true", help="a few small steps only, to see that it runs")
    return parser.parse_args()


def main() -> None:
    """Train, prune per task and by the summed loss, fine-tune; print and draw what becomes of both tasks."""
    options, start = read_options(), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    steps, size = (2, 32) if options.quick else (60, 64)
    torch.manual_seed(options.seed)
    generator, pictures = torch.Generator().manual_seed(options.seed), load_pictures()

    def crops(train: bool, count: int) -> Batch:
        batch = random_crops(pictures, train, count, size, generator)
        return tuple(part.to(options.device) for part in batch)

    dense = getattr(smp, options.decoder)(
        options.encoder, encoder_weights=options.weights, classes=1, aux_params={"classes": len(PICTURES)}
    ).to(options.device)
    test = crops(train=False, count=128)
    train(dense, [crops(train=True, count=8) for _ in range(steps)], 1e-3, "dense")
    data = [crops(train=True, count=8) for _ in range(8)]
    more = [crops(train=True, count=8) for _ in range(steps // 2)]

    predicted = {}
    print(f"{'':14}{'mask IoU':>10}{'label':>10}")
    for name, seen in {"dense": None, "summed loss": joint(losses), "DiSparse": losses}.items():
        model = copy.deepcopy(dense)
        scores = disparse_pretrained(model.eval(), seen, data, options.amount) if seen else None
        train(model, more, 1e-3, name)
        iou, accuracy, predicted[name] = evaluate(model, test)
        print(f"{name:14}{iou:10.1%}{accuracy:10.1%}", flush=True)
    draw(options.out / "smp_two_task.png", test, predicted)
    report = str(sparsity_report(model, scores)).splitlines()
    rule = next(number for number, line in enumerate(report) if line.startswith("---"))
    print("", report[0], *report[rule + 1 :], sep="\n")  # the parts; the layers are many
    fold(model)  # a plain model again, with zeros
    print(f"\n{time.perf_counter() - start:.0f} s in all; picture: {options.out / 'smp_two_task.png'}")
    if options.quick:
        print("A quick run only shows that the script works: its figures mean nothing.")


if __name__ == "__main__":
    main()
