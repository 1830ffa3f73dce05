"""What is left out: modules, names and patterns, under one name everywhere."""

import pytest
from torch import nn

from disparse_plugin import prunable_parameters, score_tasks
from disparse_plugin.parameters import qualified_names
from networks import PartlyShared, square_losses, vectors

EVERYTHING = ("abc.weight", "ab.weight", "heads.a.weight", "heads.b.weight", "heads.c.weight", "d.weight")


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        (lambda model: [], ()),
        (lambda model: [model.heads], ("heads.a.weight", "heads.b.weight", "heads.c.weight")),
        (lambda model: ["heads"], ("heads.a.weight", "heads.b.weight", "heads.c.weight")),
        (lambda model: ["heads.b"], ("heads.b.weight",)),
        (lambda model: ["heads.b.weight"], ("heads.b.weight",)),
        (lambda model: ["heads.*"], ("heads.a.weight", "heads.b.weight", "heads.c.weight")),
        (lambda model: ["ab?", model.d], ("abc.weight", "d.weight")),
        (lambda model: ["*.weight"], EVERYTHING),
        (lambda model: ["abc.bias"], ()),
        (lambda model: (name for name in ("d", "ab")), ("d.weight", "ab.weight")),
    ],
)
def test_what_is_left(exclude, gone):
    model = PartlyShared()
    found = prunable_parameters(model, exclude=exclude(model))
    expected = [name for name in (*EVERYTHING, "unused.weight") if name not in gone]
    if exclude(model) == ["*.weight"]:
        expected = []
    assert list(qualified_names(model, found)) == expected


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        (["head"], ValueError, "exclude: every entry must be .* found 'head'; did you mean 'heads'"),
        (["nothing.*"], ValueError, r"exclude: every entry must be .* found 'nothing\.\*'"),
        ([nn.Linear(5, 6)], ValueError, "found a Linear; take it from the same model"),
        ([3], TypeError, "exclude: every entry must be a module, a name or a glob pattern, found int: 3"),
        (3, TypeError, "exclude: must be a list of modules, names or patterns, found int"),
        ("heads", TypeError, r"exclude: must be a list, found str; write \['heads'\]"),
    ],
)
def test_what_is_nothing_of_the_model(exclude, error, message):
    with pytest.raises(error, match=message):
        prunable_parameters(PartlyShared(), exclude=exclude)
    with pytest.raises(error, match=message):
        score_tasks(PartlyShared(), square_losses, vectors(), exclude=exclude)


def test_what_is_left_out_is_neither_scored_nor_counted():
    def losses(model, batch):
        return {task: loss for task, loss in square_losses(model, batch).items() if task != "d"}

    model = PartlyShared()
    chosen = [(model.abc, "weight"), (model.ab, "weight")]
    scores = score_tasks(model, losses, vectors(), exclude=["unused", "heads", "d"], num_batches=2)
    alone = score_tasks(model, losses, vectors(), parameters=chosen, num_batches=2)
    assert scores.names == alone.names == ("abc.weight", "ab.weight")
    assert all((scores[task][key] == alone[task][key]).all() for task in scores for key in scores[task])
    both = score_tasks(model, losses, vectors(), parameters=[*chosen, (model.d, "weight")], exclude=["d", "ab"])
    assert both.names == ("abc.weight",)
