"""launch.json: its format, its refusals, and what `compile` says where it cannot compile. Needs no compiler."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fused_resnet import aot
from fused_resnet.aot import cuda, planner
from fused_resnet.aot.launch_json import (
    Launch,
    TensorSpec,
    by_value,
    pointer,
    scalar,
    tensor_specs,
    tensormap,
    workspace_spec,
    write,
)
from fused_resnet.core import extensions
from fused_resnet.core.problem import Problem

PROBLEM = Problem.parse("n=2,h=9,w=8,c=6,k=10,padding=1,dtype=float16,residual=float32,bias=1,proj=0,device=cuda")


def launch(**changes: object) -> Launch:
    example = Launch(
        kernel="conv", arch="sm_80", grid=(3, 1, 1), block=(128, 1, 1), dynamic_shared_bytes=4096, workspace_bytes=64,
        arguments=[
            pointer("x"), pointer(None), scalar("int32", 7), scalar("float32", 1e-5),
            by_value(bytes(24), {8: "y", 16: "workspace"}),
        ],
        tensors={
            "x": TensorSpec("float16", (2, 6, 9, 8), (432, 1, 48, 6), 4),
            "y": TensorSpec("float32", (2, 10, 9, 8), (720, 1, 80, 10), 4),
            "workspace": workspace_spec(64),
        },
        problem=str(PROBLEM), workspace_initial="zeros", extra={"planned_for": {"sm_count": 108}},
    )  # fmt: skip
    return dataclasses.replace(example, **changes)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path / "made", launch(), ".version 9.0", b"\x7fELF")
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"kernel.ptx", "kernel.cubin", "launch.json"}
    text = (tmp_path / "made" / "launch.json").read_text()
    assert Launch.from_json(text) == launch()
    record = json.loads(text)
    assert list(record)[:9] == [
        "kernel", "arch", "grid", "block", "cluster", "dynamic_shared_bytes", "workspace_bytes", "arguments", "tensors",
    ]  # fmt: skip
    assert record["cluster"] == [1, 1, 1]
    assert record["arguments"][4]["pointers"] == [
        {"offset": 8, "tensor": "y"},
        {"offset": 16, "tensor": "workspace"},
    ]
    assert record["tensors"]["x"] == {
        "dtype": "float16", "shape": [2, 6, 9, 8], "strides": [432, 1, 48, 6], "alignment": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (1, 1)}, "grid: expected three"),
        ({"block": (0, 1, 1)}, "block: expected three"),
        ({"arguments": [pointer("x")]}, r"tensors: expected \['x'\]"),
        ({"arguments": [scalar("int32", 1.5)]}, r"arguments\[0\]: expected int for int32, got 1.5"),
        ({"arguments": [by_value(b"\1" * 16, {8: "y"})]}, "expected 8 zero bytes at offset 8"),
        ({"arguments": [by_value(bytes(8), {4: "y"})]}, "at offset 4"),
        ({"arguments": [tensormap("x", data_type="f16")]}, "tensormap parameter 'dims'"),
        ({"arguments": [{"type": "double"}]}, "expected type pointer"),
        ({"workspace_bytes": 0}, "workspace_bytes: got 0"),
    ],
)
def test_what_is_not_a_launch(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(**changes)


def test_missing_keys_are_named() -> None:
    record = json.loads(launch().to_json())
    del record["grid"]
    with pytest.raises(ValueError, match="the key 'grid' is missing"):
        Launch.from_json(json.dumps(record))


def test_tensor_specs_are_those_of_channels_last_tensors() -> None:
    specs = tensor_specs(PROBLEM, {"x": 8})
    assert set(specs) == {
        "x", "weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var", "residual", "y",
    }  # fmt: skip
    for name in ("x", "weight", "residual", "y"):
        spec = specs[name]
        made = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)).to(memory_format=torch.channels_last)
        assert made.stride() == spec.strides
        assert made.numel() * made.element_size() == spec.span
    assert specs["x"].alignment == 8
    assert specs["weight"].alignment == 2
    assert specs["y"].dtype == specs["residual"].dtype == "float32", "the type torch.result_type gives"
    assert specs["bn_weight"].dtype == "float32", "mixed precision keeps BN in float32"
    assert specs["bias"].dtype == "float16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cpu", "sm_80", PROBLEM), "backend: expected one of cuda, triton, got 'cpu'"),
        (("cuda", "volta", PROBLEM), "arch: expected sm_75 or newer, got 'volta'"),
        (("cuda", "sm_80", "h=8,w=8,c=8"), "the field 'k' is missing"),
        (("cuda", "sm_80", "h=8,w=8,c=8,k=8,splitk=-1"), "splitk: expected a positive integer, got '-1'"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        aot.compile(*arguments, tmp_path)  # type: ignore[arg-type]


def test_without_sources_or_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the remedy, not a traceback from a subprocess."""
    monkeypatch.setattr(extensions, "_modules", {"_C": "the extension fused_resnet._C is not built: build it"})
    with pytest.raises(RuntimeError, match=r"compile: needs the launch planner, but the extension .* is not built"):
        planner.planner.__wrapped__()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    cuda.toolkit.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="install the CUDA toolkit"):
            cuda.toolkit()
    finally:
        cuda.toolkit.cache_clear()
    monkeypatch.setattr(planner, "__file__", str(tmp_path / "fused_resnet" / "aot" / "planner.py"))
    with pytest.raises(RuntimeError, match="expected the CUDA sources in"):
        planner.source_directory()
