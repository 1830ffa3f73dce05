"""Tables that fit the terminal, notebooks and pandas, whatever the names are."""

import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disparse_plugin import sparsity_report
from disparse_plugin._support.text_table import Table, draw, readable
from disparse_plugin.analysis import GradientConflict, task_overlap
from disparse_plugin.structured import RemovalPlan, RemovalReport
from disparse_plugin.structured.report import Change, PartChange
from layouts import build
from networks import TwoHeads


def tasks_of(count):
    """An overlap and a sparsity report of so many tasks, each of which has a layer of its own beside three shared."""
    names = [f"a task with quite a long name, number {number}" for number in range(count)]
    tables = {name: {0: [1, 2, 3], 1: [3, 2, 1], 3 + k: [1]} for k, name in enumerate(names)}
    for name in names[:3]:
        tables[name][2] = [1, 2]
    model, scores = build(tables, [3, 3, 2, *[1] * count])
    return task_overlap(scores, 0.5), sparsity_report(model, scores)


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("count", [2, 5, 14])
def test_no_table_is_wider_than_the_terminal(columns, count, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for report in tasks_of(count):
        assert max(map(len, str(report).splitlines())) <= columns


def test_many_tasks_are_counted_and_not_listed():
    report = tasks_of(14)[1]
    used = {line.split("  ")[0]: line for line in str(report).splitlines()}
    assert "all 14" in used["0.weight"]
    assert "3 of 14" in used["2.weight"]
    assert next(iter(report.parts)).count(" + ") == 13  # the report itself knows their names
    assert "a + b" in str(sparsity_report(*named_two()))


def named_two():
    return build({"a": {0: [1, 2]}, "b": {0: [2, 1]}}, [2])


def test_parts_of_as_many_tasks_stay_apart():
    names = [f"a long name {number}" for number in range(5)]
    tables = {name: {0: [1]} for name in names}
    for index, group in ((1, names[:3]), (2, names[1:4]), (3, names[2:])):
        for name in group:
            tables[name][index] = [1]
    lines = str(sparsity_report(*build(tables, [1] * 4))).splitlines()
    assert [sum(label in line for line in lines) for label in ("3 of 5 (2)", "3 of 5 (3)", "all 5")] == [2, 2, 2]


@given(
    st.lists(st.lists(st.text(max_size=30), min_size=4, max_size=4), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(64, 120),
)
def test_any_cells_fit_and_keep_their_order(rows, left, width):
    text = draw(rows, left=left, width=width)
    assert max(map(len, text.split("\n"))) <= width
    text.encode()
    for cell in (row[-1] for row in rows):
        assert readable(cell).strip() in text


def test_columns_that_find_no_place_follow_below():
    rows = [("layer", *(f"number {k}" for k in range(9))), ("trunk", *map(str, range(9)))]
    blocks = draw(rows, width=40).split("\n\n")
    assert [block.splitlines()[0].split()[0] for block in blocks] == ["layer"] * 3
    assert [cell for block in blocks for cell in block.splitlines()[1].split()[1:]] == list(map(str, range(9)))


def test_notebooks_show_any_name_unchanged():
    page = Table([("layer", "alive"), ("<b>", "$x$ & \ud800")], before=["a < b"], after=["done"]).html()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "<p>a &lt; b</p>" in page
    assert "$x$ &amp; ?" in page
    page.encode()


def test_every_report_goes_to_notebooks_and_pandas():
    pandas = pytest.importorskip("pandas")
    overlap, report = tasks_of(3)
    for found in (overlap, report, GradientConflict()):
        assert found._repr_html_().count("<table>") == 1
        frame = found.to_dataframe()
        assert isinstance(frame, pandas.DataFrame)
        assert len(frame) == len(found.rows())
    assert report.to_dataframe().set_index("name").loc["0.weight", "alive"] == 3


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ImportError, match="to_dataframe needs pandas: pip install pandas"):
        sparsity_report(TwoHeads()).to_dataframe()


def test_scores_show_what_each_task_reaches():
    scores = build({"a": {0: [1, 2], 1: [3]}, "<b>": {0: [2, 1]}}, [2, 1])[1]
    assert [(row["task"], row["parameter"], row["largest score"]) for row in scores.rows()] == [
        ("a", "0.weight", 2.0),
        ("a", "1.weight", 3.0),
        ("<b>", "0.weight", 2.0),
    ]
    page = scores._repr_html_()
    assert "&lt;b&gt;" in page
    assert "scored by custom on 0 batches" in page
    assert str(scores) == repr(scores)
    assert "\n" not in str(scores)


def test_a_removal_is_a_table_too():
    change = Change(100, 60)
    report = RemovalReport(
        "parameters",
        0.4,
        change,
        change,
        change,
        {"<shared>": PartChange(change, change)},
        {},
        {},
        0.0,
        0.0,
        RemovalPlan(()),
    )
    assert [row["part"] for row in report.rows()] == ["<shared>", "total"]
    assert "&lt;shared&gt;" in report._repr_html_()
    assert report.rows()[1]["MACs"] == 60
