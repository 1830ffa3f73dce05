"""The README: short, its script runs and prints what it says, its numbers and links are right, here and on an index."""

import contextlib
import importlib.util
import io
import re
import tomllib

import pytest

from places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DIFF = re.search(r"^```diff\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[1]
PRINTED = re.search(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[1]
NUMBER = re.compile(r"\d+\.\d+")


def test_it_can_be_read_at_once():
    assert len(README.splitlines()) <= 150
    assert max(map(len, DIFF.splitlines())) <= 88


def test_its_script_prints_what_it_says():
    script = "\n".join(line[1:] for line in DIFF.splitlines())
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(script, "README.md", "exec", dont_inherit=True), {"__name__": "__main__"})
    lines, wanted = out.getvalue().splitlines(), PRINTED.splitlines()
    assert [NUMBER.sub("", line) for line in lines] == [NUMBER.sub("", line) for line in wanted]
    for line, other in zip(lines, wanted, strict=True):  # other machines add up in another order
        (right, off), (right_there, off_there) = (map(float, NUMBER.findall(text)) for text in (line, other))
        assert right == pytest.approx(right_there, abs=8), line
        assert off == pytest.approx(off_there, abs=0.4), line


def test_without_the_added_lines_it_is_the_script_that_was_there_before():
    before = "\n".join(line[1:] for line in DIFF.splitlines() if line[0] != "+")
    assert "disparse" not in before
    compile(before, "README.md", "exec")
    assert all(line[0] in " +" for line in DIFF.splitlines())


def test_its_numbers_are_those_of_the_first_page():
    page = (ROOT / "docs" / "start" / "first.md").read_text(encoding="utf-8")
    shown = {
        name: NUMBER.search(line)[0] for name, line in re.findall(r"^([\w ]+?)  +(side [\d.]+%.*)$", page, re.MULTILINE)
    }
    others = re.search(r"By the summed loss ([\d.]+) % .* by LAMP ([\d.]+) %, by magnitude ([\d.]+) %", README)
    assert others.groups() == (shown["summed loss"], shown["LAMP"], shown["magnitude"])
    assert NUMBER.findall(PRINTED)[::2] == [shown["dense"], shown["per task"]]


def test_its_table_comes_from_the_stored_runs():
    results = ROOT / "benchmarks" / "results"
    if not results.exists():
        pytest.skip("the sdist has no results")
    from long_regime_tables import BASELINES, DEFAULT, STAGES, TUNED_AT
    from multitask.report import long_overview
    from multitask.report.results import load

    every, fresh = load(results / "long"), load(results / "fresh")
    staged = long_overview.run_in_stages(every, fresh, STAGES)
    assert long_overview.in_short(every, DEFAULT, BASELINES[:4], TUNED_AT, staged, STAGES) in README


def test_the_commands_are_two():
    commands = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert [command.rstrip().rsplit("&& ", 1)[1] for command in commands] == [
        "python examples/quickstart.py",
        "python -m pytest -n 2 --dist worksteal",
    ]


def test_its_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set(re.findall(r"'\.\[(\w+)]'", README))
    assert named <= set(project["optional-dependencies"])
    assert {"structured", "lightning", "examples", "test"} <= named


def test_on_a_package_index_every_link_is_absolute():
    spec = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    text = setup.absolute(README, "https://example.org/x")
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
    assert all(link.startswith("https://") for link in links)
    assert "(https://example.org/x/blob/HEAD/docs/method.md)" in text
    assert 'src="https://example.org/x/raw/HEAD/docs/images/hero-light.png"' in text
