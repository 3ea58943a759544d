"""lightly's BYOL on a ResNet-18: momentum copies of backbone and head, which every callback finds by itself and leaves in step.

python examples/lightly_byol.py --data FOLDER --image_size 224 --batch_size 256 --steps -1 --epochs 100
"""

import copy

import lightning as L
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from lightly.utils.scheduler import cosine_schedule
from lightly_simclr import ways  # its backbone, and so its callbacks, are the same
from shared import arguments, compare, pictures
from torch import nn
from torchvision.models import resnet18


class LightlyBYOL(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(resnet18().children())[:-1])
        self.projection_head = BYOLProjectionHead(512, 1024, 256)
        self.prediction_head = BYOLPredictionHead(256, 1024, 256)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    @torch.no_grad()
    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1))

    def training_step(self, batch, batch_idx):
        momentum = cosine_schedule(self.current_epoch, self.trainer.max_epochs, 0.996, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        (x0, x1), _ = batch
        return 0.5 * (self.criterion(self(x0), self.forward_momentum(x1)) + self.criterion(self(x1), self.forward_momentum(x0)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


def main():
    options = arguments(__doc__, epochs=4)
    views = BYOLTransform(BYOLView1Transform(input_size=options.image_size), BYOLView2Transform(input_size=options.image_size))
    loader, _ = pictures(options, views)
    return compare(LightlyBYOL, loader, ways(options.epochs), options)


if __name__ == "__main__":
    main()
