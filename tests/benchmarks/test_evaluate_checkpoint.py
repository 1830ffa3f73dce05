"""A checkpoint of the authors, evaluated on an archive: by hand, on tiny files and a narrow network."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

import evaluate_checkpoint
from archive_files import SIZE, write_cityscapes, write_nyuv2
from disparse_plugin import prunable_parameters
from models.authors_checkpoint import AuthorsInput, authors_state
from models.paper_network import PaperNetwork
from multitask.data.disk import MEAN, SPREAD
from multitask.problem.dense_metrics import PaperIoU
from multitask.problem.tasks import IGNORE
from multitask.settings import SETTINGS

WRITE = {"nyuv2-archive": write_nyuv2, "cityscapes-archive": write_cityscapes}


@pytest.fixture
def narrow(monkeypatch):
    def network(problem):
        return PaperNetwork({task.name: task.outputs for task in problem.tasks}, width=4, hidden=8)

    for name in WRITE:
        monkeypatch.setitem(SETTINGS, name, replace(SETTINGS[name], network=network))


@pytest.mark.parametrize("name", WRITE)
def test_it_prints_every_metric(tmp_path, narrow, capsys, name):
    WRITE[name](tmp_path)
    problem = SETTINGS[name].load(tmp_path)
    network = SETTINGS[name].network(problem)
    prune.global_unstructured(prunable_parameters(network), prune.L1Unstructured, amount=0.9)
    torch.save(authors_state(network), tmp_path / "theirs.pth")
    files = ["--root", str(tmp_path), "--checkpoint", str(tmp_path / "theirs.pth")]
    evaluate_checkpoint.main(["--data", name, *files])
    found = json.loads(capsys.readouterr().out)
    assert found["masked"] == pytest.approx(0.9, abs=1e-3)
    for task in problem.tasks:
        assert task.better.keys() <= found[task.name].keys()
    assert 0 <= found["segmentation"]["miou"] <= found["segmentation"]["paper_miou"] <= 1


def test_their_networks_see_blue_first_less_their_means():
    colours = torch.rand(1, 3, *SIZE)
    ours = (colours - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(SPREAD).view(3, 1, 1)
    theirs = AuthorsInput(torch.nn.Identity(), MEAN, SPREAD)(ours)
    for place, (channel, mean) in enumerate(zip((2, 1, 0), (104.00698793, 116.66876762, 122.67891434), strict=True)):
        torch.testing.assert_close(theirs[:, place], colours[:, channel] * 255 - mean, rtol=1e-5, atol=1e-3)


def test_the_papers_mean_iou_leaves_out_what_is_never_right():
    target = torch.tensor([[[0, 0, 1, 2], [1, 1, 2, IGNORE]]])
    predicted = torch.tensor([[[0, 0, 1, 0], [1, 0, 0, 2]]])  # class 2 is lost
    metric = PaperIoU(3, IGNORE)
    metric.update(F.one_hot(predicted, 3).permute(0, 3, 1, 2).float(), target)
    assert float(metric.compute()["paper_miou"]) == pytest.approx(np.mean([2 / 5, 2 / 3]))
    metric.reset()
    metric.update(F.one_hot(torch.full_like(predicted, 2), 3).permute(0, 3, 1, 2).float(), target.clamp(max=1))
    assert float(metric.compute()["paper_miou"]) == 0
