"""The residual tail of a ResNet in one pass: functions, and layers for ``kernels.kernelize``."""

from . import layers
from .functional import conv_bn_add_relu, conv_bn_add_relu_train, conv_bn_proj_add_relu

__all__ = ["conv_bn_add_relu", "conv_bn_add_relu_train", "conv_bn_proj_add_relu", "layers"]
