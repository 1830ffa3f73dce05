"""Every mode leaves out what a forward shows not to be maskable, as the one-shot calls do, and goes on without it."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from disparse_plugin.lightning import DiSparsePruning
from lightning_runs import MODES, FourTasks, equal, fit
from networks import WithStandardised
from runs import masks_of
from said import warned

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")


class TwoTasks(FourTasks):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.net = WithStandardised()


def callback(mode):
    return DiSparsePruning(mode, 0.5, **{**MODES[mode], **({"stop_at": 4} if mode == "gradual" else {})})


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_multiplied_with_stays_dense(tmp_path, mode):
    module, pruning = TwoTasks(), callback(mode)
    with warned(UserWarning, match=r"1 of 4 cannot be masked .*net\.std\.weight \(Standardised multiplies"):
        fit(tmp_path, module, pruning)
    assert list(masks_of(module)) == [f"net.{name}.weight_mask" for name in ("trunk", "a", "b")]
    assert pruning.sparsity == pytest.approx(0.5)  # 25 of the 50 that are listed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:parameters. 1 of 4 cannot be masked")
def test_a_resumed_run_leaves_out_the_same(tmp_path, mode):
    whole, resumed, pruning = TwoTasks(), TwoTasks(seed=1), callback(mode)
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, whole, callback(mode), saved, max_epochs=3, enable_checkpointing=True)
    fit(tmp_path, resumed, pruning, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert equal(whole.state_dict(), resumed.state_dict())
    assert pruning.sparsity == pytest.approx(0.5)
