"""The architecture gate of the training passes: what ptxas made of them, held to its bounds (benchmarks/static)."""

from __future__ import annotations

import dataclasses

import pytest

from tests.support.toolchain import why_not, why_not_disassembled

if reason := why_not("_C", "g++", "nvcc", "cuobjdump"):
    pytest.skip(reason, allow_module_level=True)

import tests.support.host_cuda.host  # noqa: F401  (names the cache of compiled artefacts)
from benchmarks.static import gate, sass, training
from fused_resnet.aot.training import OPS, training_planner

pytestmark = pytest.mark.aot

OTHERS = tuple(arch for arch in gate.ARCHS if arch not in ("sm_80", "sm_90"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("op", OPS)
def test_main_architectures(op: str, arch: str) -> None:
    rows = training.read(op, arch)
    assert {row.kernel.symbol for row in rows} == {k.symbol for k in training_planner().kernels.values() if k.op == op}
    broken = [sentence for row in rows for sentence in training.violations(row)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(("arch", "op"), [(arch, OPS[i % len(OPS)]) for i, arch in enumerate(OTHERS)])
def test_other_architectures(arch: str, op: str) -> None:
    """One pass each; `make static` compiles all."""
    if reason := why_not_disassembled(arch):
        pytest.skip(reason)
    broken = [sentence for row in training.read(op, arch) for sentence in training.violations(row)]
    assert not broken, "\n".join(broken)


def test_the_gate_can_fail() -> None:
    row = next(row for row in training.read("bn_apply_add_relu", "sm_80") if row.kernel.symbol == "bn_apply_f16")
    assert training.violations(row) == []
    bad = {
        "no spill": {"spill_instructions": 4},
        "no local memory": {"local": 16},
        "two blocks": {"blocks_per_sm": 1},
        "16-byte loads": {"loads": {8: 4}},
        "16-byte stores": {"stores": {8: 4}},
        "memory to be the limit": {"loop_instructions": 2000},
        "under way": {"blocks_per_sm": 0},
    }
    for sentence, change in bad.items():
        found = training.violations(dataclasses.replace(row, **change))  # type: ignore[arg-type]
        assert any(sentence in line for line in found), (sentence, found)


SLOW_PATH = """
 Function walks:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0

\t.target\tsm_80
\t\tFunction : walks
        /*0000*/                   S2R R3, SR_TID.X ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   BRA.DIV ~URZ, 0x60 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   EXIT ;
        /*0050*/                   NOP;
        /*0060*/                   CALL.REL.NOINC 0x80 ;
        /*0070*/                   BRA 0x30 ;
        /*0080*/                   MOV R1, R2 ;
        /*0090*/                   RET.REL.NODEC R2 0x0 ;
        /*00a0*/                   BRA 0xa0;
"""


def test_the_reader_follows_the_slow_path_of_a_shuffle() -> None:
    (kernel,) = sass._parse(SLOW_PATH)
    assert [(loop.head, len(loop.instructions)) for loop in kernel.loops] == [(0x10, 5)]
