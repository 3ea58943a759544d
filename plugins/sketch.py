"""A count sketch (Charikar et al. 2002): rows × columns sums of D numbers, from which the large ones can be told; sketches add."""

from __future__ import annotations

import torch
from torch import Tensor

from featherlight.plugins.seeds import generator


class CountSketch:
    """Each row adds every number, with a random sign, to one random of its columns; a number's estimate is the median over rows.

    Kept are the columns (int32) and signs (int8) of all rows, 5 bytes × rows × D.

    Args:
        size: D; rows, columns: of the sketch; seed: of columns and signs.

    Example:
        >>> sketch = CountSketch(1000, rows=5, columns=100, seed=0)
        >>> x = torch.zeros(1000)
        >>> x[7], x[500] = 3.0, -2.0
        >>> estimate = sketch.estimate(sketch.of(x))
        >>> float(estimate[7]), float(estimate[500])
        (3.0, -2.0)
    """

    def __init__(self, size: int, rows: int, columns: int, seed: int, device: torch.device | None = None) -> None:
        random = generator(seed, "sketch", size, rows, columns)
        self.rows, self.columns = rows, columns
        self.places = torch.randint(columns, (rows, size), generator=random, dtype=torch.int32).to(device)
        self.signs = (torch.randint(2, (rows, size), generator=random, dtype=torch.int8) * 2 - 1).to(device)

    def of(self, x: Tensor) -> Tensor:
        """(D,) to (rows, columns)."""
        table = x.new_zeros(self.rows, self.columns)
        for row, places, signs in zip(table, self.places, self.signs):
            row.index_add_(0, places, x * signs)
        return table

    def estimate(self, table: Tensor) -> Tensor:
        """(rows, columns) to (D,)."""
        return torch.stack([row[places] * signs for row, places, signs in zip(table, self.places, self.signs)]).median(0).values

    def touched(self, indices: Tensor) -> Tensor:
        """Where numbers ``indices`` (k,) are added: a mask (rows, columns)."""
        mask = torch.zeros(self.rows, self.columns, dtype=torch.bool, device=indices.device)
        for row, places in zip(mask, self.places):
            row[places[indices]] = True
        return mask
