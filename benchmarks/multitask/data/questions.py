"""Six questions about a piece of clothing and a digit in one picture, from easy to hard, large to small.

The pictures are those of Fashion+MNIST (:mod:`.digits`). Two tasks name what lies there, four ask for a yes or no that
follows from it: some can be answered from early features, some only by telling all classes apart.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..problem.problem import Problem
from ..problem.tasks import classification
from .digits import digits
from .splits import InMemory

# Yes, by the class: T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, boot; or the digit.
QUESTIONS = {
    "shoe": ("fashion", (5, 7, 9)),
    "sleeves": ("fashion", (0, 2, 4, 6)),
    "loop": ("digit", (0, 6, 8, 9)),
    "odd": ("digit", (1, 3, 5, 7, 9)),
}
NAMED = {"garment": "fashion", "digit": "digit"}


def questions(root: str | Path, *, size: int = 28, validation: int | None = 3000) -> Problem:
    """Load the six tasks.

    Args:
        root: As in :func:`.digits.digits`.
        size: As there.
        validation: As there.

    Returns:
        Two tasks of ten classes, ``garment`` and ``digit``, and four of two: ``shoe``, ``sleeves``, ``loop``, ``odd``.
    """
    pictures = digits("fashion+mnist", root, size=size, validation=validation)
    splits = {name: _asked(getattr(pictures, name)) for name in ("train", "validation", "test")}
    tasks = (
        *(classification(name, 10) for name in NAMED),
        *(classification(name, 2) for name in QUESTIONS),
    )
    return replace(pictures, name="questions", tasks=tasks, **splits)


def _asked(split: InMemory) -> InMemory:
    targets = {name: split.targets[source] for name, source in NAMED.items()}
    for name, (source, yes) in QUESTIONS.items():
        targets[name] = _among(split.targets[source], yes)
    return InMemory(split.inputs, targets, split.mean.flatten(), split.spread.flatten())


def _among(classes: Tensor, yes: tuple[int, ...]) -> Tensor:
    """Return 1 where the class is one of these, else 0: int64."""
    return sum((classes == each).long() for each in yes)  # type: ignore[return-value]  # yes is never empty
