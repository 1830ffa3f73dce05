"""The Lightning callback: checkpoints of all kinds keep every mask, and a further fit goes on."""

import contextlib

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.nn.utils import prune

from disparse_plugin.masks.state_dicts import match_masks
from lightning_runs import MODES, FourTasks, Loadable, Watch, equal, fit, half, keys, loader, pruning, trainer
from networks import PartlyShared
from runs import alive_count
from said import warned

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")


def checkpoints(folder):
    """Write one at the end of every epoch."""
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


class Failing(Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.at:
            raise ZeroDivisionError


def early(mode):
    """Gradual pruning warns when a fit ends before its last stage."""
    return warned(UserWarning, match="or train on") if mode == "gradual" else contextlib.nullcontext()


@pytest.mark.parametrize("mode", MODES)
class TestCheckpoints:
    @pytest.mark.parametrize("epoch", [0, 1])
    def test_a_resumed_run_is_the_run_that_never_stopped(self, tmp_path, mode, epoch):
        whole, resumed, watch = FourTasks(), FourTasks(seed=1), Watch()
        fit(tmp_path, whole, pruning(mode), checkpoints(tmp_path), max_epochs=3, enable_checkpointing=True)
        path = tmp_path / f"epoch={epoch}.ckpt"
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert any(name.endswith("weight_mask") for name in saved)
        fit(tmp_path, resumed, pruning(mode), watch, ckpt_path=path, max_epochs=3)
        assert equal(watch.first, {name: mask for name, mask in saved.items() if name.endswith("weight_mask")})
        assert equal(whole.state_dict(), resumed.state_dict())

    def test_a_checkpoint_within_an_epoch(self, tmp_path, mode):
        every = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
        fit(tmp_path, FourTasks(), pruning(mode), every, enable_checkpointing=True)
        resumed, watch = FourTasks(seed=1), Watch()
        saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
        fit(tmp_path, resumed, pruning(mode), watch, ckpt_path=tmp_path / "step=3.ckpt")
        assert watch.first
        assert equal(watch.first, {name: mask for name, mask in saved.items() if name.endswith("weight_mask")})
        assert alive_count(resumed) >= half(resumed)[1]

    def test_a_further_fit_goes_on(self, tmp_path, mode):
        whole, twice = FourTasks(momentum=False), FourTasks(momentum=False)
        start = {"start_at": 2} if mode == "pretrained" else {}
        fit(tmp_path, whole, pruning(mode, **start), max_epochs=2)
        callback = pruning(mode, **start)
        with early(mode):
            fit(tmp_path, twice, callback, max_epochs=1)
        fit(tmp_path, twice, callback, max_epochs=1)
        assert equal(whole.state_dict(), twice.state_dict())

    def test_a_fit_after_one_that_failed_goes_on(self, tmp_path, mode):
        callback, module = pruning(mode), FourTasks()
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, module, callback, Failing(at=5))
        before = alive_count(module)
        fit(tmp_path, module, callback)
        assert half(module)[1] == alive_count(module) <= before

    def test_a_fit_of_another_model_starts_anew(self, tmp_path, mode):
        callback, first, second = pruning(mode), FourTasks(), FourTasks()
        for module in (first, second):
            fit(tmp_path, module, callback)
        assert equal(first.state_dict(), second.state_dict())

    def test_folded_masks_come_back(self, tmp_path, mode):
        callback, module = pruning(mode, fold=True), FourTasks()
        trained = fit(tmp_path, module, callback, max_epochs=3)
        zeros = {name: weight == 0 for name, weight in module.state_dict().items() if name.endswith("weight")}
        assert not any(prune.is_pruned(inner) for inner in module.modules())
        assert sum(int(zero.sum()) for zero in zeros.values()) >= half(module)[0] - half(module)[1]
        trained.save_checkpoint(tmp_path / "folded.ckpt")
        resumed = FourTasks(seed=1)
        fit(tmp_path, resumed, pruning(mode, fold=True), ckpt_path=tmp_path / "folded.ckpt", max_epochs=4)
        fit(tmp_path, module, callback, max_epochs=1)
        for after in (module, resumed):
            assert sum(int((layer.weight != 0).sum()) for layer, _ in keys(after)) <= half(after)[1]

    def test_evaluation_of_a_checkpoint(self, tmp_path, mode):
        module = FourTasks()
        trained = fit(tmp_path, module, pruning(mode))
        trained.save_checkpoint(tmp_path / "last.ckpt")
        expected = trained.test(module, loader(), verbose=False)
        for fresh, folds in [(FourTasks(seed=1), False), (FourTasks(seed=1), True)]:
            callback = pruning(mode, fold=folds)
            tested = trainer(tmp_path, callback)
            assert tested.test(fresh, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False) == expected
            assert callback.sparsity == 1 - alive_count(module) / half(module)[0]
            assert any(prune.is_pruned(inner) for inner in fresh.modules()) is not folds

    def test_the_sparsity_is_that_of_what_was_evaluated_last(self, tmp_path, mode):
        callback, module = pruning(mode, fold=True), FourTasks()
        trained = fit(tmp_path, module, callback, checkpoints(tmp_path), max_epochs=3, enable_checkpointing=True)
        reached = callback.sparsity
        trained.test(module, loader(), verbose=False)  # folded: no mask is left to count
        assert callback.sparsity == reached
        path = tmp_path / "epoch=0.ckpt"
        trained.test(module, loader(), ckpt_path=path, verbose=False)
        saved = torch.load(path, weights_only=True)["state_dict"]
        alive = sum(int(mask.sum()) for name, mask in saved.items() if name.endswith("weight_mask"))
        assert callback.sparsity == 1 - alive / half(module)[0]


class TestStateDicts:
    """Following the masks of a state dict, without a trainer."""

    def pruned(self):
        model = PartlyShared()
        for layer in (model.abc, model.ab):
            prune.random_unstructured(layer, "weight", 0.5)
        return model

    def test_dense_takes_masks_and_masked_becomes_dense(self):
        dense, pruned = PartlyShared().state_dict(), self.pruned().state_dict()
        model = PartlyShared()
        identities = {name.removesuffix("_orig"): id(p) for name, p in model.named_parameters()}
        for state in (pruned, dense, pruned):
            match_masks(model, state)
            model.load_state_dict(state)
            assert equal(dict(model.state_dict()), dict(state))
            assert list(model.state_dict()) == list(state)  # so optimizer states fit by position
            assert {name.removesuffix("_orig"): id(p) for name, p in model.named_parameters()} == identities

    def test_masks_of_another_shape_change_nothing(self):
        state, model = self.pruned().state_dict(), PartlyShared()
        state["ab.weight_mask"] = torch.ones(3, 3)
        with pytest.raises(ValueError, match=r"state_dict: the mask of ab.weight must have the shape \(4, 6\), found"):
            match_masks(model, state)
        assert not prune.is_pruned(model)

    def test_load_from_checkpoint(self, tmp_path):
        module = FourTasks()
        trained = fit(tmp_path, module, pruning("static"))
        trained.save_checkpoint(tmp_path / "last.ckpt")
        assert equal(Loadable.load_from_checkpoint(tmp_path / "last.ckpt").state_dict(), module.state_dict())

    def test_a_checkpoint_of_a_model_that_torch_pruned_is_not_pruned_again(self, tmp_path):
        """Its parameters are in another order, and Adam's state is saved by position."""
        module = FourTasks()
        for layer, name in keys(module):
            prune.random_unstructured(layer, name, 0.5)
        trained = fit(tmp_path, module)
        trained.save_checkpoint(tmp_path / "torch.ckpt")
        resumed = FourTasks(seed=1)
        fit(tmp_path, resumed, pruning("static"), ckpt_path=tmp_path / "torch.ckpt", max_epochs=3)
        fit(tmp_path, module, ckpt_path=tmp_path / "torch.ckpt", max_epochs=3)
        assert equal(dict(module.state_dict()), dict(resumed.state_dict()))

    @pytest.mark.parametrize("further", [False, True])
    def test_batches_of_before_a_checkpoint_are_missed_with_a_warning(self, tmp_path, further):
        """Three of four have passed since; the masks are those of three, and not of one that counts twice."""
        late = {"start_at": 7, "num_batches": 4}
        three, module, path = FourTasks(momentum=False), FourTasks(momentum=False), tmp_path / "epoch=0.ckpt"
        fit(tmp_path, three, pruning("pretrained", start_at=7, num_batches=3))
        callback, first = pruning("pretrained", **late), FourTasks(momentum=False)
        with warned(UserWarning, "or go on with another fit"):
            again = {"enable_checkpointing": True, "max_epochs": 1}
            fit(tmp_path, module if further else first, callback, checkpoints(tmp_path), **again)
        with warned(UserWarning, r"num_batches: .* found 3 of 4: it began at step 4 of 7, .* from step 3 at"):
            if further:
                fit(tmp_path, module, callback, max_epochs=1)
            else:
                fit(tmp_path, module, pruning("pretrained", **late), ckpt_path=path)
        assert equal(three.state_dict(), module.state_dict())

    def test_a_checkpoint_that_does_not_tell_the_steps_loads(self, tmp_path):
        """Those of before the steps of several fits were counted."""
        whole, resumed, path = FourTasks(), FourTasks(seed=1), tmp_path / "epoch=0.ckpt"
        late = {"start_at": 6, "num_batches": 1}
        fit(tmp_path, whole, pruning("pretrained", **late), checkpoints(tmp_path), enable_checkpointing=True)
        older = torch.load(path, weights_only=True)
        del older["callbacks"]["DiSparsePruning"]["pruning"]["steps"]
        torch.save(older, path)
        fit(tmp_path, resumed, pruning("pretrained", **late), ckpt_path=path)
        assert equal(whole.state_dict(), resumed.state_dict())

    def test_a_dense_checkpoint_is_pruned(self, tmp_path):
        dense, module = FourTasks(), FourTasks(seed=1)
        fit(tmp_path, dense).save_checkpoint(tmp_path / "dense.ckpt")
        fit(tmp_path, module, pruning("static"), ckpt_path=tmp_path / "dense.ckpt", max_epochs=3)
        assert alive_count(module) == half(module)[1]
