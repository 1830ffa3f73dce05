"""The plots and the report: what they draw is what was measured; how they look, a person has to judge."""

import builtins
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from disparse_plugin import score_tasks
from disparse_plugin.analysis import (
    GradientConflict,
    html_report,
    overlap_with_controls,
    plot_agreement,
    plot_conflict,
    plot_density,
    plot_iou,
    plot_kept_by,
    plot_matrix,
    task_overlap,
)
from layouts import build
from networks import TwoHeads, digit_batches, digit_losses
from places import ROOT

PLOTS = [plot_iou, plot_agreement, plot_matrix, plot_kept_by, plot_density]
EXAMPLE = ROOT / "examples" / "watershed.py"


def random_overlap(layers, tasks="abc", size=50):
    generator = np.random.default_rng(0)
    tables = {task: {index: generator.random(size).tolist() for index in range(layers)} for task in tasks}
    return task_overlap(build(tables, [size] * layers)[1], 0.6)


def heights(ax):
    return [bar.get_height() for bar in ax.containers[0]]


@pytest.fixture(scope="module")
def controlled():
    torch.manual_seed(0)
    return overlap_with_controls(TwoHeads("abc").eval(), digit_losses, digit_batches(4), 0.6, groups=4, resamples=2)


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("layers", [1, 10, 200])
def test_every_plot_draws_few_and_many_layers(plot, layers):
    fig, ax = plot(random_overlap(layers))
    fig.canvas.draw()
    assert len(ax.get_xticklabels()) <= 40
    assert ax.get_title()


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_draw_into_given_axes(plot):
    fig, ax = plot_iou(random_overlap(2))
    assert plot(random_overlap(2), ax) == (fig, ax)


def test_bars_and_lines_are_the_measures(controlled):
    overlap = random_overlap(12)
    ax = overlap.plot()[1]
    assert heights(ax) == [layer.iou for layer in overlap]
    assert ax.patches[-1].get_data().values.tolist() == [layer.chance_iou for layer in overlap]
    ax = plot_agreement(controlled)[1]
    assert heights(ax) == [layer.kappa for layer in controlled]
    lines = {patch.get_label(): patch.get_data().values.tolist() for patch in ax.patches if hasattr(patch, "get_data")}
    assert lines["labels permuted"] == [layer.kappa for layer in controlled.controls.permuted]
    ceiling = next(values for label, values in lines.items() if label.startswith("ceiling"))
    assert ceiling == [layer.kappa for layer in controlled.controls.ceiling]
    assert heights(controlled.plot()[1]) == [layer.pairwise().iou for layer in controlled]


def test_the_matrix_is_symmetric_with_ceilings_on_its_diagonal(controlled):
    table = plot_matrix(controlled)[1].images[0].get_array()
    assert table[0, 1] == table[1, 0] == controlled.controls.across_trunk.pair("a", "b").kappa
    assert table[2, 2] == controlled.controls.ceiling_of("c").kappa
    plain = random_overlap(2)
    table = plot_matrix(plain)[1].images[0].get_array().filled(np.nan)
    assert np.isnan(np.diag(table)).all()
    assert table[0, 2] == plain.trunk.pair("a", "c").kappa


def test_stacked_bars_fill_up_to_one():
    overlap = random_overlap(6)
    stacks = [[bar.get_height() for bar in container] for container in plot_kept_by(overlap)[1].containers]
    np.testing.assert_allclose(np.sum(stacks, axis=0), 1)
    kept = overlap.layers[0].kept_by
    assert [stack[0] for stack in stacks] == pytest.approx([count / sum(kept[1:]) for count in kept[1:]])


def test_nothing_kept_can_be_drawn():
    overlap = task_overlap(build({"a": {0: [1, 2], 1: [3, 4]}, "b": {0: [1, 2], 1: [3, 4]}}, [2, 2])[1], 0.5)
    for plot in PLOTS:
        plot(overlap)[0].canvas.draw()


def test_conflict_lines_are_the_cosines():
    conflict = GradientConflict()
    score_tasks(TwoHeads("abc").eval(), digit_losses, digit_batches(), observe=conflict)
    ax = plot_conflict(conflict)[1]
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert drawn["a & b"] == [layer.cosine for layer in conflict.layers() if layer.tasks == ("a", "b")]


def test_the_report_is_one_file_with_everything_in_it(controlled, tmp_path):
    model, conflict = TwoHeads("abc").eval(), GradientConflict()
    score_tasks(model, digit_losses, digit_batches(), observe=conflict)
    path = html_report(
        tmp_path / "report.html", controlled, model=model, conflict=conflict, notes={"A <note>": "x < y"}
    )
    text = path.read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,') == 6
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "A &lt;note&gt;" in text
    assert "all parameters" in text  # the sparsity report of the model
    assert "x &lt; y" in text
    assert f"{controlled.trunk.kappa:.3f}" in text
    layers = [*controlled.layers, *controlled.private]
    removed = sum(layer.kept_by[0] for layer in layers) / sum(layer.size for layer in layers)
    assert f"{100 * removed:.2f} %" in text
    assert all(name in text for name in controlled.names)


def test_the_report_says_the_answer_first_and_what_was_scored(controlled, tmp_path):
    text = html_report(tmp_path / "report.html", controlled).read_text(encoding="utf-8")
    verdict, rest = text.split("</div>", 1)
    assert "The tasks want the same weights" in verdict
    assert f"{controlled.trunk.kappa:.3f}" in verdict
    assert "With permuted labels" in verdict
    assert "watershed" in verdict.lower()
    assert "snip on 4 batches" in rest
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d", rest)
    plain = html_report(tmp_path / "plain.html", random_overlap(3)).read_text(encoding="utf-8")
    assert "unknown without controls" in plain.split("</div>", 1)[0]


def test_the_report_fits_any_reader(controlled, tmp_path):
    text = html_report(tmp_path / "report.html", controlled).read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width,initial-scale=1">' in text
    assert "prefers-color-scheme:dark" in text
    alternatives = re.findall(r'<img alt="([^"]*)"', text)
    assert len(alternatives) == text.count("<img ") == 5
    assert all(len(alternative) > 20 for alternative in alternatives)
    assert len(set(alternatives)) == 5
    assert "last-child" not in text


def test_odd_names_in_the_report(tmp_path):
    generator = np.random.default_rng(0)
    tables = {task: {index: generator.random(9).tolist() for index in range(3)} for task in ODD_NAMES}
    overlap = task_overlap(build(tables, [9] * 3)[1], 0.6)
    text = html_report(tmp_path / "report.html", overlap, title="<odd> \ud800", notes={"a $b$": "c\nd"}).read_text()
    assert "a &lt; b &amp; c" in text
    assert "&lt;odd&gt; ?" in text
    assert "cost $x_1$ and $y" in text
    assert "c\nd" in text
    assert str(overlap).encode()


def test_a_report_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("disparse_plugin._support.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        html_report(path, random_overlap(2))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


ODD_NAMES = ["cost $x_1$ and $y", "_hidden", "a < b & c", "lone \ud800", "x" * 200, "two\nlines", ""]


@pytest.mark.parametrize("plot", PLOTS)
def test_odd_names_are_drawn_as_they_are(plot):
    generator = np.random.default_rng(0)
    tables = {task: {index: generator.random(9).tolist() for index in range(3)} for task in ODD_NAMES}
    fig, ax = plot(task_overlap(build(tables, [9] * 3)[1], 0.6))
    fig.canvas.draw()
    if plot is plot_density:
        shown = [text.get_text() for text in ax.get_legend().get_texts()]
        assert len(shown) == len(ODD_NAMES) - 1  # the empty name has no entry
        assert [shown[0].replace("\\$", "$"), shown[1].strip(), shown[2]] == ODD_NAMES[:3]
        assert max(map(len, shown)) <= 41


@pytest.mark.parametrize("plot", PLOTS)
def test_fourteen_tasks_can_be_told_apart(plot):
    fig, ax = plot(random_overlap(5, "abcdefghijklmn"))
    fig.canvas.draw()
    styles = {(line.get_color(), line.get_marker()) for line in ax.lines}
    assert len(styles) == len(ax.lines)


def test_of_many_pairs_the_lowest_are_drawn():
    conflict = GradientConflict()
    score_tasks(TwoHeads("abcdefgh").eval(), digit_losses, digit_batches(1), observe=conflict)
    ax = plot_conflict(conflict)[1]
    means = {}
    for layer in conflict.layers():
        means.setdefault(layer.tasks, []).append(layer.cosine)
    lowest = sorted(means, key=lambda pair: np.mean(means[pair]))[:12]
    assert {line.get_label() for line in ax.lines[:-1]} == {" & ".join(pair) for pair in lowest}
    assert "12 of 28 pairs" in ax.get_title()


def test_a_layer_without_gradients_does_not_decide_which_pairs_are_drawn():
    conflict = GradientConflict()
    score_tasks(TwoHeads("abcdefgh").eval(), digit_losses, digit_batches(1), observe=conflict)
    first = next(iter(conflict._found))
    for key, values in conflict._found.items():
        if key[0] == first[0] and key[1] == "a":  # as where one task's gradient is zero
            values[:] = [torch.stack([torch.full_like(value[0], torch.nan), value[1]]) for value in values]
    means = {}
    for layer in conflict.layers():
        means.setdefault(layer.tasks, []).append(layer.cosine)
    lowest = sorted(means, key=lambda pair: np.nanmean(means[pair]))[:12]
    ax = plot_conflict(conflict)[1]
    assert {line.get_label() for line in ax.lines[:-1]} == {" & ".join(pair) for pair in lowest}
    with pytest.raises(ValueError, match="conflict: must have seen tasks that share a layer, found nothing"):
        plot_conflict(GradientConflict())


def test_given_something_else_the_error_says_what_to_make():
    scores = build({"a": {0: [1, 2]}, "b": {0: [2, 1]}}, [2])[1]
    for plot in PLOTS:
        with pytest.raises(TypeError, match=r"overlap: must be a TaskOverlap, found TaskScores; task_overlap\(scores"):
            plot(scores)
    with pytest.raises(TypeError, match="conflict: must be a GradientConflict, found TaskScores"):
        plot_conflict(scores)


def test_plots_draw_into_a_part_of_a_figure():
    figure = Figure()
    ax = figure.subfigures(1, 2)[1].subplots()
    assert plot_iou(random_overlap(2), ax) == (figure, ax)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'disparse-plugin\[plots\]'"):
        random_overlap(2).plot()


def test_the_watershed_example_runs(monkeypatch, capsys, tmp_path):
    report = tmp_path / "watershed.html"
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--quick", "--report", str(report), "--out", str(tmp_path)])
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(number in printed for number in ("54.61", "73.52", "60.77", "permuted", "ceiling", "chance"))
    rows = {line.split()[0] for line in printed.splitlines() if line.startswith("trunk.")}
    assert len(rows) == 33
    assert report.stat().st_size > 100_000
    assert (tmp_path / "watershed.png").stat().st_size > 20_000


def test_a_task_that_shares_no_layer_leaves_its_cells_blank(tmp_path):
    class Apart(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.a, self.b, self.c = (torch.nn.Linear(8, width) for width in (8, 3, 3, 3))

        def forward(self, x):
            hidden = self.trunk(x).relu()
            return {"a": self.a(hidden), "b": self.b(hidden), "c": self.c(x)}

    def losses(model, batch):
        return {task: torch.nn.functional.cross_entropy(out, batch[1]) for task, out in model(batch[0]).items()}

    torch.manual_seed(0)
    data = [(torch.randn(8, 8), torch.randint(3, (8,))) for _ in range(8)]
    overlap = overlap_with_controls(Apart(), losses, data, 0.5)
    assert html_report(tmp_path / "tasks.html", overlap).stat().st_size > 10_000
    shown = {text.get_position(): text.get_text() for text in plot_matrix(overlap)[1].texts}
    third = overlap.tasks.index("c")
    assert {(0, 0), (1, 1), (0, 1), (1, 0)} == {place for place in shown if third not in place} == set(shown)
