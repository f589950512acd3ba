"""How evenly a mixture of experts uses its experts."""

import torch
from torch import Tensor


def cv_squared(x: Tensor) -> Tensor:
    """Squared coefficient of variation: unbiased variance over squared mean.

    Shazeer et al., *Outrageously Large Neural Networks*, ICLR 2017, equation 7.

    Args:
        x: any shape, at least one element; one element has no variation.

    Returns:
        Scalar, 0 when all elements are equal; float32 or wider.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.numel() == 1:
        return torch.zeros_like(x).sum()
    return x.var() / (x.mean().square() + 1e-10)


def load_balance_loss(gates: Tensor) -> Tensor:
    """Penalty on an uneven importance of the experts, importance being the sum of an expert's gates.

    The literature adds the same penalty on the load, the number of tokens that an expert receives. A count has no
    gradient (it needs the noise-based estimator of the same paper), so importance alone is used: the differentiable
    half. It is not part of dMoE, whose authors train without one; give it weight 0 to follow them.

    Args:
        gates: (..., E) gate of each expert for each token, 0 where it was not chosen. All leading dimensions are
            pooled; pass one layer's gates at a time to balance each layer by itself.

    Returns:
        Scalar in [0, E], 0 for an even use.
    """
    dtype = torch.promote_types(gates.dtype, torch.float32)
    return cv_squared(gates.flatten(0, -2).sum(0, dtype=dtype))
