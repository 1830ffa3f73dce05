"""Real timm trunks and SMP decoders with several heads: the three lines, on models as people have them."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from disparse_plugin import DiSparsePretrained, disparse_pretrained, layer_adaptive, prunable_parameters, score_tasks
from networks import Snapshot

timm = pytest.importorskip("timm", reason="needs timm: pip install 'disparse-plugin[examples]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SMP's own imports
    smp = pytest.importorskip(
        "segmentation_models_pytorch", reason="needs SMP: pip install 'disparse-plugin[examples]'"
    )

TRUNKS = {
    "resnet18": {"zero_init_last": False},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 32},
}


class Heads(nn.Module):
    """A timm trunk with one linear head per task, as users write it."""

    def __init__(self, trunk, classes):
        super().__init__()
        self.trunk = trunk
        features = trunk(torch.zeros(2, 3, 32, 32)).shape[1]
        self.heads = nn.ModuleDict({task: nn.Linear(features, count) for task, count in classes.items()})

    def forward(self, images):
        features = self.trunk(images)
        return {task: head(features) for task, head in self.heads.items()}


def classification_losses(model, batch):
    images, labels = batch
    return {task: F.cross_entropy(output, labels) for task, output in model(images).items()}


def segmentation_losses(model, batch):
    images, labels = batch
    mask, label = model(images)
    return {"mask": mask.square().mean(), "label": F.cross_entropy(label, labels)}


def batches(size, classes=2, count=2):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(2, 3, size, size, generator=generator), torch.randint(classes, (2,), generator=generator))
        for _ in range(count)
    ]


def check_three_lines(model, losses, data, shared, tasks):
    """Prune to exactly 90 % and see that the trunk is shared, heads are private, outputs are finite, training works."""
    before = Snapshot(model)
    scores = score_tasks(model, losses, data, criterion=layer_adaptive("taylor"))
    before.check()
    assert scores.tasks == tasks
    for name, key in zip(scores.names, scores.parameters, strict=True):
        assert (len(scores.tasks_reaching(*key)) == len(tasks)) == name.startswith(shared), name
    prune.global_unstructured(scores.parameters, DiSparsePretrained, importance_scores=scores.importance(), amount=0.9)
    total = sum(module.weight.numel() for module, _ in scores.parameters)
    assert sum(int((module.weight_mask == 0).sum()) for module, _ in scores.parameters) == round(0.9 * total)
    for _ in range(2):
        sum(losses(model.train(), data[0]).values()).backward()
    assert all(torch.isfinite(loss) for loss in losses(model, data[0]).values())


@pytest.mark.parametrize("name", TRUNKS)
def test_timm_trunks(name):
    classes = {"a": 2, "b": 3} if name == "resnet18" else {"a": 2, "b": 3, "c": 5}
    model = Heads(timm.create_model(name, pretrained=False, num_classes=0, **TRUNKS[name]), classes)
    check_three_lines(model, classification_losses, batches(32), "trunk", tuple(classes))


@pytest.mark.parametrize("decoder", ["Unet", "FPN", "DeepLabV3Plus"])
def test_smp_decoders(decoder):
    model = getattr(smp, decoder)("mobilenet_v2", encoder_weights=None, classes=1, aux_params={"classes": 2})
    check_three_lines(model, segmentation_losses, batches(64), "encoder", ("mask", "label"))


def test_a_layer_that_never_runs_is_left_whole():
    """SMP's timm EfficientNet carries a last convolution that no forward uses."""
    with pytest.warns(DeprecationWarning, match="timm-"):
        model = smp.Unet("timm-efficientnet-b0", encoder_weights=None, classes=1, aux_params={"classes": 2})
    with pytest.warns(UserWarning, match=r"encoder\.conv_head\.weight"):
        scores = disparse_pretrained(model, segmentation_losses, batches(32), 0.9)
    assert scores.unreached == ("encoder.conv_head.weight",)
    assert not prune.is_pruned(model.encoder.conv_head)


def test_zero_initialised_branches_are_pointed_out():
    """timm starts residual branches multiplied by zero, so all of their weights score zero at initialisation."""
    model = Heads(timm.create_model("resnet18", pretrained=False, num_classes=0), {"a": 2, "b": 3})
    with pytest.warns(UserWarning, match=r"alive weights of task '[ab]' score exactly zero; where they do"):
        score_tasks(model, classification_losses, batches(32))


READS_QKV = {
    "swinv2_tiny_window8_256": {"img_size": 64, "depths": (1, 1), "num_heads": (3, 6)},
    "beit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1},
}


@pytest.mark.parametrize("name", READS_QKV)
def test_attention_that_reads_qkv_directly_is_left_out(name):
    """These read ``self.qkv.weight`` in the attention's forward, so the hook of ``qkv`` would never fire."""
    options = READS_QKV[name]
    if name.startswith("beit"):  # registered in other sizes only
        trunk = timm.models.beit.Beit(embed_dim=192, num_heads=3, num_classes=0, **options)
    else:
        trunk = timm.create_model(name, pretrained=False, num_classes=0, **options)
    model = nn.ModuleDict({"trunk": trunk, "a": nn.Linear(192, 2), "b": nn.Linear(192, 2)})

    def losses(model, images):
        features = model["trunk"](images)[..., :192]
        return {task: model[task](features).square().mean() for task in ("a", "b")}

    data = [torch.randn(2, 3, options["img_size"], options["img_size"])]
    with pytest.warns(UserWarning, match=r"cannot be masked .*qkv\.weight \(a parent reads it directly") as seen:
        scores = disparse_pretrained(model, losses, data, 0.5, criterion=layer_adaptive("magnitude"))
    assert len(seen) == 1
    assert all(name.endswith("qkv.weight") for name in scores.skipped)
    total = sum(module.weight.numel() for module, _ in scores.parameters)
    assert sum(int((module.weight_mask == 0).sum()) for module, _ in scores.parameters) == round(0.5 * total)
    fresh = prunable_parameters(model)
    with pytest.raises(ValueError, match=r"qkv\.weight must be used by its own module's forward.*exclude=\['trunk"):
        score_tasks(model, losses, data, parameters=fresh)


@pytest.mark.parametrize("layer", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d"])
def test_weight_standardised_convolutions_are_left_out(layer):
    """They multiply with the standardised weight, where the zeros of a mask are not zeros."""
    first = getattr(timm.layers, layer)(3, 8, 3, padding=1)
    trunk = nn.Sequential(first, nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Heads(trunk, {"a": 2, "b": 3})
    data = [(images, labels % 2) for images, labels in batches(32)]
    with pytest.warns(UserWarning, match=rf"trunk\.0\.weight \({layer} multiplies with something .*\(batch_norm\)"):
        scores = disparse_pretrained(model, classification_losses, data, 0.5)
    assert list(scores.skipped) == ["trunk.0.weight"]
    assert scores.names == ("trunk.1.weight", "heads.a.weight", "heads.b.weight")
