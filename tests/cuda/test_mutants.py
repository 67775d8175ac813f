"""Plant each bug of mutants.py in a copy of the CUDA sources: the test it names must fail.

CI plants a few; `make mutants` (pytest -m mutant) plants all of them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.toolchain import why_not

if reason := why_not("g++", "_C"):
    pytest.skip(reason, allow_module_level=True)

from fused_resnet.aot.planner import source_directory
from tests.cuda import test_host_conv_stats, test_host_cuda, test_host_training
from tests.support.host_cuda.host import HostCuda, HostCudaError
from tests.support.host_cuda.mutants import CI, MUTANTS, Mutant
from tests.support.launch_harness import interpreter


def plant(mutant: Mutant, folder: Path) -> Path:
    """A copy of csrc with the bug in it."""
    csrc = folder / "csrc"
    shutil.copytree(source_directory(), csrc, ignore=shutil.ignore_patterns("cpu", "__pycache__"))
    path = csrc / "cuda" / mutant.file
    text = path.read_text()
    assert text.count(mutant.find) == 1, f"{mutant.name}: found {text.count(mutant.find)} times: {mutant.find}"
    path.write_text(text.replace(mutant.find, mutant.put))
    return csrc


def test_every_mutant_can_be_planted() -> None:
    """Its text occurs once: one whose text has changed would plant nothing."""
    for mutant in MUTANTS:
        text = (source_directory() / "cuda" / mutant.file).read_text()
        assert text.count(mutant.find) == 1, f"{mutant.name}: found {text.count(mutant.find)} times: {mutant.find}"


def run_host(test: str, csrc: Path, patch: pytest.MonkeyPatch) -> None:
    kind, _, symbol = test.partition(":")
    mutated = HostCuda(csrc, test_host_cuda.TURING) if kind == "turing" else HostCuda(csrc)
    patch.setattr(test_host_cuda, "host", lambda arch="": mutated)
    patch.setattr(test_host_cuda, "planner", lambda: mutated.planner)
    patch.setattr(test_host_training, "host", lambda: mutated)
    patch.setattr(test_host_conv_stats, "host", lambda: mutated)
    if kind == "pass":
        test_host_training.test_pass(symbol)
    elif kind == "passes":
        test_host_training.test_activation_traffic_is_ten_tensors_and_three_masks(test_host_training.HALF)
    elif kind == "stats":
        test_host_conv_stats.test_kernel(symbol)
    elif kind == "stats_groups":
        test_host_conv_stats.test_groups_of_tiles_in_any_order()
    elif kind == "pass_nan":
        test_host_training.test_nan_as_in_eager(symbol)
    elif kind == "parts":
        test_host_training.test_many_parts_in_any_order(symbol, test_host_training.HALF)
    elif kind == "kernel":
        test_host_cuda.test_kernel(symbol)
    elif kind == "turing":
        test_host_cuda.test_kernel_on_turing(symbol)
    elif kind == "banks":
        test_host_cuda.test_no_bank_conflict_in_the_main_loop(symbol)
    elif kind == "nan":
        test_host_cuda.test_nan_passes_through("float16")
    else:
        test_host_cuda.test_split_k_gives_the_same_bits_in_any_order("float16")


def run_ptx(test: str, csrc: Path, patch: pytest.MonkeyPatch, folder: Path) -> None:
    from fused_resnet.aot import cuda
    from tests.cuda import test_ptx_cuda, test_ptx_training

    real = cuda.compile_kernel
    patch.setattr(test_ptx_training, "compile_kernel", lambda kernel, arch: real(kernel, arch, csrc))
    patch.setattr(test_ptx_training, "module", test_ptx_training.module.__wrapped__)
    patch.setattr(test_ptx_cuda, "compile_kernel", lambda kernel, arch: real(kernel, arch, csrc))
    patch.setattr(cuda, "compile_kernel", lambda kernel, arch: real(kernel, arch, csrc))
    kind, _, symbol = test.partition(":")
    if kind == "wgmma":
        run_wgmma(symbol, csrc, patch)
        return
    if kind == "kernel":
        test_ptx_cuda.test_kernel(symbol, "sm_80", folder)
    elif kind == "turing":
        test_ptx_cuda.test_kernel(symbol, "sm_75", folder)
    elif kind == "pass":
        test_ptx_training.test_pass(symbol, "sm_80")
    elif kind == "turing_rounding":
        test_ptx_training.test_the_store_rounds_to_nearest(getattr(torch, symbol), "sm_75")
    elif kind == "parts":
        test_ptx_training.test_reductions_leave_the_workspace_ready_for_the_next_launch(symbol)
    else:
        test_ptx_cuda.test_split_k_leaves_the_workspace_ready_for_the_next_launch(folder)


def run_wgmma(symbol: str, csrc: Path, patch: pytest.MonkeyPatch) -> None:
    from fused_resnet.aot import cuda
    from tests.cuda import test_ptx_wgmma

    mutated = HostCuda(csrc)
    loaded = interpreter().load(cuda._ptx(mutated.planner.kernels[symbol], "sm_90a", csrc).read_text())
    patch.setattr(test_ptx_wgmma, "module", lambda symbol: loaded)
    patch.setattr(test_ptx_wgmma, "planner", lambda: mutated.planner)
    for number in range(test_ptx_wgmma.PER_KERNEL):
        test_ptx_wgmma.test_kernel(symbol, number)


def run_static(symbol: str, csrc: Path, patch: pytest.MonkeyPatch) -> None:
    from benchmarks.static import gate, training
    from tests.cuda import test_static_cuda, test_static_training

    real = gate.assemble_kernel
    if symbol.startswith("pass:"):
        patch.setattr(training, "assemble_kernel", lambda kernel, arch: real(kernel, arch, csrc))
        test_static_training.test_main_architectures(symbol.removeprefix("pass:"), "sm_80")
        return
    patch.setattr(gate, "assemble_kernel", lambda kernel, arch: real(kernel, arch, csrc))
    test_static_cuda._check(symbol, "sm_80")


def run_counters(test: str, csrc: Path, folder: Path) -> None:
    from tests.cuda import test_cuda_counters

    getattr(test_cuda_counters, test)(test_cuda_counters.Runtime(csrc, folder))


def run_maps(test: str, csrc: Path, folder: Path) -> None:
    from tests.cuda import test_encode_maps

    getattr(test_encode_maps, test)(test_encode_maps.Maps(csrc, folder))


def run_planner(test: str, csrc: Path, patch: pytest.MonkeyPatch) -> None:
    from tests.cuda import test_cuda_planner

    mutated = HostCuda(csrc)
    patch.setattr(test_cuda_planner, "planner", lambda: mutated.planner)
    getattr(test_cuda_planner, test)()


def run(leg: str, test: str, csrc: Path, patch: pytest.MonkeyPatch, folder: Path) -> None:
    if leg == "host":
        run_host(test, csrc, patch)
    elif leg == "counters":
        run_counters(test, csrc, folder)
    elif leg == "maps":
        run_maps(test, csrc, folder)
    elif leg == "planner":
        run_planner(test, csrc, patch)
    elif leg == "ptx":
        run_ptx(test, csrc, patch, folder)
    else:
        run_static(test, csrc, patch)


@pytest.mark.mutant
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(
    mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    chosen = (request.config.getoption("-m") or "").split()
    if mutant.name not in CI and "mutant" not in chosen:
        pytest.skip("planted by `make mutants`")
    leg, _, test = mutant.test.partition(":")
    needed = {
        "host": (),
        "planner": (),
        "counters": ("nvcc",),
        "maps": ("nvcc",),
        "ptx": ("nvcc",),
        "static": ("nvcc", "cuobjdump"),
    }[leg]
    if missing := why_not(*needed):
        pytest.skip(missing)
    if leg == "ptx" and not os.environ.get("PTXI_HOME"):
        pytest.skip("needs PTXI_HOME, the folder of the PTX interpreter")
    csrc = plant(mutant, tmp_path)
    # the last: what was to be refused is not
    reports: tuple[type[BaseException], ...] = (AssertionError, HostCudaError, pytest.fail.Exception)
    if leg == "ptx":
        reports = (*reports, interpreter().PtxError)
    if leg in ("counters", "maps"):  # where the extension would raise
        reports = (*reports, RuntimeError)
    if leg == "planner":  # which refuses
        reports = (*reports, ValueError)
    with pytest.raises(reports) as caught:
        run(leg, test, csrc, monkeypatch, tmp_path)
    print(f"{mutant.name}: {str(caught.value).splitlines()[0][:200]}")
