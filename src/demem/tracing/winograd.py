"""Compute 3x3 convolutions of small maps by Winograd's minimal filtering (Lavin and Gray 2016).

Derivation in one dimension.  Let n outputs of a filter of r taps be y_i = Σ_j w_j x_{i+j}.  This is the transpose of a
product of polynomials: the map from x to y for fixed w is the transpose of u ↦ w(t) u(t) with deg u < n.  The product
has n + r − 1 coefficients, so its values at n + r − 1 points (∞ is one: the leading coefficient) determine it.
Evaluation of w (matrix G), evaluation of u (A transposed), pointwise product and interpolation (B transposed) give the
product; transposed, they give

    y = A [(G w) ⊙ (B x)],

with n + r − 1 multiplications instead of n · r.  In two dimensions the matrices are applied along both axes, i.e. as
Kronecker products.  A 4x4 map takes 36 products per pair of channels instead of 144, a 2x2 map 9 instead of 36.  Summed
over the input channels, the pointwise products are one matrix product per point over rows kept channels-last, which
also avoids the padding on which torch's CPU convolution spends much of its time for such small maps.

It is here because exact ablation of a ResNet-18 at 64 px takes 1.4 times as long without it
(``python -m benchmarks speed tracing --only winograd``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# n = 4, r = 3 with the points 0, ±1, ±2, ∞.
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
# A 2x2 map with padding: y0 = w1 x0 + w2 x1 = w1 (x0 + x1) + (w2 − w1) x1, y1 = w0 x0 + w1 x1 = w1 (x0 + x1) +
# (w0 − w1) x0: three products instead of four (Karatsuba).
_B2 = torch.tensor([[1, 1], [1, 0], [0, 1]], dtype=torch.double)
_G2 = torch.tensor([[0, 1, 0], [1, -1, 0], [0, -1, 1]], dtype=torch.double)
_A2 = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.double)


class Conv3x3:
    """The convolution of ``module`` for float32 maps of 2x2 or 4x4, on the CPU."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.module = module
        self._filters: dict[int, Tensor] = {}

    @staticmethod
    def pays(module: nn.Conv2d, x: object) -> bool:
        """Whether this class can compute the layer for maps ``x``, and is faster than torch's own convolution."""
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
            and x.shape[-1] in (2, 4)  # the transforms of larger maps cost more than they save
            and x.dtype == module.weight.dtype == torch.float32
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        )

    def __call__(self, x: Tensor) -> Tensor:
        """``(R, C, n, n)`` → ``(R, O, n, n)``, channels last in memory."""
        rows, channels, n = x.shape[:3]
        pixels = x.permute(0, 2, 3, 1).reshape(rows, n * n, channels)
        if n == 2:
            read, write, key = torch.kron(_B2, _B2), torch.kron(_A2, _A2), 2
        else:
            # The outer two of the six inputs of a tile are padding, hence zero: their columns of B are left out.
            read, write, key = torch.kron(_B[:, 1:5], _B[:, 1:5]), torch.kron(_A, _A), 4
        spread = torch.matmul(read.to(x.dtype), pixels)  # (R, points, C)
        product = torch.bmm(spread.transpose(0, 1), self._filter(key))  # (points, R, O)
        y = torch.matmul(write.to(x.dtype), product.transpose(0, 1))
        if self.module.bias is not None:
            y += self.module.bias
        return y.view(rows, n, n, -1).permute(0, 3, 1, 2)

    def _filter(self, key: int) -> Tensor:
        if key not in self._filters:
            g = _G2 if key == 2 else _G
            w = self.module.weight.detach().double()
            w = torch.einsum("ai,oxij,bj->abxo", g, w, g).flatten(0, 1)
            self._filters[key] = w.float().contiguous()
        return self._filters[key]
