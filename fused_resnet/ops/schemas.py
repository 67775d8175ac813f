"""The public operators' schemas: the one place where namespace ``fused_resnet`` is defined.

``torch.library.Library`` rather than the ``custom_op`` decorator: on the hot path it costs 7 against 11
microseconds a call (inference mode, 14 arguments).
"""

from __future__ import annotations

import torch

NAMESPACE = "fused_resnet"

#: Kept for the life of the process: dropping a Library unregisters its operators.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_CONV_BN = (
    "Tensor {p}weight, Tensor? {p}bias, Tensor? {p}bn_weight, Tensor? {p}bn_bias, "
    "Tensor? {p}running_mean, Tensor? {p}running_var, float {p}eps"
)
_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, int groups"
_OPTIONS = 'str activation="relu", str backend="auto", SymInt packed_weights=0, str winograd="auto"'

#: One BN with known statistics, and the same of the projection; see ``ops.training``.
_STATISTICS = "Tensor{o} {p}mean, Tensor{o} {p}invstd"
_PROJ_Y = "Tensor? proj_y, " + _STATISTICS.format(o="?", p="proj_")

SCHEMAS: dict[str, str] = {
    "conv_bn_add_relu": (f"(Tensor x, {_CONV_BN.format(p='')}, Tensor? residual, {_GEOMETRY}, {_OPTIONS}) -> Tensor"),
    "conv_bn_proj_add_relu": (
        f"(Tensor x, {_CONV_BN.format(p='')}, {_GEOMETRY}, "
        f"Tensor proj_x, {_CONV_BN.format(p='proj_')}, SymInt[2] proj_stride, {_OPTIONS}) -> Tensor"
    ),
    "conv_bn_add_relu_max_pool": (
        f"(Tensor x, {_CONV_BN.format(p='')}, {_GEOMETRY}, "
        f"SymInt[2] window, SymInt[2] pool_stride, SymInt[2] pool_padding, {_OPTIONS}) -> Tensor"
    ),
    "conv_bn_stats": (
        f'(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, str backend="auto", str winograd="auto") '
        "-> (Tensor y, Tensor mean, Tensor var)"
    ),
    "conv_backward": (
        f"(Tensor grad_y, Tensor x, Tensor weight, bool has_bias, {_GEOMETRY}, bool[3] output_mask, "
        'str backend="auto", str winograd="auto") -> (Tensor d_x, Tensor d_weight, Tensor d_bias)'
    ),
    "bn_stats": '(Tensor y, str backend="auto") -> (Tensor mean, Tensor var)',
    "bn_apply_add_relu": (
        f"(Tensor y, {_STATISTICS.format(o='', p='')}, Tensor? weight, Tensor? bias, Tensor? residual, "
        f"{_PROJ_Y}, Tensor? proj_weight, Tensor? proj_bias, "
        'str activation="relu", bool with_mask=True, str backend="auto") -> (Tensor out, Tensor mask)'
    ),
    "bn_backward_reduce": (
        f"(Tensor grad_out, Tensor mask, Tensor y, {_STATISTICS.format(o='', p='')}, {_PROJ_Y}, "
        'str backend="auto") -> (Tensor sum_dz, Tensor sum_dz_xhat, Tensor proj_sum_dz_xhat)'
    ),
    "bn_backward_apply": (
        f"(Tensor grad_out, Tensor mask, Tensor y, {_STATISTICS.format(o='', p='')}, Tensor? weight, "
        f"Tensor mean_dz, Tensor mean_dz_xhat, {_PROJ_Y}, Tensor? proj_weight, "
        "Tensor? proj_mean_dz, Tensor? proj_mean_dz_xhat, ScalarType? residual_dtype, "
        'str backend="auto") -> (Tensor d_y, Tensor d_second)'
    ),
}

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
