"""The tail as functions."""

from __future__ import annotations

from ..core.packed_weights import PackedWeights
from .batch_norm import BatchNormBranch
from .inference import conv_bn_add_relu, conv_bn_add_relu_max_pool, conv_bn_proj_add_relu, max_pool_numbers
from .training import batch_norm_arguments, bn_add_relu, bn_add_relu_train, conv_bn_add_relu_train, conv_bn_branch

__all__ = [
    "BatchNormBranch",
    "PackedWeights",
    "batch_norm_arguments",
    "bn_add_relu",
    "bn_add_relu_train",
    "conv_bn_add_relu",
    "conv_bn_add_relu_max_pool",
    "conv_bn_add_relu_train",
    "conv_bn_branch",
    "conv_bn_proj_add_relu",
    "max_pool_numbers",
]
