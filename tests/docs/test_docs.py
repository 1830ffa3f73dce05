"""The documentation: its Python runs when pasted, its links lead somewhere, its pages are built alike."""

import importlib
import re

import pytest
import torch
from torch import distributed

import disparse_plugin
from places import ROOT

DOCS = ROOT / "docs"
GUIDES = sorted(DOCS.glob("guides/*.md"))
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = sorted([*GUIDES, *DOCS.glob("start/*.md")])
WRITTEN = [path for path in [*DOCS.glob("*.md"), *PAGES, *ROOT.glob("*.md")] if path.name != "structured_coverage.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^][]*]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"")
SETUP = re.compile(
    r"<details><summary>The model, the losses and the data of this page</summary>.*?</details>", re.DOTALL
)


def blocks_of(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run(blocks, page, namespace):
    for number, block in enumerate(blocks):
        code = compile(block, f"{page.name}, block {number}", "exec", dont_inherit=True)
        exec(code, namespace)


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
@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.stem)
def test_a_page_runs_from_its_first_line_with_nothing_injected(page):
    blocks = blocks_of(page)
    assert blocks, "a page without code, or with a fence that this test does not know"
    torch.manual_seed(0)
    run(blocks, page, {"__name__": "pasted"})


def test_all_guides_have_the_same_model():
    setups = {SETUP.search(page.read_text(encoding="utf-8"))[0] for page in [*GUIDES, CONTRIBUTING]}
    assert len(setups) == 1


@pytest.mark.parametrize("page", [*PAGES, DOCS / "questions.md"], ids=lambda page: page.stem)
def test_a_page_ends_with_what_next(page):
    last = page.read_text(encoding="utf-8").rsplit("\n## ", 1)[1]
    assert last.startswith("What next\n")
    assert LINK.search(last)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for found in LINK.finditer(text):
        target = found[1] or found[2]
        if "/generated/" not in target:  # pages of the reference, made with the site, which checks them
            assert (page.parent / target).exists(), target


def test_code_has_88_columns():
    for page in [*PAGES, CONTRIBUTING]:
        for block in blocks_of(page):
            assert max(map(len, block.splitlines())) <= 88, page.name


def test_the_notebook_is_the_first_page(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    page = DOCS / "start" / "first.md"
    wanted = importlib.import_module("notebook").notebook(page.read_text(encoding="utf-8"))
    assert page.with_suffix(".ipynb").read_text(encoding="utf-8") == wanted, "run python docs/notebook.py"


def test_one_version_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.search(r'^date-released: "(.*)"$', citation, re.MULTILINE)
    assert f"\nversion: {disparse_plugin.__version__}\n" in citation
    assert f"\n## [{disparse_plugin.__version__}] - {released[1]}\n" in changelog


def test_the_picture_of_the_percentiles_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    picture = importlib.import_module("percentiles")
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "percentiles.png")
    picture.main()
    assert (tmp_path / "percentiles.png").stat().st_size > 10_000
