"""lightly's SimCLR on a ResNet-18: its backbone, head, loss and transform, for lightly 1.6 and lightning 2.6.

python examples/lightly_simclr.py --data FOLDER --image_size 224 --batch_size 256 --steps -1 --epochs 100
"""

import lightning as L
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from shared import Ways, arguments, compare, pictures
from torch import nn
from torchvision.models import resnet18

from featherlight.callbacks import (
    DepthDropout,
    IntrinsicProjection,
    LayerFreezing,
    PrismSampling,
    ProgressiveGrowth,
    RepresentationAlignment,
)


class LightlySimCLR(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(resnet18().children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = NTXentLoss(temperature=0.5)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch, batch_idx):
        (x0, x1), _ = batch
        return self.criterion(self(x0), self(x1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


def ways(epochs: int) -> Ways:
    """The backbone is a Sequential, in which the four groups of residual blocks are the children 4 to 7."""
    stages = {"blocks": "backbone.[4-7]", "periods_per_stage": max(1, epochs // 4)}
    return {
        "LayerFreezing": lambda: [LayerFreezing(**stages)],
        "LayerFreezing + DepthDropout": lambda: [LayerFreezing(**stages), DepthDropout(blocks="backbone.[4-7].*", rate=0.5)],
        "ProgressiveGrowth": lambda: [ProgressiveGrowth(**stages)],
        "DepthDropout": lambda: [DepthDropout(blocks="backbone.[4-7].*", rate=0.5)],
        "PrismSampling": lambda: [PrismSampling(keep=0.2)],
        "IntrinsicProjection": lambda: [IntrinsicProjection(dim=16384, projection="sparse_signs")],
        "RepresentationAlignment": lambda: [RepresentationAlignment(through="backbone")],
    }


def main():
    options = arguments(__doc__, epochs=4)
    loader, _ = pictures(options, SimCLRTransform(input_size=options.image_size))
    return compare(LightlySimCLR, loader, ways(options.epochs), options)


if __name__ == "__main__":
    main()
