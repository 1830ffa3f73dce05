"""The queue of many runs: what is in it, in which order, and that it is worked through as it says."""

from __future__ import annotations

import argparse
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchmetrics", reason="needs pip install 'disparse-plugin[benchmarks]'")

import many_runs
from multitask import settings, work
from multitask.report.results import load
from multitask.runs import TUNING_SEED, Store
from multitask.work import AT_START, ON_THE_WAY, ONE_SHOT, SIZES, WANTED, WINDOWED, Known, Unit, queue
from signs import SETTING, in_memory

HAS_RATES = frozenset({"dense", *ONE_SHOT, *AT_START, *ON_THE_WAY})


def of(units: list[Unit], kind: str, method: str) -> list[Unit]:
    """The units of a kind with a method in them."""
    return [unit for unit in units if unit.kind == kind and method in unit.methods]


def test_what_a_unit_needs_comes_before_it_and_nothing_is_listed_twice() -> None:
    for known in ({}, {setting: Known(HAS_RATES, frozenset({0, 3})) for setting in WANTED}):
        units = queue(WANTED, range(5), 160, known=known)
        names = [unit.name for unit in units]
        assert len(set(names)) == len(names)
        for place, unit in enumerate(units):
            assert set(unit.needs) <= set(names[:place])


def test_a_seed_without_its_dense_network_gets_nothing_that_starts_from_it() -> None:
    known = {"yeast": Known(HAS_RATES - {"SNIP"}, frozenset({0, 1, 3}))}
    units = queue(["yeast"], range(5), 160, known=known)
    assert [unit.seeds for unit in units if unit.kind == "dense"] == [(2, 4, TUNING_SEED)]
    assert {unit.seeds for unit in of(units, "runs", "LAMP")} == {(2,), (4,)}
    for method in (*AT_START, *ON_THE_WAY):
        runs = of(units, "runs", method)
        assert sorted({seed for unit in runs for seed in unit.seeds}) == [0, 1, 2, 3, 4]
        assert not any(need.startswith("dense") for unit in runs for need in unit.needs)
    assert [unit.methods for unit in units if unit.kind == "rates"] == [AT_START]


def test_what_no_earlier_call_left_over_is_not_in_the_queue() -> None:
    closed = Known(HAS_RATES, frozenset(range(5)))
    units = queue(["yeast"], range(5), 160, known={"yeast": closed})
    assert {unit.kind for unit in units} == {"runs"}
    assert {method for unit in units for method in unit.methods} == {*AT_START, *ON_THE_WAY}


def test_every_run_is_in_the_queue_once_and_the_dense_network_with_the_first() -> None:
    units = queue(WANTED, range(5), 160)
    for setting in WANTED:
        runs = [
            (seed, method, amount if method != "dense" else 0.0)
            for unit in units
            for seed in unit.seeds
            for method in unit.methods
            for amount in (unit.amounts if method != "dense" else unit.amounts[:1])
            if unit.kind == "runs" and unit.setting == setting
        ]
        trained = setting == "trunk"
        expected = 5 * (1 + 4 * (len(ONE_SHOT) + (not trained)) + (setting in WINDOWED) * len(ON_THE_WAY))
        assert len(runs) == len(set(runs)) == expected


def test_the_large_network_is_divided_and_its_last_seeds_come_late() -> None:
    units = queue(["trunk", *WINDOWED], range(5), 160)
    runs = [unit for unit in of(units, "runs", "LAMP") if unit.setting == "trunk"]
    assert {unit.most for unit in runs} == {SIZES["trunk"].most}
    assert [(*unit.seeds, *unit.amounts) for unit in runs[:4]] == [(0, 0.98), (0, 0.9), (0, 0.95), (1, 0.98)]
    early, late = (max(units.index(u) for u in runs if u.seeds == (seed,) and u.amounts[0] < 0.99) for seed in (2, 3))
    assert early < units.index(of(units, "runs", ON_THE_WAY[0])[0]) < late


def test_seeds_for_choices_are_run_with_what_is_to_be_chosen_from() -> None:
    units = queue(["yeast"], [1001, 1002], 160)
    assert {method for unit in units for method in unit.methods} == {"dense", *work.CHOICES}
    assert {amount for unit in units for amount in unit.amounts} == {0.98}


def test_a_foreman_begins_neither_too_many_of_a_setting_nor_too_far_ahead_nor_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(out=tmp_path, packed=None)
    trunk = [Unit("rates", "trunk", seeds=(seed,)) for seed in range(9)]
    foreman = many_runs.Foreman(options, [*trunk, Unit("rates", "yeast")])
    begun = []
    while (unit := foreman._next()) is not None:
        foreman.waiting.remove(unit)
        begun.append(unit)
        foreman.at_work[torch.multiprocessing.Pipe()[0]] = (unit, 0.0)
    assert [unit.setting for unit in begun] == ["trunk"] * SIZES["trunk"].at_once + ["yeast"]
    monkeypatch.setattr(many_runs, "AHEAD", 2)
    blocked = [Unit("runs", "yeast", seeds=(seed,), needs=("rates yeast",)) for seed in range(2)]
    assert many_runs.Foreman(options, [*blocked, Unit("rates", "yeast")])._next() is None
    late = many_runs.Foreman(options, [Unit("rates", "yeast")])
    late.run([], time.monotonic() + 1.0, closing=5.0)
    assert len(late.waiting) == 1


def test_the_queue_is_worked_through_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.SETTINGS, "signs", replace(SETTING, load=in_memory))
    few = {"ONE_SHOT": ("magnitude", "DiSparse damped 0.5"), "ON_THE_WAY": ("magnitude, cut at 1/4",)}
    for name, kept in {**few, "WINDOWED": ("signs",)}.items():
        monkeypatch.setattr(work, name, kept)
    options = argparse.Namespace(
        device="cpu",
        quick=True,
        out=tmp_path,
        states=tmp_path,
        packed=tmp_path / "all.tar.gz",
        threads=1,
        seeds=2,
        first_seed=0,
    )
    store = Store(tmp_path, "signs")
    store.set_facts(many_runs.describe(work.chosen_setting("signs", quick=True), in_memory(), "cpu"))

    def work_through(units: list[Unit]) -> many_runs.Foreman:
        here, there = torch.multiprocessing.Pipe()
        thread = threading.Thread(target=many_runs.worker, args=(options, {"signs": in_memory()}, there))
        thread.start()
        foreman = many_runs.Foreman(options, units)
        foreman.run([here], time.monotonic() + 60)
        foreman.pack()
        here.close()
        thread.join()
        return foreman

    units = queue(["signs"], range(2), 5)
    first = work_through([unit for unit in units if unit.kind != "runs"])
    assert "failed" not in (tmp_path / "log.txt").read_text()
    assert len(first.done) == len([unit for unit in units if unit.kind != "runs"])
    rates = store.rates()
    work_through(units)
    assert store.rates() == rates
    found = load(tmp_path)[0]
    expected = 2 * (1 + 4 * 2 + 4 + 1)
    assert len(found.runs) == len({run.key for run in found.runs}) == expected
    work_through(units)
    assert len(store.runs()) == expected
    assert (tmp_path / "all.tar.gz").stat().st_size > 0


def test_a_unit_that_fails_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path, packed=None)
    units = [Unit("rates", "yeast"), Unit("dense", "yeast", needs=("rates yeast",))]
    foreman = many_runs.Foreman(options, units)
    here, there = torch.multiprocessing.Pipe()
    there.send(("failed", "CUDA out of memory, and where"))
    there.send(("failed", "something else"))
    foreman.run([here], time.monotonic() + 20)
    assert not foreman.done
    assert [there.recv()[0].most for _ in range(2)] == [160, 80]
    assert "something else" in (tmp_path / "log.txt").read_text()
