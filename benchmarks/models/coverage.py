"""The models of ``structured_coverage.py``: timm backbones with three heads, SMP models with two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Families of timm, a small member of each, and the image size it runs at.
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
SMP = [
    "Unet",
    "UnetPlusPlus",
    "FPN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "PSPNet",
    "PAN",
    "MAnet",
    "Linknet",
    "UPerNet",
    "Segformer",
    "DPT",
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
    """Name all rows."""
    timm = [f"timm/{entry.split()[0]}" for entry in TIMM.replace("\n", "").split("|")]
    return timm + [f"smp/{name}{kind}" for name in SMP for kind in ("", "+2")]


def build(row: str) -> tuple[nn.Module, Tensor]:
    """Build the model of a row, and an input."""
    torch.manual_seed(0)
    library, _, name = row.partition("/")
    model, size = _build_timm(name) if library == "timm" else _build_smp(name)
    _randomize(model)
    return model.eval(), torch.randn(2, 3, size, size)


def _build_timm(name: str) -> tuple[nn.Module, int]:
    import timm

    size = int(dict(entry.split() for entry in TIMM.replace("\n", "").split("|"))[name])
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

    name, _, two = name.partition("+")
    encoder = "tu-vit_tiny_patch16_224" if name == "DPT" else "resnet18"
    options: dict[str, Any] = {"encoder_name": encoder, "encoder_weights": None, "classes": 3}
    size = 128 if name == "PAN" else 64
    if name == "DPT":
        options |= {"dynamic_img_size": True}
    if two:
        return TwoDecoders(getattr(smp, name)(**options), getattr(smp, name)(**options)), size
    return getattr(smp, name)(aux_params={"classes": 4}, **options), size


def _randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for module in model.modules():
            for name in ("weight", "bias", "running_mean"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor) and tensor.dim() == 1:
                    tensor.uniform_(-0.5, 0.5).add_(name == "weight")
            for name, parameter in module.named_parameters(recurse=False):
                if name not in ("weight", "bias") and parameter.numel() == max(parameter.shape, default=0):
                    parameter.uniform_(0.5, 1.5)  # layer scales start near zero and would hide errors
            if isinstance(getattr(module, "running_var", None), Tensor):
                module.running_var.uniform_(0.5, 2)
