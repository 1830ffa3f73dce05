"""The script for a machine with a GPU works where there is none, small, section by section."""

import json

import pytest

import gpu
import gpu_table


@pytest.mark.slow
def test_the_script_runs_without_a_card(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["masks that differ from the CPU's"] == "none"
    assert found["2 tasks: scoring / floor"] > 0
    assert found["one gloo rank: weights exchanged"] > 0
    assert all(f"| {name} |" in capsys.readouterr().out for name in ("device",))


def test_a_section_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys):
    def broken(bench):
        raise RuntimeError("no such card")

    sections = (("first", broken, 1, None), ("second", lambda bench: {"found": 1.5}, 1, None))
    sections += (("third", broken, 1, "no_such_package"), ("fourth", broken, 1e9, None))
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    with pytest.raises(SystemExit, match="sections that failed: first"):
        gpu.main(["--device", "cpu"])
    printed = capsys.readouterr().out
    assert "| first | failed: RuntimeError: no such card |" in printed
    assert "| found | 1.5 |" in printed
    assert "| third | left out: no_such_package is not installed |" in printed
    assert "| fourth | left out: " in printed


def test_the_page_shows_what_the_two_runs_found():
    page = gpu_table.PAGE.read_text(encoding="utf-8")
    assert gpu_table.written(page) == page
