"""The script that tells how masks grow with weights and tasks."""

import pytest

import scaling
from places import ROOT


@pytest.mark.slow
def test_the_script_runs_small(tmp_path, capsys):
    scaling.main(["--quick", "--out", str(tmp_path / "scaling.json")])
    printed = capsys.readouterr().out
    assert all(f"| {call} | 2 | 30,000 |" in printed for call in scaling.CALLS)
    assert printed.endswith("its figures mean nothing.\n")


def test_every_script_says_what_the_figures_of_a_quick_run_are_worth():
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")]
    assert len([text for text in scripts if '"--quick"' in text]) > 5
    assert all("    say_if_quick(" in text for text in scripts if '"--quick"' in text)


def test_what_has_run_is_not_run_again_and_the_page_shows_it(tmp_path, monkeypatch):
    cases = [
        {
            "network": network,
            "weights": 10**6,
            "tasks": 2,
            "call": call,
            "seconds": 0.5,
            "reached": 10**7,
            "bytes": 10**7,
        }
        for network, call in (("drawn", "masks"), ("drawn", "mean"), ("vit", "masks"))
    ]
    monkeypatch.setattr(scaling.subprocess, "run", None)
    out = tmp_path / "kept.json"
    wanted = [("drawn", 10**6, 2, "mean"), ("vit", 0, 2, "masks")]
    assert scaling.run(wanted, cases, out) is cases
    assert not out.exists()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    scaling.write_page(cases, page)
    written = page.read_text()
    assert written.startswith("before")
    assert written.endswith("after\n")
    assert "old" not in written
    assert "| mean | 2 | 1,000,000 | 0.50 | 50 | 10.0 | n^1.00 | 500 s, 9 GiB |" in written
    assert "| vit | 2 | 1,000,000 | masks | 0.50 | 50 | 10.0 |" in written


def test_the_growth_law_is_that_of_the_figures():
    cases = [{"weights": weights, "seconds": 3e-9 * weights**1.5} for weights in (10**6, 10**7, 10**8)]
    exponent, at_a_billion = scaling.law(cases, "seconds")
    assert exponent == pytest.approx(1.5)
    assert at_a_billion == pytest.approx(3e-9 * 1e9**1.5)


def test_the_scores_are_those_of_a_trunk_and_a_head_for_each_task():
    scores = scaling.scores_of(9_000_000, 2)
    assert sum(module.weight.numel() for module, _ in scores.parameters) == 9_000_000
    assert [len(scores.tasks_reaching(*key)) for key in scores.parameters] == [2, 2, 1, 1]
