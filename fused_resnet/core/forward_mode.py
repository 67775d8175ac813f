"""Whether a call is under forward-mode differentiation, of which no operator of ours knows."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(x: Tensor) -> bool:
    """Whether ``x`` is a dual tensor."""
    # Without a dual level there is nothing to unpack, and the very tensor comes back.
    return forward_ad.unpack_dual(x).primal is not x
