"""The page of questions quotes real messages: each of them is provoked here, and all that it quotes are."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from disparse_plugin import DiSparseStatic, disparse_pretrained, score_tasks
from disparse_plugin.sparse_training import DiSparseScheduler
from places import ROOT

PAGE = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^\*\*`([^`]+)`\*\*$", PAGE, re.MULTILINE)
DATA = [(torch.linspace(-1, 1, 32).view(4, 8), torch.arange(4) % 2, torch.ones(4, 1))] * 3


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 1)

    def forward(self, x):
        features = self.trunk(x).tanh()
        return self.a(features), self.b(features)


def losses(model, batch):
    a, b = model(batch[0])
    return {"a": F.cross_entropy(a, batch[1]), "b": F.mse_loss(b, batch[2])}


def output(model, batch):
    return model(batch[0])[1]


def nothing_to_learn(model, batch):
    return {"a": torch.cat(model(batch[0]), 1).mean() * 0}


def pruned():
    model = TwoHeads()
    disparse_pretrained(model, losses, DATA, 0.5)
    return model


def with_adafactor():
    model = TwoHeads()
    DiSparseScheduler(model, torch.optim.Adafactor(model.parameters()), losses, amount=0.5, stop_at=8)


MISTAKES = {
    "not reduced": lambda: score_tasks(TwoHeads(), lambda *args: {"a": output(*args).flatten()}, DATA),
    "no mapping": lambda: score_tasks(TwoHeads(), lambda *args: output(*args).mean(), DATA),
    "detached": lambda: score_tasks(TwoHeads(), lambda *args: {"a": output(*args).mean().detach()}, DATA),
    "not finite": lambda: score_tasks(TwoHeads(), lambda *args: {"a": output(*args).mean() * torch.nan}, DATA),
    "too few batches": lambda: score_tasks(TwoHeads(), losses, DATA, num_batches=9),
    "no scores": lambda: prune.global_unstructured([(TwoHeads().trunk, "weight")], DiSparseStatic, amount=0.5),
    "unknown criterion": lambda: disparse_pretrained(TwoHeads(), losses, DATA, 0.5, criterion="tailor"),
    "unknown optimizer": with_adafactor,
    "copy": lambda: copy.deepcopy(pruned()),
    "fresh model": lambda: TwoHeads().load_state_dict(pruned().state_dict()),
    "zeros": lambda: score_tasks(TwoHeads(), nothing_to_learn, DATA),  # a warning
}


def message(mistake):
    with pytest.raises((ValueError, TypeError, RuntimeError, UserWarning)) as caught:
        MISTAKES[mistake]()
    return str(caught.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_page_explains_the_message(mistake):
    text = message(mistake)
    assert sum(quoted in text for quoted in QUOTED) == 1, text


@pytest.mark.filterwarnings("error")
def test_no_message_on_the_page_is_made_up():
    texts = [message(mistake) for mistake in MISTAKES]
    assert len(QUOTED) == len(set(QUOTED)) > 5
    for quoted in QUOTED:
        assert any(quoted in text for text in texts), quoted
