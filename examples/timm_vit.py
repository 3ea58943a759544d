"""A vision transformer of timm as a classifier; any name that timm knows will do where its blocks are called ``blocks``.

python examples/timm_vit.py --data FOLDER --model vit_small_patch16_224 --image_size 224 --steps -1 --epochs 24
"""

import lightning as L
import timm
import torch
from shared import Ways, arguments, compare, pictures, tensor
from torch.nn.functional import cross_entropy

from featherlight.callbacks import (
    DepthDropout,
    IntrinsicProjection,
    LayerFreezing,
    PrismSampling,
    ProgressiveGrowth,
    RepresentationAlignment,
)


class VisionTransformer(L.LightningModule):
    def __init__(self, name: str, size: int, classes: int) -> None:
        super().__init__()
        self.model = timm.create_model(name, img_size=size, num_classes=classes)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4, weight_decay=0.05)


def ways(epochs: int) -> Ways:
    """Twelve blocks, three a stage."""
    stages = {"blocks": "model.blocks.*", "blocks_per_stage": 3, "periods_per_stage": max(1, epochs // 4)}
    return {
        "LayerFreezing": lambda: [LayerFreezing(**stages)],
        "LayerFreezing + DepthDropout": lambda: [LayerFreezing(**stages), DepthDropout(blocks="model.blocks.*", rate=0.5)],
        "ProgressiveGrowth": lambda: [ProgressiveGrowth(**stages)],
        "DepthDropout": lambda: [DepthDropout(blocks="model.blocks.*", rate=0.5)],
        "PrismSampling": lambda: [PrismSampling(keep=0.2, attention=True)],
        "IntrinsicProjection": lambda: [IntrinsicProjection(dim=16384)],
        "RepresentationAlignment": lambda: [RepresentationAlignment(through="model")],
    }


def main():
    options = arguments(__doc__, epochs=4, model="vit_tiny_patch16_224")
    loader, classes = pictures(options, lambda image: tensor(image, options.image_size))
    return compare(lambda: VisionTransformer(options.model, options.image_size, classes), loader, ways(options.epochs), options)


if __name__ == "__main__":
    main()
