"""Which instruction sets of the CPU kernels a test can ask for here, and why not the others."""

from __future__ import annotations

import os

import pytest

from fused_resnet.core import extensions

ALL = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
#: Those with float32 vector code of their own: "amx" and "avx512_bf16" have that of "avx512".
VECTORS = ALL[2:]
#: Those with products of bfloat16, "portable" in plain C++.
BF16 = ("amx", "avx512_bf16", "portable")
#: Those with matrix tiles, "portable" in plain C++.
TILES = ("amx", "portable")


def need(isa: str) -> str:
    """``isa``, where the extension has it on this processor; else the test is skipped, saying why."""
    extension = extensions.cpu()
    assert extension is not None
    if isa not in extension.build_info()["cpu_isas"]:
        named = os.environ.get("FUSED_RESNET_CPU_ISA")
        hidden = named in ALL and ALL.index(isa) < ALL.index(named)
        pytest.skip(f"FUSED_RESNET_CPU_ISA={named} hides {isa}" if hidden else f"this processor has no {isa}")
    return isa
