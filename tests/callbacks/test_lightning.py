"""The Lightning callback: every mode against the core, loaders, refusals, YAML, two processes."""

import ast
import importlib

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelPruning
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from callback_modes import EXCLUDED
from disparse_plugin import DiSparseStatic, at_least, disparse_pretrained, score_tasks
from disparse_plugin.lightning import DiSparsePruning
from disparse_plugin.sparse_training import DiSparseScheduler, GradualPruning
from lightning_runs import BATCHES, MODES, FourTasks, Sparsities, equal, fit, half, keys, loader, pruning, sparsity
from networks import square_losses, vectors
from places import HELPERS, python
from runs import alive_count, masks_of
from said import warned

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")


class ThreeTasks(FourTasks):
    """Without the task whose only layer has five inputs."""

    def task_losses(self, batch):
        return {task: loss for task, loss in super().task_losses(batch).items() if task != "d"}


def ended(mode):
    """Options with which a mode has done its work in two epochs."""
    return {**MODES[mode], "stop_at": 2 * BATCHES} if mode == "gradual" else MODES[mode]


class TestModes:
    """Each mode makes the masks of the core."""

    def test_static(self, tmp_path):
        module, twin = FourTasks(), FourTasks()
        fit(tmp_path, module, pruning("static", criterion="fisher", arbiter="majority"))
        scores = score_tasks(twin.net, square_losses, vectors(BATCHES)[:3], criterion="fisher", parameters=keys(twin))
        expected = list(scores.masks(0.5, "majority").values())
        assert all(torch.equal(m.weight_mask != 0, mask) for (m, _), mask in zip(keys(module), expected, strict=True))

    def test_pretrained_after_some_steps(self, tmp_path):
        record, module = Sparsities(), FourTasks()
        fit(tmp_path, module, pruning("pretrained"), logger=record, log_every_n_steps=1)
        assert record.values == [0, 0] + [sparsity(module)] * (2 * BATCHES - 2)
        assert alive_count(module) == half(module)[1]

    def test_pretrained_before_so_many_batches_have_passed_takes_those_that_have(self, tmp_path):
        module, twin = FourTasks(), FourTasks()
        fit(tmp_path, module, pruning("pretrained", start_at=2, num_batches=3))
        fit(tmp_path, twin, pruning("pretrained", start_at=2, num_batches=2))
        assert equal(module.state_dict(), twin.state_dict())

    def test_pretrained_at_once_reads_short_data_again(self, tmp_path):
        module = FourTasks()
        fit(tmp_path, module, pruning("pretrained", start_at=None, num_batches=BATCHES + 1))
        assert alive_count(module) == half(module)[1]

    @pytest.mark.parametrize("accumulated", [1, 2])
    @pytest.mark.parametrize(("mode", "kind"), [("gradual", GradualPruning), ("dynamic", DiSparseScheduler)])
    def test_schedulers(self, tmp_path, mode, kind, accumulated):
        module, twin = FourTasks(), FourTasks()
        fit(tmp_path, module, pruning(mode, stop_at=4), accumulate_grad_batches=accumulated)
        optimizer = twin.configure_optimizers()
        options = {"amount": 0.5, "update_every": 2, "stop_at": 4, "parameters": keys(twin)}
        scheduler = kind(twin.net, optimizer, square_losses, **options)
        batches = vectors(BATCHES) * 2
        for start in range(0, len(batches), accumulated):
            step = batches[start : start + accumulated]
            optimizer.zero_grad()
            for batch in step:
                (sum(square_losses(twin.net, batch).values()) / accumulated).backward()
            optimizer.step()
            scheduler.step(*step)
        assert equal(module.state_dict(), twin.state_dict())

    def test_stop_at_is_half_of_the_training(self, tmp_path):
        record, module = Sparsities(), FourTasks()
        fit(tmp_path, module, pruning("gradual", stop_at=None), logger=record, log_every_n_steps=1)
        assert record.values.index(sparsity(module)) + 1 == 0.5 * 2 * BATCHES

    @pytest.mark.parametrize("mode", MODES)
    def test_in_half_precision(self, tmp_path, mode):
        """Scored under the autocast of the training: the layers see, and return, bfloat16."""
        module, kinds = FourTasks(), []
        module.net.abc.register_forward_hook(lambda layer, inputs, output: kinds.append(output.dtype))
        fit(tmp_path, module, pruning(mode), precision="bf16-mixed")
        assert set(kinds) == {torch.bfloat16}
        assert alive_count(module) == half(module)[1]

    @pytest.mark.parametrize(("mode", "options"), [("static", {}), ("pretrained", {}), ("gradual", {"stop_at": 8})])
    def test_every_layer_keeps_some_weights(self, tmp_path, mode, options):
        module = FourTasks()
        fit(tmp_path, module, pruning(mode, amount=0.8, min_keep=2, **options))
        assert all(int(layer.weight_mask.sum()) >= 2 for layer, _ in keys(module))
        assert alive_count(module) == half(module)[0] - round(0.8 * half(module)[0])

    @pytest.mark.parametrize("mode", MODES)
    def test_one_of_every_two_weights(self, tmp_path, mode):
        module = ThreeTasks()
        options = {**ended(mode), "exclude": ["net.unused", "net.abc", "net.d"], "pattern": "1:2"}
        fit(tmp_path, module, DiSparsePruning(mode, **options))
        masks = masks_of(module).values()
        assert len(masks) == 4
        assert all(bool((mask.unflatten(1, (-1, 2)).sum(-1) == 1).all()) for mask in masks)

    @pytest.mark.parametrize("mode", ["pretrained", "gradual"])
    def test_one_cut_after_a_quarter_of_the_training(self, tmp_path, mode):
        record, module = Sparsities(), FourTasks()
        once = {"stop_at": 0.25} if mode == "gradual" else {}
        callback = pruning(mode, start_at=0.25, **once)
        fit(tmp_path, module, callback, logger=record, log_every_n_steps=1)
        first = 2 * BATCHES // 4
        assert record.values == [0] * (first - 1) + [sparsity(module)] * (2 * BATCHES - first + 1)

    def test_a_further_fit_keeps_the_steps_of_the_first(self, tmp_path):
        module, callback = FourTasks(momentum=False), pruning("gradual", start_at=0.25, stop_at=1.0)
        fit(tmp_path, module, callback)
        assert alive_count(module) == half(module)[1]
        fit(tmp_path, module, callback, max_epochs=5)
        assert alive_count(module) == half(module)[1]

    @pytest.mark.parametrize("mode", ["static", "pretrained", "gradual"])
    def test_whole_channels(self, tmp_path, mode):
        module = ThreeTasks()
        options = {**ended(mode), "exclude": ["net.unused", "net.heads", "net.d"], "pattern": "channels"}
        fit(tmp_path, module, DiSparsePruning(mode, 0.5, **options))
        channels = torch.cat([mask.mean(1) for mask in masks_of(module).values()])
        assert set(channels.tolist()) == {0.0, 1.0}
        assert int(channels.sum()) == 5

    @pytest.mark.parametrize("mode", ["static", "pretrained", "gradual"])
    def test_a_new_callback_prunes_only_what_is_missing(self, tmp_path, mode):
        module, total = FourTasks(), half(FourTasks())[0]
        fit(tmp_path, module, pruning("static"))
        for amount, masked in [(0.5, 0.5), (0.3, 0.5), (0.8, 0.8), (total - 8, None)]:
            callback = pruning(mode, amount=amount, **{**ended(mode), "min_keep": 1})
            fit(tmp_path, module, callback)
            gone = total - 8 if masked is None else round(masked * total)
            assert alive_count(module) == total - gone
            assert callback.sparsity == 1 - (total - gone) / total

    @pytest.mark.parametrize("mode", ["static", "gradual"])
    def test_a_new_callback_masks_only_the_channels_that_are_missing(self, tmp_path, mode):
        module = ThreeTasks()
        options = {**ended(mode), "exclude": ["net.unused", "net.heads", "net.d"], "pattern": "channels"}
        for amount, channels in [(0.5, 5), (0.5, 5), (0.8, 2)]:
            fit(tmp_path, module, DiSparsePruning(mode, amount, **options))
            assert int(torch.cat([mask.mean(1) for mask in masks_of(module).values()]).sum()) == channels

    def test_exempt_layers_stay_dense(self, tmp_path):
        module = FourTasks()
        with warned(DeprecationWarning, match="exempt: is deprecated"):
            fit(tmp_path, module, pruning("dynamic", exempt=["net.heads"], seed=3, criterion="random"))
        assert not any(prune.is_pruned(head) for head in module.net.heads.values())
        total = half(module)[0]
        dense = sum(head.weight.numel() for head in module.net.heads.values())
        assert alive_count(module) + dense == total - round(0.5 * total)


def test_what_is_logged_while_scoring_is_not_logged(tmp_path):
    """The masks change after the last step, and the losses that this takes are not those of the step."""
    module = FourTasks()
    trained = fit(tmp_path, module, pruning("dynamic", update_every=1))
    assert float(trained.callback_metrics["loss_of_a"]) == module.losses_of_a[-1]
    assert "log" not in vars(module)


def test_a_metric_updated_while_scoring_counts_the_scoring_batches(tmp_path):
    """A known limit, told in the guide: the state of a metric is neither a parameter nor a buffer."""

    class Measured(FourTasks):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()

        def task_losses(self, batch):
            found = super().task_losses(batch)
            self.mean.update(found["a"].detach())
            return found

    module = Measured()
    fit(tmp_path, module, pruning("static"))
    assert int(module.mean.weight) == 2 * BATCHES + MODES["static"]["num_batches"]


def test_scoring_does_not_disturb_persistent_workers(tmp_path):
    module = FourTasks()
    fit(tmp_path, module, pruning("static"), data=loader(num_workers=1, persistent_workers=True))
    assert module.seen == [float(batch.sum()) for batch in vectors(BATCHES)] * 2


def test_several_loaders(tmp_path):
    class Joined(FourTasks):
        def task_losses(self, batch):
            return super().task_losses(torch.cat([batch["x"], batch["y"]]))

        def training_step(self, batch, _):
            return sum(self.task_losses(batch).values())

    module = Joined()
    fit(tmp_path, module, pruning("static"), data={"x": loader(), "y": loader()})
    assert alive_count(module) == half(module)[1]


class Manual(FourTasks):
    """Steps its optimizer by itself, after every second batch."""

    automatic_optimization = False

    def training_step(self, batch, index):
        self.manual_backward(super().training_step(batch, index))
        if index % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class TestFitsThatEndEarly:
    """What was to be masked later is told at the end of the fit, with what to do."""

    def test_gradual_pruning_under_manual_optimization(self, tmp_path):
        module = Manual()
        found = r"found stop_at=6 with 4 optimizer steps: 48\.5% of the weights are masked, of 49\.5%; .* stop_at=3, or"
        with warned(UserWarning, match=found):
            fit(tmp_path, module, pruning("gradual", update_every=1, stop_at=0.75))
        module = Manual()
        fit(tmp_path, module, pruning("gradual", update_every=1, stop_at=3))  # as the warning says; without one
        assert alive_count(module) == half(module)[1]

    def test_gradual_pruning_that_is_stopped(self, tmp_path):
        class Stop(Callback):
            def on_train_batch_end(self, trainer, *_):
                trainer.should_stop = trainer.global_step == 4

        with warned(UserWarning, match="stop_at: must come before the training ends"):
            fit(tmp_path, FourTasks(), pruning("gradual", stop_at=0.75), Stop(), min_epochs=0)

    def test_one_shot_pruning_whose_step_never_comes(self, tmp_path):
        module = FourTasks()
        with warned(UserWarning, match="start_at: .* found 20 with 8 optimizer steps: nothing was pruned"):
            fit(tmp_path, module, pruning("pretrained", start_at=20))
        assert not masks_of(module)

    def test_a_further_fit_by_another_trainer_comes_to_it(self, tmp_path):
        """As the warning advises; the steps of all fits count, and a checkpoint between them keeps the count."""
        callback, module, record = pruning("pretrained", start_at=18), FourTasks(), Sparsities()
        with warned(UserWarning, match="found 18 with 8 optimizer steps: .* or go on with another fit"):
            fit(tmp_path, module, callback)
        with warned(UserWarning, match="found 18 with 16 optimizer steps: .* or go on with another fit"):
            fit(tmp_path, module, callback).save_checkpoint(tmp_path / "second.ckpt")
        fit(tmp_path, module, callback, logger=record, log_every_n_steps=1)
        assert record.values == [0] + [sparsity(module)] * (2 * BATCHES - 1)
        resumed, record = FourTasks(seed=1), Sparsities()
        again = {"ckpt_path": tmp_path / "second.ckpt", "max_epochs": 4, "logger": record, "log_every_n_steps": 1}
        fit(tmp_path, resumed, pruning("pretrained", start_at=18), **again)
        assert record.values == [0] + [sparsity(module)] * (2 * BATCHES - 1)
        assert alive_count(resumed) == half(resumed)[1]

    def test_accumulation_that_changes_is_counted(self, tmp_path):
        """Four steps in the first epoch and two in the second: the last stage is at four and a half, so at four."""
        record, module = Sparsities(), FourTasks()
        changing = GradientAccumulationScheduler({0: 1, 1: 2})
        fit(
            tmp_path,
            module,
            pruning("gradual", stop_at=0.75, update_every=2),
            changing,
            logger=record,
            log_every_n_steps=1,
        )
        assert record.values.index(sparsity(module)) + 1 == 4

    def test_data_without_a_length_needs_stop_at(self, tmp_path):
        """Lightning's estimate is -1 then, which used to prune everything at the first step."""

        class Stream(IterableDataset):
            def __iter__(self):
                return iter(vectors(BATCHES))

        with pytest.raises(ValueError, match=r"stop_at: must be a step .* when it is not known where"):
            fit(tmp_path, FourTasks(), pruning("gradual", stop_at=None), data=DataLoader(Stream(), batch_size=None))


def test_what_was_chosen_is_shown():
    shown = repr(DiSparsePruning("dynamic", 0.9, exclude=["net.*"], update_every=5, arbiter=at_least(2)))
    assert shown == (
        "DiSparsePruning(mode='dynamic', amount=0.9, arbiter=AtLeast(k=2), exclude=['net.*'], update_every=5)"
    )


def test_exclude_takes_modules_and_patterns(tmp_path):
    module = FourTasks()
    fit(tmp_path, module, DiSparsePruning("static", 0.5, exclude=[module.net.unused, "net.heads.?"], num_batches=2))
    assert set(masks_of(module)) == {f"net.{name}.weight_mask" for name in ("abc", "ab", "d")}


@pytest.mark.parametrize("mode", ["static", "gradual", "dynamic"])
def test_what_cannot_be_masked_is_left_out_with_a_warning(tmp_path, mode):
    class Tied(FourTasks):
        """The two heads of the same shape share their weight."""

        def __init__(self):
            super().__init__()
            self.net.unused = nn.Linear(4, 2)
            self.net.unused.weight = self.net.heads["a"].weight

    module = Tied()
    with warned(UserWarning, match=r"net\.heads\.a\.weight"):
        fit(tmp_path, module, DiSparsePruning(mode, 0.5, **ended(mode)))
    assert set(masks_of(module)) == {f"net.{name}.weight_mask" for name in ("abc", "ab", "heads.b", "heads.c", "d")}


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"mode": "static", "amount": 1.5}, ValueError, "amount: a float must be a fraction"),
            ({"mode": "gradual", "amount": 0.5, "min_keep": 1.5}, ValueError, "min_keep: a float must be a fraction"),
            ({"mode": "dynamic", "amount": 0.5, "min_keep": 2}, ValueError, "min_keep: must be left out with mode='dy"),
            ({"mode": "one-shot", "amount": 0.5}, ValueError, "mode: must be one of static, pretrained, gradual"),
            ({"mode": "static", "amount": 0.5, "stop_at": 9}, ValueError, "stop_at: must be left out with mode='stat"),
            ({"mode": "static", "amount": 0.5, "criterion": "snap"}, ValueError, "criterion: must be one of"),
            ({"mode": "static", "amount": 0.5, "arbiter": "none"}, ValueError, "arbiter: must be one of"),
            ({"mode": "dynamic", "amount": 0.5, "criterion": "snip"}, ValueError, "tell masked weights apart"),
            ({"mode": "pretrained", "amount": 0.5, "num_batches": 0}, ValueError, "num_batches: must be at least 1"),
            ({"mode": "gradual", "amount": 0.5, "update_every": 0.5}, TypeError, "update_every: must be an int"),
            ({"mode": "static"}, TypeError, "amount: must be a float"),
            (
                {"mode": "static", "amount": 0.5, "pattern": "2"},
                ValueError,
                "pattern: must be one of weights, channels, n",
            ),
            (
                {"mode": "gradual", "pattern": "2:4", "min_keep": 2},
                ValueError,
                "min_keep: must be left out with",
            ),
            (
                {"mode": "dynamic", "amount": 0.5, "pattern": "channels"},
                ValueError,
                "pattern: must be 'weights'",
            ),
            (
                {"mode": "gradual", "amount": 0.5, "stop_at": 1.5},
                ValueError,
                "stop_at: a float must be a fraction",
            ),
            (
                {"mode": "gradual", "amount": 0.5, "start_at": "0"},
                TypeError,
                "start_at: must be an int .step. or",
            ),
            ({"mode": "pretrained", "amount": 0.5, "start_at": -1}, ValueError, "start_at: must be at least 0"),
        ],
    )
    def test_options(self, options, error, message):
        with pytest.raises(error, match=message):
            DiSparsePruning(**options)

    def test_a_module_without_task_losses(self, tmp_path):
        module = FourTasks()
        module.task_losses = None
        with pytest.raises(TypeError, match=r"model: must have a method task_losses\(batch\) .* in FourTasks; add"):
            fit(tmp_path, module, pruning("static"))

    def test_an_unknown_submodule(self, tmp_path):
        callback = DiSparsePruning("static", 0.5, exclude=["net.head"])
        with pytest.raises(ValueError, match=r"exclude: .* found 'net.head'; did you mean 'net.heads'"):
            fit(tmp_path, FourTasks(), callback)

    def test_two_optimizers(self, tmp_path):
        class Two(FourTasks):
            automatic_optimization = False

            def configure_optimizers(self):
                return super().configure_optimizers(), super().configure_optimizers()

        with pytest.raises(ValueError, match="optimizers: gradual and dynamic pruning need exactly one, found 2"):
            fit(tmp_path, Two(), pruning("dynamic"))

    @pytest.mark.parametrize("mode", ["gradual", "dynamic"])
    def test_frozen_layers_that_the_optimizer_leaves_out(self, tmp_path, mode):
        class Frozen(FourTasks):
            def configure_optimizers(self):
                for layer in (self.net.abc, self.net.ab):
                    layer.requires_grad_(False)
                return torch.optim.Adam([p for p in self.parameters() if p.requires_grad])

        with pytest.raises(ValueError, match="optimizer: must train every pruned parameter, found 2 of 6") as refused:
            fit(tmp_path, Frozen(), pruning(mode))
        paste = str(refused.value).rpartition("exclude=")[2]
        assert paste == "['net.abc.weight', 'net.ab.weight']"
        module = Frozen()
        fit(tmp_path, module, DiSparsePruning(mode, 0.5, exclude=[*EXCLUDED, *ast.literal_eval(paste)], **ended(mode)))
        assert not any(prune.is_pruned(layer) for layer in (module.net.abc, module.net.ab))

    def test_a_training_without_end(self, tmp_path):
        with pytest.raises(ValueError, match=r"stop_at: must be a step .* when it is not known where"):
            fit(tmp_path, FourTasks(), pruning("gradual", stop_at=None), max_epochs=-1)

    def test_other_options_than_the_checkpoint(self, tmp_path):
        fit(tmp_path, FourTasks(), pruning("gradual")).save_checkpoint(tmp_path / "last.ckpt")
        with pytest.raises(ValueError, match=r"same options, found other update_every 3 \(saved: 2\)"):
            fit(tmp_path, FourTasks(), pruning("gradual", update_every=3), ckpt_path=tmp_path / "last.ckpt")


CONFIG = """
class_path: disparse_plugin.lightning.DiSparsePruning
init_args:
  mode: pretrained
  amount: 0.5
  criterion: layer_adaptive(taylor)
  arbiter: at_least(2)
  exclude: [net.unused]
  num_batches: 2
"""


class TestConfiguration:
    def test_from_yaml(self, tmp_path):
        parsed, module = yaml.safe_load(CONFIG), FourTasks()
        path, name = parsed["class_path"].rsplit(".", 1)
        fit(tmp_path, module, getattr(importlib.import_module(path), name)(**parsed["init_args"]))
        assert alive_count(module) == half(module)[1]

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's calls of jsonargparse
    def test_by_lightning_cli(self, tmp_path):
        pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
        from lightning.pytorch.cli import LightningCLI

        options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        options["enable_progress_bar"] = options["enable_model_summary"] = False
        config = {"trainer": {**options, "callbacks": [yaml.safe_load(CONFIG)]}}
        cli = LightningCLI(FourTasks, args=config, run=False, save_config_callback=None)
        cli.trainer.fit(cli.model, loader())
        assert alive_count(cli.model) == half(cli.model)[1]


def test_lightning_is_optional():
    code = (
        "import sys, disparse_plugin, disparse_plugin.masks, disparse_plugin.sparse_training\n"
        "assert 'lightning' not in sys.modules\n"
        "sys.modules['lightning'] = None\n"
        "try:\n    import disparse_plugin.lightning\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = python("-c", code)
    assert done.stdout.strip().endswith("pip install 'disparse-plugin[lightning]'"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_have_the_same_masks(tmp_path, mode):
    done = python(HELPERS / "lightning_runs.py", tmp_path, mode)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["seen"] != second["seen"]
    assert any(bool((mask == 0).any()) for mask in first["masks"].values())
    assert equal(first["masks"], second["masks"])


def test_lightning_model_pruning_unmodified(tmp_path):
    """Lightning's own callback works with a bound class; of what remains it prunes ``amount`` at every epoch."""
    module = FourTasks()
    scores = score_tasks(module.net, square_losses, vectors(), parameters=keys(module))
    callback = ModelPruning(
        DiSparseStatic.bind(scores),
        parameters_to_prune=list(scores.parameters),
        amount=0.5,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=False,
    )
    fit(tmp_path, module, callback)
    once = half(module)[1]
    assert alive_count(module) == once - round(0.5 * once)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_left_out_may_be_a_generator(tmp_path, mode):
    module, twin = FourTasks(), FourTasks()
    names = ("net.ab", "net.unused")
    fit(tmp_path, module, DiSparsePruning(mode, 0.5, exclude=(name for name in names), **ended(mode)))
    fit(tmp_path, twin, DiSparsePruning(mode, 0.5, exclude=list(names), **ended(mode)))
    assert "net.ab.weight" in module.state_dict()
    assert equal(module.state_dict(), twin.state_dict())


def test_lightnings_averages_of_what_was_dense_are_refused(tmp_path):
    averages = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging
    for callbacks in ((pruning("static"), averages()), (averages(), pruning("static"))):
        module = FourTasks()
        with pytest.raises(ValueError, match=r"callbacks: masks .* EMAWeightAveraging .* prune before the fit"):
            fit(tmp_path, module, *callbacks)
        assert not masks_of(module)


def test_lightnings_averages_take_a_model_that_was_pruned_before_as_the_error_says(tmp_path):
    averages = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging
    module, refused = FourTasks(), FourTasks()
    with pytest.raises(ValueError, match=r"disparse_pretrained\), run the model once under torch\.no_grad\(\)"):
        fit(tmp_path, refused, pruning("static"), averages())
    disparse_pretrained(module.net, square_losses, vectors(), 0.5, exclude=[module.net.unused])
    with torch.no_grad():
        square_losses(module.net, vectors()[0])
    before = {name: mask.clone() for name, mask in masks_of(module).items()}
    fit(tmp_path, module, averages())
    assert equal(before, masks_of(module))
