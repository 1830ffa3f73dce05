"""remove_channels: what is removed, what is reported, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from disparse_plugin import DiSparseStatic, prunable_parameters
from disparse_plugin.structured import RemovalPlan, RemovalReport, remove_channels, replay_removal
from structured_networks import INPUT, TwoTasks, TwoTaskTransformer, batches, build, deviation, losses, outputs_of

KINDS = ["batchnorm", "grouped", "depthwise", "groupnorm", "instancenorm", "transformer"]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def remove(model: nn.Module, amount: float = 0.5, **options: Any) -> RemovalReport:
    device = next(model.parameters()).device
    data = [batch.to(device) for batch in batches()]
    return remove_channels(model, losses, data, data[0], amount, **options)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module) -> int:
    """Count multiplications of convolutions and linear layers with torch's own counter of operations."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(batches()[0])
    wanted = ("convolution", "addmm", "mm")
    by_operation = counter.get_flop_counts()["Global"]
    return sum(n for op, n in by_operation.items() if str(op).rpartition(".")[2] in wanted) // 2


@pytest.mark.parametrize("of", ["channels", "parameters", "macs"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_amount_is_met_within_one_unit(kind: str, of: str) -> None:
    model = build(kind)
    before, macs_before = count(model), macs(model)
    report = remove(model, 0.6, of=of)
    assert report.parameters == dataclasses.replace(report.parameters, before=before, after=count(model))
    assert report.macs == dataclasses.replace(report.macs, before=macs_before, after=macs(model))
    largest = {"grouped": 0.05, "groupnorm": 0.05, "transformer": 0.05}.get(kind, 0.03)
    assert 0.6 - 1 / report.channels.before <= report.achieved <= 0.6 + largest
    assert report.deviation < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_smaller_model_works(kind: str, device: str) -> None:
    """Forward, backward, a step of training; and the modes and requires_grad are as before."""
    model = build(kind).to(device)
    model.train()
    model.stem.weight.requires_grad_(False) if hasattr(model, "stem") else None
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    modes = [module.training for module in model.modules()]
    remove(model)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    assert [module.training for module in model.modules()] == modes
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    sum(losses(model, batches()[0].to(device)).values()).backward()
    optimizer.step()
    assert model(batches()[0].to(device))["dense"].isfinite().all()


def test_other_random_input_sees_the_same_network() -> None:
    """The masked copy is made on other data than what the removal was checked on."""
    from disparse_plugin.structured.masked_copy import masked_copy

    model = build("batchnorm")
    full = copy.deepcopy(model)
    report = remove(model)
    assert deviation(masked_copy(full, report.plan.cuts), model) < 1e-5


@pytest.mark.parametrize("kind", ["batchnorm", "grouped", "transformer"])
def test_replaying_from_a_file(kind: str, tmp_path: Path) -> None:
    model, fresh = build(kind), build(kind, seed=7)
    report = remove(model)
    report.save(tmp_path / "removal.safetensors")
    replay_removal(fresh, tmp_path / "removal.safetensors")
    fresh.load_state_dict(model.state_dict())
    assert deviation(model, fresh) == 0
    assert (tmp_path / "removal.safetensors").stat().st_size < 60_000


def test_replaying_twice_or_on_another_model_is_refused(tmp_path: Path) -> None:
    model = build("batchnorm")
    remove(model).save(tmp_path / "removal.safetensors")
    before = model.state_dict()
    with pytest.raises(ValueError, match="must have"):
        replay_removal(model, tmp_path / "removal.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="found none"):
        replay_removal(build("transformer"), tmp_path / "removal.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="safetensors"):
        RemovalPlan.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("kind", ["batchnorm", "transformer"])
def test_pickle_as_torch_pruning_does_it(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    remove(model)
    torch.save(model, tmp_path / "model.pt")
    assert deviation(model, torch.load(tmp_path / "model.pt", weights_only=False)) == 0


@pytest.mark.parametrize("kind", ["batchnorm", "depthwise", "transformer"])
def test_export(kind: str) -> None:
    model = build(kind)
    remove(model)
    x = batches(1, seed=5)[0]
    exported = torch.export.export(model, (x,)).module()(x)
    for found, expected in zip(exported.values(), outputs_of(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", [pytest.param("batchnorm", marks=pytest.mark.slow), "transformer"])
def test_onnx(kind: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra 'clients'")
    import onnxruntime

    model = build(kind)
    remove(model)
    x = batches(1, seed=5)[0]
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    found = session.run(None, {entry.name: x.numpy()})
    for ours, theirs in zip(outputs_of(model), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compile() -> None:
    model = build("batchnorm")
    remove(model)
    compiled = torch.compile(model)
    x = batches(1, seed=5)[0]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)["dense"], model(x)["dense"], rtol=1e-4, atol=1e-5)


def test_a_compiled_wrapper_is_looked_through() -> None:
    model = build("batchnorm")
    report = remove(torch.compile(model))
    assert report.parameters.after == count(model) < count(build("batchnorm"))


@pytest.mark.parametrize("around", [lambda model: model, torch.compile, nn.Sequential])
def test_data_parallel_would_not_sync_what_became_smaller(around: Any, tmp_path: Path) -> None:
    remove(build("batchnorm")).save(tmp_path / "removal.safetensors")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build("batchnorm")
        wrapped = around(nn.parallel.DistributedDataParallel(model))
        parameters = list(model.parameters())
        for call in (remove, lambda model: replay_removal(model, tmp_path / "removal.safetensors")):
            with pytest.raises(ValueError, match=r"model: must not be in Distributed.* wrap that anew"):
                call(wrapped)
        assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
        replay_removal(model, tmp_path / "removal.safetensors")
        assert count(nn.parallel.DistributedDataParallel(model)) < sum(map(torch.numel, parameters))
    finally:
        torch.distributed.destroy_process_group()


def test_parts_and_groups_are_reported() -> None:
    model = build("batchnorm")
    report = remove(model)
    assert set(report.parts) == {"shared", "dense", "label"}
    own = [p for layer in (model.hidden, model.label_out) for p in layer.parameters()]
    assert report.parts["label"].parameters.after == sum(parameter.numel() for parameter in own)
    assert sum(part.macs.after for part in report.parts.values()) == report.macs.after
    assert report.groups["hidden"].tasks == ("label",)
    assert report.groups["hidden"].channels.after == model.hidden.out_features
    assert report.skipped == dict.fromkeys(("dense_out", "label_out"), "makes an output of the model")
    text = str(report)
    assert "shared" in text
    assert "left alone (makes an output of the model): " in text


def test_ignored_layers_limits_and_rounding() -> None:
    model = build("batchnorm")
    report = remove(model, 0.4, exclude=[model.blocks[0]], max_pruning_ratio=0.75, round_to=4)
    assert model.blocks[0].conv1.out_channels == 32
    assert model.stem.out_channels == 16  # adds to the ignored block
    assert all(change.channels.after % 4 == 0 for change in report.groups.values() if change.channels.removed)
    assert all(change.channels.removed <= 0.75 for change in report.groups.values())
    assert "excluded" in report.skipped.values()


def chain() -> nn.Sequential:
    """Four convolutions; eight channels of each of the first three may go."""
    torch.manual_seed(0)
    first, second, third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()


def two_losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out = model(x)
    return {"a": out[:, 0].square().mean(), "b": out[:, 1].square().mean()}


@pytest.mark.parametrize(
    ("round_to", "most", "holds"),
    [(4, 12, "round_to=4; 6 "), ("auto", 18, "round_to='auto'; 6 "), (1, 21, "6 "), (None, 21, "6 ")],
)
def test_rounding_is_named_where_it_holds_the_rest(round_to: Any, most: int, holds: str) -> None:
    """Of eight channels four stay if the rest is a multiple of 4, two if of 2 (a quarter of the width), else one."""
    x = torch.randn(2, 3, 8, 8)
    why = re.escape(f"What holds the rest: {holds}(makes an output of the model)")
    with pytest.raises(ValueError, match=rf"at most {most} of 24 channels .* {why}$"):
        remove_channels(chain(), two_losses, [x], x, 0.9, round_to=round_to)


def test_what_was_not_scored_is_not_said_to_be_unreached() -> None:
    x, net = torch.randn(2, 3, 8, 8), chain()
    report = remove_channels(net, two_losses, [x], x, 0.3, parameters=[(net[0], "weight")])
    assert report.skipped == {
        "6": "makes an output of the model",
        **dict.fromkeys(("2", "4"), "has no scored parameter"),
    }


@pytest.mark.filterwarnings("ignore:parameters. .* are reached by no task")
def test_what_was_scored_in_vain_is_unreached() -> None:
    def losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        model(x)
        return two_losses(model[:3], x)

    x = torch.randn(2, 3, 8, 8)
    assert remove_channels(chain(), losses, [x], x, 0.3).skipped["4"] == "reached by no task"


def test_too_few_batches_advise_only_what_the_call_takes() -> None:
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"found 3 with 1 in data; pass num_batches=1$"):
        remove_channels(chain(), two_losses, [x], x, 0.5, num_batches=3)


def test_a_count_instead_of_a_fraction() -> None:
    report = remove(build("batchnorm"), 7)
    assert report.channels.before - report.channels.after == 7


def test_loss_scales_do_not_matter() -> None:
    def scaled(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"dense": 1e4 * losses(model, batch)["dense"], "label": losses(model, batch)["label"]}

    plain, other = build("batchnorm"), build("batchnorm")
    first = remove(plain)
    second = remove_channels(other, scaled, batches(), batches()[0], 0.5)
    assert [cut.positions.tolist() for cut in first.plan.cuts] == [cut.positions.tolist() for cut in second.plan.cuts]


class Auxiliary(TwoTasks):
    """Runs a layer in training only, whose output nobody sees when the graph is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(16, 2, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = super().forward(x)
        if self.training:
            out["auxiliary"] = self.auxiliary(self.norm(self.stem(x)))
        return out


def test_a_layer_that_runs_in_training_only_keeps_its_inputs() -> None:
    torch.manual_seed(0)
    model = Auxiliary().eval()
    report = remove(model, 0.3)
    assert model.stem.out_channels == 16 == model.auxiliary.in_channels
    assert any("breaks the model" in reason for reason in report.skipped.values())
    assert report.skipped["unused"] == "does not run"
    model.train()(batches()[0])


class Scrambled(TwoTasks):
    """Reads channels in reversed order, which no dependency graph of autograd can see."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        trunk = self.blocks(self.norm(self.stem(x)).relu())
        deep = self.down(trunk).relu().flip(1)
        dense = self.dense(torch.cat([trunk, self.up(deep)], 1))
        return {"dense": self.dense_out(dense), "label": self.label_out(self.hidden(deep.mean((2, 3))).relu())}


def test_a_silent_mismatch_is_found_before_anything_is_removed() -> None:
    torch.manual_seed(0)
    model = Scrambled().eval()
    report = remove(model)
    assert model.down.out_channels == 32
    assert "differ from those with masked channels" in report.skipped["down"]
    assert report.deviation < 1e-5
    loose = Scrambled().eval()
    assert remove(loose, exact=False).deviation > 1e-2


@dataclasses.dataclass
class Answer:
    dense: Tensor
    label: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, name)


@pytest.mark.parametrize(
    "pack",
    [
        lambda d: Answer(**d),
        lambda d: {**d, "extra": None},
        lambda d: {"dense": d["dense"], "label": d["label"], "n": 3},
    ],
    ids=["dataclass", "None", "int"],
)
def test_kinds_of_output(pack: Any) -> None:
    class Packed(TwoTasks):
        def forward(self, x: Tensor) -> Any:
            return pack(super().forward(x))

    torch.manual_seed(0)
    report = remove(Packed().eval())
    assert report.achieved == pytest.approx(0.5, abs=0.01)
    assert set(report.skipped) == {"dense_out", "label_out"}


@pytest.mark.parametrize("form", [lambda x: (x,), lambda x: [x], lambda x: {"x": x}], ids=["tuple", "list", "dict"])
def test_kinds_of_input(form: Any) -> None:
    model = build("batchnorm")
    remove_channels(model, losses, batches(), form(batches()[0]), 0.5)
    assert count(model) < count(build("batchnorm"))


def _masked(model: nn.Module) -> None:
    key = prunable_parameters(model)[0]
    DiSparseStatic.apply(*key, 0.5, importance_scores=torch.rand_like(getattr(*key)))


def _normed(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.down)


def _frozen(model: nn.Module) -> None:
    model.requires_grad_(False)


def _nan(model: nn.Module) -> None:
    with torch.no_grad():
        model.down.weight[0, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (None, {"amount": 1.0}, "at most"),
        (None, {"amount": 10**9}, "at most"),
        (None, {"amount": 0.9, "max_pruning_ratio": 0.5}, "at most"),
        (None, {"amount": 1.5}, "amount"),
        (None, {"of": "flops"}, "of: must be"),
        (None, {"reduction": "median"}, "reduction"),
        (None, {"arbiter": "nobody"}, "arbiter: must be one of"),
        (None, {"across": "nobody"}, "across: must be one of"),
        (None, {"across": 3}, "across: must be a name or a callable"),
        (None, {"criterion": "nothing"}, "criterion"),
        (None, {"round_to": 0}, "round_to"),
        (None, {"max_pruning_ratio": 2.0}, "max_pruning_ratio"),
        (None, {"exclude": [nn.Linear(1, 1)]}, "exclude"),
        (None, {"example_inputs": torch.zeros(1, 4, 16, 16)}, "example_inputs"),
        (None, {"example_inputs": torch.zeros(7)}, "example_inputs"),
        (None, {"data": []}, "data"),
        (_masked, {}, "must carry no masks"),
        (_normed, {}, "parametrization"),
        (_frozen, {}, "all frozen"),
        (_nan, {}, "finite"),
    ],
)
def test_errors_leave_the_model_as_it_was(spoil: Any, options: dict[str, Any], words: str) -> None:
    model = build("batchnorm")
    if spoil is not None:
        spoil(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = {"data": batches(), "example_inputs": batches()[0], "amount": 0.5, **options}
    with pytest.raises((ValueError, TypeError), match=words):
        remove_channels(model, losses, **arguments)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) or before[name].isnan().any() for name in before)
    model(torch.zeros(INPUT))


def _masked_by_torch(model: nn.Module) -> None:
    prune.random_unstructured(model.down, "weight", 0.5)


def _spectral(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.spectral_norm(model.down)


def _old_normed(model: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model.down)


@pytest.mark.parametrize("spoil", [_masked_by_torch, _normed, _spectral, _old_normed], ids=lambda f: f.__name__)
def test_what_a_model_makes_anew_is_not_replayed_on(spoil: Any, tmp_path: Path) -> None:
    report = remove(build("batchnorm"))
    report.save(tmp_path / "removed")
    model = build("batchnorm")
    spoil(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"down must hold its weight as a plain tensor"):
        replay_removal(model, tmp_path / "removed")
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_random_states_are_as_before() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.last = nn.Conv2d(3, 8, 3), nn.Dropout(), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.drop(self.first(x + 0 * random.random() + 0 * np.random.rand())))

    def of_noise(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        out = model(x)
        return {"a": out[:, 0].square().mean(), "b": out[:, 1].square().mean()}

    model, x = Noisy(), torch.randn(2, 3, 8, 8)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    remove_channels(model, of_noise, [x], x, 0.5)
    assert model.first.out_channels == 4
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[2]) == before[1:]


def test_multihead_attention_of_torch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.dense_out, self.label_out = nn.Linear(16, 2), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.norm(self.first(x))
            h = h + self.attention(h, h, h, need_weights=False)[0]
            return {"dense": self.dense_out(h), "label": self.label_out(h.mean(1))}

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 5, 6)
    before = count(net)
    report = remove_channels(net, losses, [x], x, 0.5, exact=False)
    assert net.attention.embed_dim == 8
    assert net(x)["label"].shape == (2, 3)
    assert report.parameters.after == count(net) < before


def test_the_transformer_keeps_whole_heads() -> None:
    model = TwoTaskTransformer().eval()
    remove(model, 0.7)
    for block in model.blocks:
        assert block.attn.qkv.out_features == 3 * block.attn.num_heads * block.attn.head_dim
        assert block.attn.scale == block.attn.head_dim**-0.5


def test_torch_pruning_is_named_when_missing_and_the_package_does_without() -> None:
    code = (
        "import sys; sys.modules['torch_pruning'] = None\n"
        "import disparse_plugin\n"
        "try:\n    import disparse_plugin.structured\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'disparse-plugin[structured]'" in done.stdout


def test_masks_after_removal() -> None:
    """Channels first, single weights after: both tools on one model."""
    model = build("batchnorm")
    remove(model)
    layer = model.blocks[0].conv2
    DiSparseStatic.apply(layer, "weight", 0.5, importance_scores=torch.rand_like(layer.weight))
    assert prune.is_pruned(model)
    model(batches()[0])


def test_the_memory_format_and_notes_on_parameters_stay() -> None:
    model = TwoTasks().to(memory_format=torch.channels_last)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        convolution.weight._no_weight_decay = True  # type: ignore[attr-defined]
    before = [convolution.weight.is_contiguous() for convolution in convolutions]
    remove(model)
    assert [convolution.weight.is_contiguous() for convolution in convolutions] == before
    assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convolutions)
    assert all(convolution.weight._no_weight_decay for convolution in convolutions)
