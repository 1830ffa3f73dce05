"""Where names of other projects are documented, without asking their sites.

Sphinx links a name such as ``torch.Tensor`` by an inventory that it fetches from the other site, which fails offline.
The names that our pages use are few, so their inventories are written here.
"""

import zlib
from pathlib import Path

SITES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
    "numpy": "https://numpy.org/doc/stable/",
}
PRUNE = ("prune.BasePruningMethod", "prune.global_unstructured", "prune.is_pruned", "prune.remove")
NAMES = {
    "python": {
        **{f"collections.abc.{name}": ("class", f"library/collections.abc.html#collections.abc.{name}")
           for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")},
        **{name: ("class", f"library/stdtypes.html#{name}") for name in ("dict", "list", "tuple", "set", "range")},
        **{name: ("class", f"library/functions.html#{name}") for name in ("bool", "float", "int")},
        **{name: ("exception", f"library/exceptions.html#{name}")
           for name in ("ImportError", "RuntimeError", "TypeError", "ValueError")},
        "str": ("class", "library/stdtypes.html#str"),
        "os.PathLike": ("class", "library/os.html#os.PathLike"),
        "pathlib.Path": ("class", "library/pathlib.html#pathlib.Path"),
        "typing.Any": ("data", "library/typing.html#typing.Any"),
    },
    "torch": {
        "torch.Tensor": ("class", "tensors.html#torch.Tensor"),
        "torch.device": ("class", "tensor_attributes.html#torch.device"),
        "torch.dtype": ("class", "tensor_attributes.html#torch.dtype"),
        "torch.Generator": ("class", "generated/torch.Generator.html"),
        "torch.nn.Module": ("class", "generated/torch.nn.Module.html"),
        "torch.nn.modules.module.Module": ("class", "generated/torch.nn.Module.html"),
        "torch.nn.parameter.Parameter": ("class", "generated/torch.nn.parameter.Parameter.html"),
        "torch.optim.Optimizer": ("class", "optim.html#torch.optim.Optimizer"),
        "torch.optim.optimizer.Optimizer": ("class", "optim.html#torch.optim.Optimizer"),
        "torch.amp.GradScaler": ("class", "amp.html#torch.amp.GradScaler"),
        **{f"torch.nn.utils.{name}": ("class" if "Base" in name else "function",
                                      f"generated/torch.nn.utils.{name}.html") for name in PRUNE},
    },
    "lightning": {
        "lightning.pytorch.callbacks.callback.Callback": ("class", "api/lightning.pytorch.callbacks.Callback.html"),
        "lightning.pytorch.core.module.LightningModule": ("class", "common/lightning_module.html"),
        "lightning.pytorch.trainer.trainer.Trainer": ("class", "common/trainer.html"),
    },
    "matplotlib": {
        "matplotlib.axes.Axes": ("class", "api/_as_gen/matplotlib.axes.Axes.html"),
        "matplotlib.axes._axes.Axes": ("class", "api/_as_gen/matplotlib.axes.Axes.html"),
        "matplotlib.figure.Figure": ("class", "api/_as_gen/matplotlib.figure.Figure.html"),
    },
    "numpy": {"numpy.ndarray": ("class", "reference/generated/numpy.ndarray.html")},
}  # fmt: skip


def write(folder: Path) -> dict[str, tuple[str, str]]:
    """Write an inventory for each project and return Sphinx's ``intersphinx_mapping``."""
    folder.mkdir(parents=True, exist_ok=True)
    for project, names in NAMES.items():
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        lines = "".join(f"{name} py:{role} 1 {place} -\n" for name, (role, place) in names.items())
        (folder / f"{project}.inv").write_bytes(head.encode() + zlib.compress(lines.encode()))
    return {project: (site, str(folder / f"{project}.inv")) for project, site in SITES.items()}
