"""Every Python block of the documentation runs as it stands, one page after the other from top to bottom."""

import importlib
import re

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

import disparse_plugin
from places import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("guides/*.md"), DOCS / "index.md", DOCS.parent / "CONTRIBUTING.md"])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class DepthAndLabel(nn.Module):
    """The model that the pages call ``model``: a trunk with a map and a vector as outputs."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.depth, self.label = nn.Conv2d(8, 1, 1), nn.Linear(8, 4)

    def forward(self, x):
        features = self.trunk(x)
        return self.depth(features), self.label(features.mean((2, 3)))


def losses(model, batch):
    depth, logits = model(batch["image"])
    return {"depth": F.l1_loss(depth, batch["depth"]), "label": F.cross_entropy(logits, batch["label"])}


def what_a_reader_has():
    """Names that the pages take for granted, as they say in the text."""
    model = DepthAndLabel()
    loader = [
        {"image": torch.randn(4, 3, 8, 8), "depth": torch.rand(4, 1, 8, 8), "label": torch.arange(4)} for _ in range(16)
    ]
    return {
        "model": model,
        "build": DepthAndLabel,
        "losses": losses,
        "loader": loader,
        "example_inputs": loader[0]["image"],
        "optimizer": torch.optim.Adam(model.parameters()),
    }


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    """What torchrun sets for a single process."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks, "a page without code, or with a fence that this test does not know"
    namespace = what_a_reader_has()
    for number, block in enumerate(blocks):
        code = compile(block, f"{page.name}, block {number}", "exec", dont_inherit=True)
        exec(code, namespace)


def test_one_version_everywhere():
    citation = (DOCS.parent / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (DOCS.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.search(r'^date-released: "(.*)"$', citation, re.MULTILINE)
    assert f"\nversion: {disparse_plugin.__version__}\n" in citation
    assert f"\n## [{disparse_plugin.__version__}] - {released[1]}\n" in changelog


def test_the_picture_of_the_percentiles_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    picture = importlib.import_module("percentiles")
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "percentiles.png")
    picture.main()
    assert (tmp_path / "percentiles.png").stat().st_size > 10_000
