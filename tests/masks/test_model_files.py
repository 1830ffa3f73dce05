"""One file for a pruned model: whatever was done to it, a freshly built one becomes the same."""

import copy
import json

import pytest
import timm
import torch
import torch_pruning as tp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from disparse_plugin import disparse_static, load_pruned, save_pruned
from disparse_plugin._support.files import read_tensors
from disparse_plugin.masks import attach_masks, clone_pruned, fold, masks_of
from disparse_plugin.sparse_training import DiSparseDynamic, DiSparseScheduler
from disparse_plugin.structured import remove_channels
from masks import equal_masks
from networks import Snapshot, TwoHeads, digit_batches, digit_losses
from structured_networks import TwoTasks


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def outputs(model, x):
    with torch.no_grad():
        found = model.eval()(x)
    return torch.cat([value.flatten() for value in (found.values() if isinstance(found, dict) else [found])])


def loses_nothing(model, fresh, path, x):
    """Save one model and load it into another: the same outputs, state, masks and attributes."""
    before = Snapshot(model)
    save_pruned(model, path, facts={"amount": 0.5})
    before.check()
    assert load_pruned(fresh, path) == {"amount": 0.5}
    saved, loaded = model.state_dict(), fresh.state_dict()
    assert list(saved) == list(loaded)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert equal_masks(masks_of(model), masks_of(fresh))
    assert torch.equal(outputs(fresh, x), outputs(model, x))
    for one, other in zip(model.modules(), fresh.modules(), strict=True):
        assert str(one) == str(other)
        assert type(one) is type(other)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in fresh.named_parameters()]


DIGITS = digit_batches(1)[0][0]


def pruned(model=None, amount=0.9):
    model = TwoHeads().eval() if model is None else model
    disparse_static(model, digit_losses, digit_batches(), amount)
    return model


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def image_losses(model, x):
    return {task: output.square().mean() for task, output in model(x).items()}


def removed(model=None):
    model = TwoTasks().eval() if model is None else model
    remove_channels(model, image_losses, [IMAGES], IMAGES, 0.4)
    return model


class TestWhatWasDoneToIt:
    def test_nothing(self, path):
        loses_nothing(TwoHeads().eval(), TwoHeads(), path, DIGITS)

    def test_masks(self, path):
        model, fresh = pruned(), TwoHeads()
        loses_nothing(model, fresh, path, DIGITS)
        assert torch.equal(fresh.trunk[0].weight, model.trunk[0].weight)  # before any forward
        assert torch.equal(outputs(fold(fresh), DIGITS), outputs(model, DIGITS))

    def test_masks_of_torch_itself_and_of_other_parameters(self, path):
        model = TwoHeads().eval()
        prune.l1_unstructured(model.trunk[0], "bias", 2)
        prune.ln_structured(model.trunk[3], "weight", 0.5, 2, 0)
        prune.random_unstructured(model.trunk[3], "weight", 0.5)  # a container of two
        loses_nothing(model, TwoHeads(), path, DIGITS)

    def test_masks_that_are_not_of_zeros_and_ones(self, path):
        model, fresh = TwoHeads().eval(), TwoHeads()
        prune.custom_from_mask(model.heads["a"], "weight", torch.rand(3, 96).round(decimals=1))
        save_pruned(model, path)
        load_pruned(fresh, path)
        assert torch.equal(fresh.heads["a"].weight_mask, model.heads["a"].weight_mask)
        assert torch.equal(outputs(fresh, DIGITS), outputs(model, DIGITS))

    def test_channels_that_are_gone(self, path):
        model = removed()
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in TwoTasks().parameters())
        loses_nothing(model, TwoTasks(), path, IMAGES)

    def test_both_in_either_order(self, path):
        model = removed()
        disparse_static(model, image_losses, [IMAGES], 0.5)
        loses_nothing(model, TwoTasks(), path, IMAGES)

    @pytest.mark.parametrize("kind", [list, tuple])
    def test_split_sizes_in_lists_and_tuples(self, kind, path):
        class Gate(nn.Module):
            def __init__(self):
                super().__init__()
                self.sizes = kind((8, 8))
                self.stem, self.both = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 16, 1)
                self.a, self.b = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 2, 1)

            def forward(self, x):
                values, gates = torch.split(self.both(self.stem(x)), list(self.sizes), 1)
                hidden = values * gates.sigmoid()
                return {"a": self.a(hidden), "b": self.b(hidden)}

        model, fresh = removed(Gate().eval()), Gate()
        assert model.both.out_channels < 16
        loses_nothing(model, fresh, path, IMAGES)
        left = model.both.out_channels // 2
        assert fresh.sizes == kind((left, left))

    def test_memory_format_and_attributes_are_those_of_the_built_model(self, path):
        def build():
            model = TwoTasks().to(memory_format=torch.channels_last)
            model.stem.weight._no_weight_decay = True
            return model

        model, fresh = removed(build().eval()), build()
        loses_nothing(model, fresh, path, IMAGES)
        assert fresh.stem.weight.shape[0] < TwoTasks().stem.weight.shape[0]
        assert fresh.stem.weight._no_weight_decay
        for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
            assert one.stride() == other.stride()

    def test_which_numbers_are_set(self, path):
        class Scaled(nn.Linear):
            def __init__(self, times, *sizes):
                super().__init__(*sizes)
                self.times = times

        def build(times, width, size):
            pool = nn.MaxPool2d(size)
            return nn.Sequential(
                nn.Linear(2, width), Scaled(times, width, 4), Scaled(times, 4, 12), nn.Unflatten(1, (3, 4)), pool
            )

        model, fresh = build(3, 6, 2), build(5, 8, 4)  # as if two channels had been removed from the first layer
        save_pruned(model, path)
        load_pruned(fresh, path)
        assert (fresh[0].out_features, fresh[1].in_features) == (6, 6)
        assert fresh[1].times == 3  # its weight became smaller
        assert fresh[2].times == 5  # its weight did not
        assert fresh[4].kernel_size == 2  # without parameters: it might be a width

    def test_files_from_before_lists_were_kept(self, path):
        model, fresh = removed(), TwoTasks()
        fresh.picks = [1, 2]  # the model has it, the file does not
        loses_nothing(model, fresh, path, IMAGES)
        assert fresh.picks == [1, 2]

    @pytest.mark.parametrize("norm", [lambda width: nn.GroupNorm(4, width), nn.InstanceNorm2d])
    def test_other_norms_and_grouped_convolutions(self, norm, path):
        model = removed(TwoTasks(norm, groups=4).eval())
        loses_nothing(model, TwoTasks(norm, groups=4), path, IMAGES)

    @pytest.mark.filterwarnings("ignore:Unwrapped parameters")
    def test_whole_attention_heads_removed_by_another_package(self, path):
        def build():
            return timm.create_model(
                "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=4, num_classes=5
            ).eval()

        model, x = build(), torch.randn(2, 3, 32, 32)
        pruner = tp.pruner.BasePruner(
            model,
            x,
            importance=tp.importance.MagnitudeImportance(),
            pruning_ratio=0.5,
            ignored_layers=[model.head],
            num_heads={block.attn.qkv: 4 for block in model.blocks},
            prune_num_heads=True,
            head_pruning_ratio=0.5,
        )
        pruner.step()
        for block in model.blocks:
            attention = block.attn
            attention.num_heads = pruner.num_heads[attention.qkv]
            attention.head_dim = attention.qkv.out_features // 3 // attention.num_heads
            attention.attn_dim = attention.qkv.out_features // 3
            attention.scale = attention.head_dim**-0.5
        try:
            outputs(model, x)
        except RuntimeError as error:
            pytest.skip(f"needs a timm whose attention runs without some of its heads: {error}")
        loses_nothing(model, build(), path, x)

    def test_heads_and_widths_of_a_transformer(self, path):
        class Sentence(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Linear(6, 16)
                self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
                self.a, self.b = nn.Linear(16, 3), nn.Linear(16, 2)

            def forward(self, x):
                h = self.layer(self.embed(x)).mean(1)
                return {"a": self.a(h), "b": self.b(h)}

        model, x = Sentence().eval(), torch.randn(4, 5, 6)
        remove_channels(model, image_losses, [x], x, 0.4)
        assert model.layer.linear1.out_features < 32
        loses_nothing(model, Sentence(), path, x)

    def test_sparse_training_goes_on(self, path):
        model = TwoHeads().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        DiSparseScheduler(model, optimizer, digit_losses, amount=0.6, update_every=2, stop_at=20)
        fresh = TwoHeads()
        loses_nothing(model, fresh, path, DIGITS)
        assert DiSparseDynamic.find(fresh.trunk[0], "weight").PRUNING_TYPE == "unstructured"

    def test_tied_and_recurrent_parameters(self, path):
        class Tagger(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.embed, self.lstm = nn.Embedding(11, 6), nn.LSTM(6, width, batch_first=True)
                self.back = nn.Linear(width, 6)
                self.out = nn.Linear(6, 11, bias=False)
                self.out.weight = self.embed.weight

            def forward(self, x):
                return self.out(self.back(self.lstm(self.embed(x))[0]))

        model, fresh = Tagger(5).eval(), Tagger(8)
        prune.l1_unstructured(model.back, "weight", 0.5)
        words = torch.randint(11, (2, 7))
        loses_nothing(model, fresh, path, words)  # fewer hidden units, whoever took them
        assert fresh.out.weight is fresh.embed.weight


class TestWrappers:
    def test_an_averaged_copy(self, path):
        model = pruned()
        average = AveragedModel(clone_pruned(model))
        average.update_parameters(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        average.update_parameters(model)
        save_pruned(average, path)
        fresh = TwoHeads()
        load_pruned(fresh, path)
        assert torch.equal(outputs(fresh, DIGITS), outputs(average, DIGITS))
        assert not torch.equal(outputs(fresh, DIGITS), outputs(model, DIGITS))

    def test_compiled_as_a_whole_and_in_part(self, path):
        model = pruned()
        expected = outputs(model, DIGITS)
        whole, part = torch.compile(model, backend="eager"), copy.deepcopy(clone_pruned(model))
        part.trunk = torch.compile(part.trunk, backend="eager")
        for wrapped in (whole, part):
            save_pruned(wrapped, path)
            fresh, again = TwoHeads(), TwoHeads()
            again.trunk = torch.compile(again.trunk, backend="eager")
            for target in (fresh, torch.compile(TwoHeads(), backend="eager"), again):
                load_pruned(target, path)
                assert torch.equal(outputs(target, DIGITS), expected)

    def test_data_parallel(self, path, tmp_path):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model = pruned()
            save_pruned(nn.parallel.DistributedDataParallel(model), path)
            fresh = TwoHeads()
            load_pruned(nn.parallel.DistributedDataParallel(fresh), path)
            assert torch.equal(outputs(fresh, DIGITS), outputs(model, DIGITS))
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("around", [lambda model: model, torch.compile, AveragedModel])
    def test_data_parallel_would_not_sync_what_became_smaller(self, path, tmp_path, around):
        model, fresh = removed(), TwoTasks()
        save_pruned(model, path)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            wrapped = around(nn.parallel.DistributedDataParallel(fresh))
            before = Snapshot(wrapped)
            with pytest.raises(ValueError, match=r"model: must not be in Distributed.* wrap that anew"):
                load_pruned(wrapped, path)
            before.check()
            load_pruned(fresh, path)
            anew = nn.parallel.DistributedDataParallel(fresh)
            assert torch.equal(outputs(anew, IMAGES), outputs(model, IMAGES))
        finally:
            torch.distributed.destroy_process_group()


class TestRefusals:
    def test_torch_s_own_load_says_what_to_call(self, path):
        for model, fresh in ((pruned(), TwoHeads()), (removed(), TwoTasks()), (TwoHeads(), TwoHeads())):
            save_pruned(model, path)
            with pytest.raises(RuntimeError, match=r"load this file with disparse_plugin\.load_pruned\(model, path\)"):
                fresh.load_state_dict(load_file(path))

    def test_what_does_not_fit_changes_nothing(self, path):
        save_pruned(pruned(), path)
        masked = TwoHeads()
        prune.random_unstructured(masked.trunk[0], "weight", 1)
        cases = [
            (masked, r"model: must be as built, without masks, found 1 \(first: trunk.0.weight\)"),
            (
                TwoHeads(width=5),
                r"model: trunk.0.bias must be at least as large .*, \(6,\), found \(5,\)",
            ),
            (TwoHeads("abc"), r"found 2 that it has besides \(first: heads.c.bias\)"),
            (TwoHeads("a"), r"found 2 that it lacks \(first: heads.b.bias\)"),
            (nn.Linear(2, 2), "found 13 that it lacks"),
            (TwoHeads().to("meta"), r"found the meta device; model.to_empty\(device=...\) first"),
        ]
        for model, message in cases:
            before = None if next(model.parameters()).is_meta else Snapshot(model)
            with pytest.raises(ValueError, match=message):
                load_pruned(model, path)
            assert before is None or before.check() is None

    def test_a_failure_half_way_changes_nothing(self, path, monkeypatch):
        save_pruned(removed(), path)
        model = TwoTasks()
        before, printed = Snapshot(model), str(model)

        def fail(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(TwoTasks, "load_state_dict", fail)
        with pytest.raises(KeyboardInterrupt):
            load_pruned(model, path)
        monkeypatch.undo()
        before.check()
        assert str(model) == printed

    def test_what_a_file_cannot_hold(self, path):
        class Extra(nn.Linear):
            def get_extra_state(self):
                return {"a": 1}

            def set_extra_state(self, state):
                pass

        sparse = nn.Linear(2, 2)
        sparse.register_buffer("adjacency", torch.eye(2).to_sparse())
        for model, message in (
            (Extra(2, 2), "found dict as _extra_state"),
            (nn.LazyLinear(2), "found a lazy parameter"),
            (sparse, "adjacency must be a dense tensor"),
        ):
            with pytest.raises(ValueError, match=message):
                save_pruned(model, path)
            assert not path.exists()

    @pytest.mark.parametrize(
        "edit",
        [
            lambda tensors, facts: facts["numbers"]["stem"].update(out_channels="many"),
            lambda tensors, facts: facts["order"].append("more"),
            lambda tensors, facts: facts["order"].append(facts["order"][0]),
            lambda tensors, facts: facts["masks"].update({"stem.weight": [1]}),
            lambda tensors, facts: facts.pop("numbers"),
            lambda tensors, facts: facts["masks"].update({"none": [1]}),
        ],
    )
    def test_without_a_checksum_all_is_checked(self, edit, path):
        model, fresh = removed(), TwoTasks()
        disparse_static(model, image_losses, [IMAGES], 0.5)
        save_pruned(model, path)
        tensors, facts = read_tensors(path, kind="disparse_plugin.model")
        edit(tensors, facts)
        save_file(tensors, path, {"kind": "disparse_plugin.model", "version": "1", "facts": json.dumps(facts)})
        before = Snapshot(fresh)
        with pytest.raises(ValueError, match=r"path: must be|model: stem\.out_channels must be like 16"):
            load_pruned(fresh, path)
        before.check()


class Twice(nn.Module):
    """Registers its trunk under two names."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.net = nn.Sequential(self.trunk, nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("masked", ["trunk", "net.2", ""])
def test_a_module_may_have_two_names(masked, path):
    model = Twice()
    if masked:
        prune.random_unstructured(model.get_submodule(masked), "weight", 0.5)
    fresh = Twice()
    loses_nothing(model, fresh, path, torch.randn(3, 4))
    assert fresh.net[0] is fresh.trunk


def is_normal(model):
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers, vars(module))]
    return not any(isinstance(t, torch.Tensor) and t.is_inference() for table in tables for t in table.values())


@pytest.mark.parametrize("how", ["one shot", "attach", "load"])
def test_what_is_pruned_in_inference_mode_can_be_trained_outside(how, tmp_path):
    model, source, batches = TwoHeads(), TwoHeads(), digit_batches(2)
    disparse_static(source, digit_losses, batches, 0.5)
    save_pruned(source, tmp_path / "net.safetensors")
    with torch.inference_mode():
        if how == "one shot":
            disparse_static(model, digit_losses, batches, 0.5)
        elif how == "attach":
            attach_masks(model, {name: mask.bool() for name, mask in masks_of(source).items()})
        elif how == "load":
            load_pruned(model, tmp_path / "net.safetensors")
    assert is_normal(model)
    sum(digit_losses(model, batches[0]).values()).backward()


def test_a_model_made_in_inference_mode_is_refused_with_the_cure():
    with torch.inference_mode():
        model = TwoHeads()
    with pytest.raises(ValueError, match=r"must be a normal tensor, found one made in torch\.inference_mode.*outside"):
        disparse_static(model, digit_losses, digit_batches(1), 0.5)
