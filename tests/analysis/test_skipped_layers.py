"""Controls of models that do not run every layer in every group of batches: experts, stochastic depth."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from disparse_plugin import score_tasks
from disparse_plugin.analysis import html_report, overlap_with_controls, own_masks

pytestmark = pytest.mark.filterwarnings("ignore:parameters. 1 of 5 are reached by no task:UserWarning")
GROUPS, AMOUNT = 4, 0.5


class Experts(nn.Module):
    """The sign of the inputs' mean chooses which of two layers runs after the first."""

    def __init__(self):
        super().__init__()
        self.first, self.low, self.high = (nn.Linear(8, 8) for _ in range(3))
        self.heads = nn.ModuleDict({task: nn.Linear(8, 3) for task in "ab"})

    def forward(self, x):
        hidden = self.first(x).relu()
        hidden = (self.high if x.mean() > 0 else self.low)(hidden).relu()
        return {task: head(hidden) for task, head in self.heads.items()}


def losses(model, batch):
    return {task: F.cross_entropy(out, batch[1]) for task, out in model(batch[0]).items()}


def batches(signs, each=2):
    """``each`` batches for each group, all of them to the expert of that sign."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 8, generator=generator) + sign, torch.randint(3, (6,), generator=generator))
        for sign in signs
        for _ in range(each)
    ]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Experts()


@pytest.mark.parametrize("signs", [(1, -1, 1, -1), (1, 1, -1, 1), (-1, 1, 1, 1), (1, 1, -1, -1)])
def test_halves_are_compared_in_what_both_have_run(model, signs):
    data = batches(signs)
    found = overlap_with_controls(model, losses, data, AMOUNT, groups=GROUPS)
    assert found.names == ("first.weight", "low.weight", "high.weight"), "in the order of the model"
    halves = [[batch for group in half for batch in data[2 * group : 2 * group + 2]] for half in ((0, 2), (1, 3))]
    one, other = (masks_of(model, half) for half in halves)
    for name, ceiling, across in zip(found.names, found.controls.ceiling, found.controls.across, strict=True):
        both = [task for task in "ab" if name in one[task] and name in other[task]]
        assert (len(ceiling.strata), len(across.strata)) == (len(both), len(both))
        assert [s.kept_by[2] for s in ceiling.strata] == [int((one[t][name] & other[t][name]).sum()) for t in both]
        crossed = [int((one[s][name] & other[t][name]).sum()) for s, t in ("ab", "ba") if both]
        assert [stratum.kept_by[2] for stratum in across.strata] == crossed
        assert math.isnan(ceiling.kappa) == (not both)


def masks_of(model, data):
    scores = score_tasks(model, losses, data)
    names = dict(zip(scores.parameters, scores.names, strict=True))
    return {
        task: {names[key]: mask for key, mask in table.items()} for task, table in own_masks(scores, AMOUNT).items()
    }


def test_what_is_not_compared_is_told_as_unknown(model, tmp_path):
    found = overlap_with_controls(model, losses, batches((1, -1, 1, -1)), AMOUNT, groups=GROUPS, resamples=5)
    assert np.isnan(found.controls.relative_agreement()).tolist()[1:] == [True, True]
    assert np.isnan(found.controls.resamples)[:, 1:].all()
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))["controls"]
    assert [layer["kappa"] for layer in told["ceiling"]][1:3] == [None, None]
    assert [layer.size for layer in found.controls.permuted] == [64, 64, 64]
    assert str(found).count(" - ") >= 2
    pytest.importorskip("matplotlib")
    assert html_report(tmp_path / "report.html", found).exists()
