"""torchvision's ResNet-50 as a classifier: the module knows nothing of featherlight, and a callback is all that each way adds.

python examples/resnet50.py --data FOLDER --image_size 224 --batch_size 64 --steps -1 --epochs 40
"""

import lightning as L
import torch
from shared import Ways, arguments, compare, pictures, tensor
from torch.nn.functional import cross_entropy
from torchvision.models import resnet50

from featherlight.callbacks import (
    DepthDropout,
    IntrinsicProjection,
    LayerFreezing,
    PrismSampling,
    ProgressiveGrowth,
    RepresentationAlignment,
)


class ResNet50(L.LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.model = resnet50(num_classes=classes)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)


def ways(epochs: int) -> Ways:
    """Four stages, one for each group of residual blocks; of these, all but the first may be left out of a turn."""
    stages = {"blocks": "model.layer*", "periods_per_stage": max(1, epochs // 4)}
    inner = {"blocks": "model.layer*.*", "rate": 0.5}
    return {
        "LayerFreezing": lambda: [LayerFreezing(**stages)],
        "LayerFreezing + DepthDropout": lambda: [LayerFreezing(**stages), DepthDropout(**inner)],
        "ProgressiveGrowth": lambda: [ProgressiveGrowth(**stages)],
        "DepthDropout": lambda: [DepthDropout(**inner)],
        "PrismSampling": lambda: [PrismSampling(keep=0.2)],
        "IntrinsicProjection": lambda: [IntrinsicProjection(dim=65536, projection="sparse_signs")],
        "RepresentationAlignment": lambda: [RepresentationAlignment(through="model")],
    }


def main():
    options = arguments(__doc__, epochs=4)
    loader, classes = pictures(options, lambda image: tensor(image, options.image_size))
    return compare(lambda: ResNet50(classes), loader, ways(options.epochs), options)


if __name__ == "__main__":
    main()
