"""The rows of ``structured_coverage.py`` from timm and SMP, and where the others come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import hugging_face, modules, vision
from .case import Case, plain, randomize

# Families of timm, a small member of each, and the image size it runs at; the first block is that of version 0.1.0.
TIMM = """
resnet18 64|resnet26d 64|seresnet18 64|legacy_seresnet18 64|skresnet18 64|resnext50_32x4d 64|res2net50_14w_8s 64
|densenet121 64|mobilenetv2_050 64|mobilenetv3_small_050 64|mobilenetv4_conv_small_050 64|efficientnet_b0 64
|tf_efficientnet_lite0 64|tf_efficientnetv2_b0 64|mnasnet_small 64|lcnet_050 64|regnetx_002 64|regnety_002 64
|convnext_atto 64|convnextv2_atto 64|ghostnet_050 64|hrnet_w18_small 64|vgg11_bn 64|vit_tiny_patch16_224 64
|deit_tiny_patch16_224 64|deit_tiny_distilled_patch16_224 64|swin_tiny_patch4_window7_224 224
|maxvit_rmlp_pico_rw_256 256|pvt_v2_b0 64|poolformer_s12 64|caformer_s18 64|edgenext_xx_small 64|levit_128s 224
|mixer_s32_224 224|nf_regnet_b0 64|dla34 64|xception41 64|selecsls42 64|ese_vovnet19b_dw 64|starnet_s1 64|repvgg_a0 64
|mobileone_s0 64|repghostnet_050 64|fastvit_t8 64|efficientformer_l1 224|tiny_vit_5m_224 224|inception_next_atto 64
|cspresnet50 64|rexnet_100 64|focalnet_tiny_srf 64|botnet26t_256 256|coatnet_nano_rw_224 224|mobilevit_xxs 64
|eva02_tiny_patch14_224 224|hiera_tiny_224 224|beit_base_patch16_224 224|cait_xxs24_224 224|xcit_nano_12_p16_224 64
|inception_v3 96|dpn48b 64
"""
MORE_TIMM = """
resnetv2_18 64|resnest14d 64|res2next50 64|eca_resnet33ts 64|gernet_s 64|tresnet_m 64|semnasnet_075 64|fbnetc_100 64
|hardcorenas_a 64|mixnet_s 64|tinynet_e 64|efficientvit_b0 64|efficientvit_m0 224|mobilevitv2_050 64|fasternet_t0 64
|shvit_s1 224|swiftformer_xs 224|repvit_m0_9 64|efficientformerv2_s0 224|convmixer_768_32 64|cs3darknet_focus_s 64
|hgnetv2_b0 64|pit_ti_224 224|visformer_tiny 224|convit_tiny 224|twins_svt_small 224|resmlp_12_224 224
|gmlp_ti16_224 224|davit_tiny 64|gcvit_xxtiny 224|mambaout_femto 64|rdnet_tiny 64|regnetz_005 64|gcresnext26ts 64
|ghostnetv2_100 64|mvitv2_tiny 224|convformer_s18 64
"""
SIZES = {name: int(size) for name, size in (e.split() for e in (TIMM + "|" + MORE_TIMM).replace("\n", "").split("|"))}
OLD_ROWS = 84  # the rows of version 0.1.0, which come first

DECODERS = [
    *("Unet", "UnetPlusPlus", "FPN", "DeepLabV3", "DeepLabV3Plus", "PSPNet"),
    *("PAN", "MAnet", "Linknet", "UPerNet", "Segformer", "DPT"),
]
ENCODERS = [
    *("mobilenet_v2", "efficientnet-b0", "densenet121", "vgg11_bn", "resnext50_32x4d", "se_resnet50"),
    *("xception", "mit_b0", "timm-regnetx_002", "mobileone_s0", "dpn68", "tu-convnext_atto"),
]


class ThreeHeads(nn.Module):
    """A timm backbone with three linear heads."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.a, self.b, self.c = nn.Linear(width, 4), nn.Linear(width, 3), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of the heads."""
        features = self.backbone(x)
        if isinstance(features, tuple):  # distilled models return one vector per token
            features = features[0]
        return self.a(features), self.b(features), self.c(features)


class TwoDecoders(nn.Module):
    """One encoder of SMP with two decoders."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.encoder = first.encoder
        self.decoders = nn.ModuleList([first.decoder, second.decoder])
        self.heads = nn.ModuleList([first.segmentation_head, second.segmentation_head])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of the decoders."""
        features = self.encoder(x)
        arguments = features if isinstance(features, tuple) else (features,)  # DPT's encoder also returns tokens
        return [head(decoder(*arguments)) for decoder, head in zip(self.decoders, self.heads, strict=True)]


def rows() -> list[str]:
    """Name all rows, those of version 0.1.0 first."""
    old = [f"timm/{entry.split()[0]}" for entry in TIMM.replace("\n", "").split("|")]
    old += [f"smp/{name}{kind}" for name in DECODERS for kind in ("", "+2")]
    assert len(old) == OLD_ROWS
    others = [f"timm/{entry.split()[0]}" for entry in MORE_TIMM.replace("\n", "").split("|")]
    others += [f"smp/Unet/{encoder}" for encoder in ENCODERS]
    for library, source in _OTHERS.items():
        others += [f"{library}/{name}" for name in source.NAMES]
    return old + others


def build(row: str) -> Case:
    """Build the case of a row."""
    torch.manual_seed(0)
    library, _, name = row.partition("/")
    if library in _OTHERS:
        case: Case = _OTHERS[library].build(name)
        return case
    model, size = _build_timm(name) if library == "timm" else _build_smp(name)
    return plain(randomize(model), torch.randn(2, 3, size, size))


_OTHERS: dict[str, Any] = {"torchvision": vision, "transformers": hugging_face, "modules": modules}


def _build_timm(name: str) -> tuple[nn.Module, int]:
    import timm

    size = SIZES[name]
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0}
    try:
        backbone = timm.create_model(name, img_size=size, **options)
    except TypeError:
        backbone = timm.create_model(name, **options)
    with torch.no_grad():
        features = backbone.eval()(torch.randn(1, 3, size, size))
    width = (features[0] if isinstance(features, tuple) else features).shape[-1]
    # Some models cache tensors of the graph in evaluation mode.
    return ThreeHeads(backbone.train(), width), size


def _build_smp(name: str) -> tuple[nn.Module, int]:
    import segmentation_models_pytorch as smp

    name, _, encoder = name.partition("/")
    name, _, two = name.partition("+")
    options: dict[str, Any] = {"encoder_name": encoder or "resnet18", "encoder_weights": None, "classes": 3}
    size = 128 if name == "PAN" else 64
    if name == "DPT":
        options |= {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True}
    if two:
        return TwoDecoders(getattr(smp, name)(**options), getattr(smp, name)(**options)), size
    return getattr(smp, name)(aux_params={"classes": 4}, **options), size
