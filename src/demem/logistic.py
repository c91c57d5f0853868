"""Many small logistic regressions of two classes at once, by Newton's method in the space of the examples.

Heads on balanced subsets are fits of some ten to some hundred examples with as many features as a network's last layer
has.  The weights of such a fit are a combination of its examples, so that each step solves as many equations as there
are examples, and all fits together take one call of each operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 256  # examples of one fit; with more, the third power costs more than L-BFGS takes
_STEPS, _HALVINGS = 50, 8


def fit_two_classes(features: Tensor, y: Tensor, share: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    r"""Minimise what :func:`demem.linear.fit_linear` does, for two classes and several sets of examples.

    The two rows of the classifier are opposite, so with :math:`w = V_1 - V_0`, :math:`\beta = b_1 - b_0` and
    :math:`f_s = w \cdot x_s + \beta` each set's objective is

    .. math:: \sum_s v_s \bigl(\log(1 + e^{f_s}) - y_s f_s\bigr) + \tfrac{\rho}{2} \lVert w \rVert^2,
              \qquad \rho = \lambda N' / 2

    At the optimum :math:`w = \sum_s \alpha_s x_s` with :math:`\sum_s \alpha_s = 0`.  With :math:`K` the inner products
    of the examples, :math:`g` and :math:`h` the first and second derivatives of the loss by :math:`f`, and
    :math:`S = \operatorname{diag}(\sqrt h)`, Newton's step is

    .. math:: \alpha' = S (S K S + \rho I)^{-1} \bigl(\sqrt h f - g / \sqrt h - \beta' \sqrt h\bigr)

    and :math:`\beta'` is what makes its sum vanish.  A step that does not lower the objective is halved.

    The examples' inner products take :math:`2 n^2 N` operations per set, and each of some ten steps :math:`n^3 / 3`.

    Args:
        features: ``(B, n, N)``, finite.
        y: ``(B, n)`` classes, 0 or 1.
        share: ``(B, n)`` weights of the examples, not negative, which sum to 1 in each set.
        l2: :math:`\lambda`, at least 1e-7.

    Returns:
        weights ``(B, 2, N)`` and biases ``(B, 2)`` for features that are not standardised, in float32.

    Source: iteratively reweighted least squares in its dual form, as for Gaussian processes (Rasmussen and Williams
    2006, algorithm 3.1).

    Example:
        >>> x, y = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]]), torch.tensor([[0, 0, 1, 1]])
        >>> weight, bias = fit_two_classes(x, y, torch.full((1, 4), 0.25), 1e-3)
        >>> (x[0] @ weight[0].T + bias[0]).argmax(1)
        tensor([0, 0, 1, 1])
    """
    features, device = features.float(), features.device

    def exact(values: Tensor) -> Tensor:
        return (values.cpu() if device.type == "mps" else values).double()  # that device has no float64

    std, mean = torch.std_mean(features, dim=1, correction=0)
    varies = std > 1e-6 * std.amax(1, keepdim=True).clamp_min(1e-12)
    scale = torch.where(varies, 1 / std, 0.0)  # a feature that does not vary gets the weight 0
    x = (features - mean[:, None]) * scale[:, None]
    # Below that penalty rounding decides, in the float32 products of the examples.
    rho = exact(max(l2, 1e-7) / 2 * varies.sum(1, keepdim=True).clamp_min(1))
    alpha, beta = (t.float().to(device) for t in _newton(exact(x @ x.mT), exact(y), exact(share), rho))
    weight = (x.mT @ alpha[..., None])[..., 0] * scale
    bias = beta - (weight * mean).sum(1)
    return torch.stack([-weight, weight], 1) / 2, torch.stack([-bias, bias], 1) / 2


def _newton(kernel: Tensor, y: Tensor, share: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\alpha` ``(B, n)`` and :math:`\beta` ``(B,)`` from inner products ``(B, n, n)``."""
    alpha, beta = torch.zeros_like(y), y.new_zeros(len(y), 1)
    tiny = torch.finfo(y.dtype).eps

    def objective(alpha: Tensor, f: Tensor, beta: Tensor) -> Tensor:
        """``(B, 1)``; the kernel's product with alpha is f without beta."""
        return (share * (F.softplus(f) - y * f) + rho / 2 * alpha * (f - beta)).sum(1, keepdim=True)

    f = torch.zeros_like(y)
    value = objective(alpha, f, beta)
    for _ in range(_STEPS):
        p = f.sigmoid()
        gradient = share * (p - y)
        if float((gradient + rho * alpha).abs().max()) <= 1e-9 + 10 * tiny * float(rho.max()):
            break
        root = (share * p * (1 - p)).clamp_min(tiny * tiny).sqrt()
        matrix = root[:, :, None] * kernel * root[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_(rho)
        solved = torch.cholesky_solve(torch.stack([root * f - gradient / root, root], 2), torch.linalg.cholesky(matrix))
        to, by = solved.unbind(2)
        new_beta = (root * to).sum(1, keepdim=True) / (root * by).sum(1, keepdim=True)
        step = root * (to - new_beta * by) - alpha
        step_beta, ahead = new_beta - beta, (kernel @ step[..., None])[..., 0]
        length = torch.ones_like(value)
        for _ in range(_HALVINGS):
            moved = [alpha + length * step, f + length * (ahead + step_beta), beta + length * step_beta]
            lower = (now := objective(*moved)) <= value
            if bool(lower.all()):
                break
            length = torch.where(lower, length, length / 2)
        better = now < value
        if not bool(better.any()):  # rounding hides what is left to gain
            break
        alpha, f, beta = (torch.where(better, a, b) for a, b in zip(moved, (alpha, f, beta), strict=True))
        value = torch.where(better, now, value)
    return alpha, beta[:, 0]
