"""
A Hugging Face text model with two heads
========================================

Prune a BERT with a head for the whole text and one for every word.

The text is made up: sentences of 16 words out of 60. *Order* asks whether the first "a" comes before the first "b";
*repeats* asks of every word whether it was there before. The model is a tiny BERT with random weights; nothing is
downloaded. The embeddings stay whole; all linear layers are pruned to 95 %.

A minute of one CPU core; needs ``pip install -e '.[examples,transformers]'``:

    python examples/text_two_heads.py
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange
from transformers import BertConfig, BertModel

from disparse_plugin import disparse_pretrained, joint, sparsity_report

WORDS, LENGTH, AMOUNT = 60, 16, 0.95
A, B = 0, 1
Batch = dict[str, Tensor]


class TwoHeads(nn.Module):
    """A text model of transformers and two linear heads: what a script of one's own looks like."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
        self.text = BertModel(config, add_pooling_layer=False)
        self.order, self.repeats = nn.Linear(64, 2), nn.Linear(64, 2)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the sentence, and those of each word."""
        states = self.text(input_ids=input_ids).last_hidden_state
        return self.order(states.mean(1)), self.repeats(states)


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """One loss per task."""
    order, repeats = model(batch["input_ids"])
    return {
        "order": F.cross_entropy(order, batch["order"]),
        "repeats": F.cross_entropy(repeats.flatten(0, 1), batch["repeats"].flatten()),
    }


def sentences(count: int, generator: torch.Generator, device: torch.device) -> Batch:
    """Make up sentences in which both "a" and "b" occur, with the answers of both tasks."""
    words = torch.randint(2, WORDS // 3, (count, LENGTH), generator=generator)
    places = torch.rand(count, LENGTH, generator=generator).argsort(1)[:, :2]
    words.scatter_(1, places, torch.tensor([[A, B]]).expand(count, 2))
    same = words[:, :, None] == words[:, None, :]
    repeats = (same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)).any(2).long()
    batch = {"input_ids": words, "order": (places[:, 0] < places[:, 1]).long(), "repeats": repeats}
    return {name: value.to(device) for name, value in batch.items()}


def train(model: nn.Module, steps: int, seed: int, device: torch.device, name: str) -> None:
    """Train on the sum of the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in trange(steps, desc=name, leave=False):
        optimizer.zero_grad()
        sum(losses(model, sentences(64, generator, device)).values()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def test(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return the share of right answers of both tasks."""
    order, repeats = model.eval()(batch["input_ids"])
    return {
        "order": float((order.argmax(1) == batch["order"]).float().mean()),
        "repeats": float((repeats.argmax(2) == batch["repeats"]).float().mean()),
    }


def draw(path: Path, found: dict[str, dict[str, float]]) -> None:
    """Show both tasks as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for shift, task, color in ((-0.2, "order", "#0072B2"), (0.2, "repeats", "#E69F00")):
        places = [place + shift for place in range(len(found))]
        bars = axes.bar(places, [100 * each[task] for each in found.values()], 0.38, color=color, label=task)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(found)), list(found))
    axes.set(ylim=(40, 105), ylabel="right answers, %", xlabel=f"{AMOUNT:.0%} of the weights pruned")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=2, loc="outside upper center")
    figure.savefig(path)


def main() -> None:
    """Train, prune in four ways, tune, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for text_two_heads.png (default: this one)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    steps, tune = (2, 2) if options.quick else (700, 150)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    testing = sentences(2000, generator, options.device)
    scored = [sentences(64, generator, options.device) for _ in range(8)]
    dense = TwoHeads().to(options.device)
    train(dense, steps, options.seed, options.device, "dense")

    ways: dict[str, tuple[Any, dict[str, str]]] = {
        "per task": (losses, {}),
        "summed loss": (joint(losses), {}),
        "LAMP": (joint(losses), {"criterion": "lamp"}),
        "magnitude": (joint(losses), {"criterion": "magnitude"}),
    }
    found = {"dense": test(dense, testing)}
    for name, (seen, criterion) in ways.items():
        model = copy.deepcopy(dense).eval()
        scores = disparse_pretrained(model, seen, scored, AMOUNT, **criterion)
        train(model, tune, options.seed + 1, options.device, name)
        found[name] = test(model, testing)
        if name == "per task":
            print(sparsity_report(model, scores), end="\n\n")
    print(f"{'':16}{'order':>10}{'repeats':>10}")
    for name, right in found.items():
        print(f"{name:16}{right['order']:10.1%}{right['repeats']:10.1%}")
    draw(options.out / "text_two_heads.png", found)
    print(f"\n{time.perf_counter() - start:.0f} s in all; picture: {options.out / 'text_two_heads.png'}")
    if options.quick:
        print("A quick run only shows that the script works: its figures mean nothing.")


if __name__ == "__main__":
    main()
