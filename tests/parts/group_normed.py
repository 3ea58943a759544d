"""A small network whose convolutions have group norms right behind them."""

from torch import nn


class GroupNormed(nn.Module):
    """Convolutions with group norms right behind them, one of them with a bias; features (N, 4)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(
            *[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=bias), nn.GroupNorm(2, 8)) for bias in (True, False)]
        )
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.out(self.blocks(self.stem(x)).relu()).mean(dim=(2, 3))
