"""How the paper trained: tasks, loss weights and hyperparameters of every data set (Sun et al., CVPR 2022).

The values are those of the configuration files that the authors published; they follow AdaShare (Sun et al., NeurIPS
2020). What the authors did otherwise is not followed: the best iteration was chosen on the test set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class PaperSetup:
    """Everything that is needed to train as the paper did on one data set.

    Training is by Adam with an L2 penalty; the learning rate falls by ``rate_factor`` every ``rate_every`` iterations.
    The network is ``paper_network.PaperNetwork(setup.classes)``: DeepLab on ResNet-34, one head per task.
    """

    classes: Mapping[str, int]  # outputs of every task
    weights: Mapping[str, float]  # of the tasks' losses in joint training; scores are taken of unweighted losses
    crop: int  # height and width of training pictures
    test_size: tuple[int, int]  # height and width of test pictures
    iterations: int
    rate: float
    rate_factor: float
    rate_every: int
    dynamic_stop: int  # iteration after which the mask is fixed
    dynamic_every: int  # iterations between two updates of the mask
    tuning_iterations: int  # after pruning trained weights
    tuning_rate: float
    scoring_batch: int  # samples per batch while scoring
    batch: int = 16
    l2: float = 5e-4
    scoring_batches: int = 50
    drop_fraction: float = 0.5  # of the dynamic method, at the first update; it falls to 0 along a cosine
    sparsity: float = 0.9


NYU_V2 = PaperSetup(
    classes=MappingProxyType({"segmentation": 40, "normals": 3}),
    weights=MappingProxyType({"segmentation": 1.0, "normals": 20.0}),
    crop=321,
    test_size=(480, 640),
    iterations=20_000,
    rate=1e-3,
    rate_factor=0.5,
    rate_every=4_000,
    dynamic_stop=15_000,
    dynamic_every=50,
    tuning_iterations=1_000,
    tuning_rate=1e-5,
    scoring_batch=16,
)

CITYSCAPES = PaperSetup(
    classes=MappingProxyType({"segmentation": 19, "depth": 1}),
    weights=MappingProxyType({"segmentation": 1.0, "depth": 20.0}),
    crop=224,
    test_size=(256, 512),
    iterations=20_000,
    rate=1e-4,
    rate_factor=0.5,
    rate_every=4_000,
    dynamic_stop=15_000,
    dynamic_every=50,
    tuning_iterations=1_000,
    tuning_rate=1e-5,
    scoring_batch=16,
)

TASKONOMY = PaperSetup(
    classes=MappingProxyType({"segmentation": 17, "normals": 3, "depth": 1, "keypoints": 1, "edges": 1}),
    weights=MappingProxyType({"segmentation": 1.0, "normals": 3.0, "depth": 2.0, "keypoints": 7.0, "edges": 7.0}),
    crop=224,
    test_size=(256, 256),
    iterations=100_000,
    rate=1e-4,
    rate_factor=0.3,
    rate_every=12_000,
    dynamic_stop=75_000,
    dynamic_every=250,
    tuning_iterations=4_000,
    tuning_rate=1e-6,
    scoring_batch=4,
)

SETUPS: Mapping[str, PaperSetup] = MappingProxyType({"nyuv2": NYU_V2, "cityscapes": CITYSCAPES, "taskonomy": TASKONOMY})
