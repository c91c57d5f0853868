"""A 3x3 convolution by Winograd's minimal filtering, as matrix products over rows kept channels-last.

torch's CPU convolution spends most of its time on padding when a map is 2x2 or 4x4; here a map is
cut in tiles of ``m`` outputs, each made of ``m + 2`` products a side instead of ``3 m`` (Lavin and Gray 2016).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# F(4x4, 3x3) with the points 0, ±1, ±2, ∞: y = A [(G w) ⊙ (B x)].
_B = torch.tensor([
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
], dtype=torch.double)  # fmt: skip
_G = torch.tensor([
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
], dtype=torch.double)  # fmt: skip
_A = torch.tensor([
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
], dtype=torch.double)  # fmt: skip
# A 2x2 map with padding: y0 = w1 x0 + w2 x1, y1 = w0 x0 + w1 x1, three products instead of four (Karatsuba).
_B2 = torch.tensor([[1, 1], [1, 0], [0, 1]], dtype=torch.double)
_G2 = torch.tensor([[0, 1, 0], [1, -1, 0], [0, -1, 1]], dtype=torch.double)
_A2 = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.double)


class Conv3x3:
    """The convolution of ``module`` for square float32 maps of 2x2 or of a multiple of 4 a side, on the CPU."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.module = module
        self._filters: dict[int, Tensor] = {}

    @staticmethod
    def pays(module: nn.Conv2d, x: object) -> bool:
        """Whether this can compute the layer for maps ``x`` and is faster than torch's own convolution."""
        return (
            type(module) is nn.Conv2d
            and module.kernel_size == (3, 3)
            and module.stride == (1, 1)
            and module.padding == (1, 1)
            and module.dilation == (1, 1)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and min(module.weight.shape[:2]) >= 64
            and isinstance(x, Tensor)
            and x.ndim == 4
            and x.shape[-1] == x.shape[-2]
            and x.shape[-1] in (2, 4, 8)
            and x.dtype == module.weight.dtype == torch.float32
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        )

    def __call__(self, x: Tensor) -> Tensor:
        """``(R, C, n, n)`` → ``(R, O, n, n)``, channels last in memory."""
        rows, channels, n = x.shape[:3]
        pixels = x.permute(0, 2, 3, 1).reshape(rows, n * n, channels)
        if n == 2:
            read, write, key, tiles = torch.kron(_B2, _B2), torch.kron(_A2, _A2), 2, 1
        else:
            per_side = n // 4
            # Padding is folded in: the tile at t reads pixels 4t − 1 … 4t + 4, those that exist.
            b = torch.zeros(per_side * 6, n, dtype=torch.double)
            a = torch.zeros(n, per_side * 6, dtype=torch.double)
            for t in range(per_side):
                first, last = max(0, 4 * t - 1), min(n, 4 * t + 5)
                b[6 * t : 6 * t + 6, first:last] = _B[:, first - 4 * t + 1 : last - 4 * t + 1]
                a[4 * t : 4 * t + 4, 6 * t : 6 * t + 6] = _A
            read, write, key, tiles = torch.kron(b, b), torch.kron(a, a), 4, per_side * per_side
            side = 6 * per_side
            # Points first, then tiles, so that one product serves all tiles of a point.
            order = torch.arange(side * side).view(per_side, 6, per_side, 6).permute(1, 3, 0, 2).reshape(-1)
            read, write = read[order], write[:, order]
        points = len(read) // tiles
        spread = torch.matmul(read.to(x.dtype), pixels)  # (R, points · tiles, C)
        spread = spread.view(rows, points, tiles, channels).permute(1, 0, 2, 3).reshape(points, rows * tiles, channels)
        product = torch.bmm(spread, self._filter(key))  # (points, R · tiles, O)
        out = product.shape[2]
        product = product.view(points, rows, tiles, out).permute(1, 0, 2, 3).reshape(rows, points * tiles, out)
        y = torch.matmul(write.to(x.dtype), product)
        if self.module.bias is not None:
            y += self.module.bias
        return y.view(rows, n, n, out).permute(0, 3, 1, 2)

    def _filter(self, key: int) -> Tensor:
        if key not in self._filters:
            g = _G2 if key == 2 else _G
            w = self.module.weight.detach().double()
            w = torch.einsum("ai,oxij,bj->abxo", g, w, g).flatten(0, 1)
            self._filters[key] = w.float().contiguous()
        return self._filters[key]
