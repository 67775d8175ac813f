"""Ahead-of-time compilation of the Triton tail, for any architecture and without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..backends.triton import why_not_problem, why_not_triton
from ..core.problem import Problem
from ..kernels.arguments import BatchNorm, StatsTensors
from ..kernels.config import TailConfig, base_configs, candidates
from ..kernels.plan import Descriptor, TailPlan, plan
from .launch_json import Launch, TensorSpec, pointer, scalar, tensor_specs, tensormap, workspace_spec, write

#: SMs of the usual device of an architecture: the planner fills them.
SM_COUNT = {80: 108, 86: 84, 87: 16, 89: 128, 90: 132, 100: 148, 103: 160, 120: 170, 121: 48}
#: All pointers must be multiples of this, as the compiled kernel's 16-byte accesses need.
ALIGNMENT = 16

L2_PROMOTION_128B = 2

#: Counters travel as bytes and are words to the kernels.
_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "uint8": "*i32"}
_TAIL_FIELDS = ("x", "weight", "y", "residual", "bn", "proj_x", "proj_weight", "proj_bn", "workspace")
_STATS_FIELDS = ("x", "weight", "y", "bias", "stats")
_BN_NAMES = ("bias", "bn_weight", "bn_bias", "running_mean", "running_var")


def choose_config(problem: Problem, arch: int, tile: str | None = None, splitk: int | None = None) -> TailConfig:
    """The heuristic's configuration, or its best one with the tile `"128x64"` or the whole name `"128x64x32_w4_s3"`."""
    found = candidates(problem, arch, SM_COUNT.get(arch, 108), deterministic=True)
    if tile is not None:
        found = [c for c in found if tile in (str(c), str(c).split("_")[0], f"{c.m}x{c.n}")]
        if not found:
            known = sorted({str(c) for c in candidates(problem, arch, SM_COUNT.get(arch, 108), deterministic=True)})
            raise ValueError(f"tile: expected one of {', '.join(known)} or its MxN, got {tile!r}")
    config = found[0]
    if splitk is not None:
        config = replace(config, split_k=splitk, persistent=False)
    return config


class _Signature:
    """The kernel's arguments as Triton's compiler takes them: types, compile-time constants, alignment, by argument
    path.
    """

    def __init__(
        self,
        problem: Problem,
        tail_plan: TailPlan,
        tensors: dict[str, TensorSpec],
        arg_names: list[str],
        fields: tuple[str, ...],
        sizes: tuple[int, ...],
        static: tuple[Any, ...],
    ):
        self.tensors = tensors
        self.arg_names = arg_names
        self.types: dict[str, Any] = {}
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}
        self.leaves: list[tuple[str, str | int | Descriptor]] = []  # type, and tensor or value; in the kernel's order
        self.described: list[tuple[str, Descriptor]] = []
        self._descriptors = iter(tail_plan.descriptors)
        for at, (name, field) in enumerate(zip(arg_names, fields, strict=False)):
            if field == "bn":
                self.types[name] = self._batch_norm((at,), "")
            elif field == "proj_bn" and problem.projection is not None:
                self.types[name] = self._batch_norm((at,), "proj_")
            elif field == "stats":
                self.types[name] = StatsTensors(*(self._tensor((at, i), n) for i, n in enumerate(StatsTensors._fields)))
            elif field in ("x", "weight", "proj_x", "proj_weight"):
                self.types[name] = self._operand((at,), field)
            else:
                self.types[name] = self._tensor((at,), field)
        numbers = arg_names[len(fields) : -len(static)]
        for name, size in zip(numbers, sizes, strict=True):
            self.types[name] = "i32"
            self.leaves.append(("i32", size))
        for at, value in enumerate(static, len(arg_names) - len(static)):
            self.types[arg_names[at]] = self._constant((at,), value)

    def _constant(self, path: tuple[int, ...], value: Any) -> str:
        self.constants[path] = value
        return "constexpr"

    def _operand(self, path: tuple[int, ...], name: str) -> str:
        """A pointer, or a tensor descriptor followed by its sizes and strides, as Triton passes one."""
        descriptor = next(self._descriptors, None)
        if descriptor is None:
            return self._tensor(path, name)
        self.described.append((name, descriptor))
        self.leaves.append(("tensormap", name))
        self.leaves += [("i32", size) for size in descriptor.shape]
        self.leaves += [("i64", stride) for stride in descriptor.strides]
        return f"tensordesc<{_TYPES[self.tensors[name].dtype][1:]}{list(descriptor.box)}>"

    def _tensor(self, path: tuple[int, ...], name: str) -> str:
        if name not in self.tensors:
            return self._constant(path, None)
        self.attributes[path] = [["tt.divisibility", ALIGNMENT]]
        kind = _TYPES[self.tensors[name].dtype]
        self.leaves.append((kind, name))
        return kind

    def _batch_norm(self, path: tuple[int, ...], prefix: str) -> BatchNorm:
        vectors = {
            field: self._tensor((*path, i), prefix + name)
            for i, (field, name) in enumerate(zip(BatchNorm._fields, _BN_NAMES, strict=False))
        }
        self.leaves.append(("fp32", prefix + "eps"))
        return BatchNorm(**vectors, eps="fp32")  # type: ignore[arg-type]


def compile_kernel(problem: Problem, config: TailConfig, arch: int, bn_dtype: torch.dtype | None = None) -> Any:
    """(Triton's CompiledKernel, TailPlan, signature) of `problem` with `config` for sm_`arch`."""
    from ..kernels.conv_bn_add_relu import conv_bn_add_relu_kernel
    from ..kernels.conv_bn_add_relu_tma import conv_bn_add_relu_tma_kernel

    kernel = conv_bn_add_relu_tma_kernel if config.tma else conv_bn_add_relu_kernel
    tail_plan = plan(problem, config, programs=2 * SM_COUNT.get(arch, 108))
    tensors = tensor_specs(problem, ALIGNMENT, bn_dtype)
    if tail_plan.workspace_bytes:
        tensors["workspace"] = workspace_spec(tail_plan.workspace_bytes)
    static = (tail_plan.conv, tail_plan.proj_conv, tail_plan.tile)
    signature = _Signature(problem, tail_plan, tensors, kernel.arg_names, _TAIL_FIELDS, tail_plan.sizes, static)
    return _compile(kernel, signature, config, arch), tail_plan, signature


def compile_stats_kernel(problem: Problem, config: TailConfig, arch: int) -> Any:
    """Triton's CompiledKernel of `problem`'s convolution with statistics in its epilogue, for sm_`arch`."""
    from ..kernels.conv_bn_stats import conv_bn_stats_kernel, conv_bn_stats_tma_kernel
    from ..kernels.conv_stats_launch import scratch_words, stats_sizes

    kernel = conv_bn_stats_tma_kernel if config.tma else conv_bn_stats_kernel
    tail_plan = plan(problem, config, programs=2 * SM_COUNT.get(arch, 108))
    tensors = tensor_specs(problem, ALIGNMENT)
    records, counters = scratch_words(tail_plan, problem.k)
    for name, size in (("mean", problem.k), ("var", problem.k), ("records", records)):
        tensors[name] = TensorSpec("float32", (size,), (1,), ALIGNMENT)
    tensors["counters"] = workspace_spec(4 * counters)
    static = (tail_plan.conv, tail_plan.tile)
    signature = _Signature(problem, tail_plan, tensors, kernel.arg_names, _STATS_FIELDS, stats_sizes(tail_plan), static)
    return _compile(kernel, signature, config, arch)


def _compile(kernel: Any, signature: _Signature, config: TailConfig, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature.types, signature.constants, signature.attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile(
    problem: Problem,
    arch: str,
    out_dir: Path,
    *,
    splitk: int | None = None,
    tile: str | None = None,
    eps: float = 1e-5,
    proj_eps: float = 1e-5,
) -> Launch:
    """Compile `problem` for `arch` and write kernel.ptx, kernel.cubin and launch.json; see
    `fused_resnet.aot.compile`.
    """
    if (reason := why_not_triton() or why_not_problem(problem)) is not None:
        raise ValueError(reason)
    capability = int(re.sub(r"\D", "", arch))
    if capability < 80:
        raise ValueError(f"triton: needs compute capability 8.0 or newer, got {arch}")
    if problem.n * problem.p * problem.q == 0:
        raise ValueError(f"triton: an empty batch launches nothing, got n={problem.n}")
    config = choose_config(problem, capability, tile, splitk)
    kernel, tail_plan, signature = compile_kernel(problem, config, capability)
    values = {"eps": eps, "proj_eps": proj_eps}
    maps = iter(zip(signature.described, kernel.metadata.tensordesc_meta or (), strict=True))
    arguments: list[dict[str, Any]] = []
    for kind, value in signature.leaves:
        if kind == "tensormap":
            (name, descriptor), meta = next(maps)
            arguments.append(_tensormap(name, descriptor, meta, signature.tensors[name].dtype))
        elif kind.startswith("*"):
            arguments.append(pointer(str(value)))
        elif kind == "fp32":
            arguments.append(scalar("float32", float(values[str(value)])))
        else:
            arguments.append(scalar("int32" if kind == "i32" else "int64", int(value)))
    # Triton appends parameters of its own (scratch memory, profiler): unused here, so null, however many there are.
    hidden = _parameter_count(kernel.asm["ptx"], kernel.metadata.name) - len(arguments)
    if hidden < 0 or kernel.metadata.global_scratch_size:
        raise RuntimeError(
            f"triton: expected {len(arguments)} kernel parameters or more, got {len(arguments) + hidden}"
        )
    arguments += [pointer(None)] * hidden
    launch = Launch(
        kernel=kernel.metadata.name,
        arch=arch,
        grid=(*tail_plan.grid, 1),
        block=(32 * kernel.metadata.num_warps, 1, 1),
        dynamic_shared_bytes=kernel.metadata.shared,
        workspace_bytes=tail_plan.workspace_bytes,
        arguments=arguments,
        tensors=signature.tensors,
        problem=str(problem),
        eps=eps,
        proj_eps=proj_eps,
        workspace_initial="zeros" if tail_plan.workspace_bytes else None,
        extra={"config": str(config)},
    )
    write(out_dir, launch, kernel.asm["ptx"], kernel.asm["cubin"])
    return launch


def _tensormap(name: str, descriptor: Descriptor, meta: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The parameters of cuTensorMapEncodeTiled (enumerations by value, innermost dimension first), as Triton sets
    them.
    """
    item = meta["elem_size"]
    return tensormap(
        name,
        data_type={"float16": 6, "bfloat16": 9, "float32": 7}[dtype],
        dims=list(descriptor.shape)[::-1],
        strides_bytes=[stride * item for stride in descriptor.strides[:-1]][::-1],
        box=list(meta["block_size"])[::-1],
        element_strides=[1] * len(descriptor.shape),
        interleave=0,
        swizzle=meta["swizzle"],
        l2_promotion=L2_PROMOTION_128B,
        oob_fill=0,
    )


def _parameter_count(ptx: str, kernel: str) -> int:
    entry = ptx[re.search(rf"\.entry\s+{re.escape(kernel)}\s*\(", ptx).end() :]  # type: ignore[union-attr]
    return entry[: entry.index(")")].count(".param")


def shipped(arch: int) -> Iterator[tuple[Problem, TailConfig]]:
    """Every shipped configuration that `arch` has the shared memory for, each with a problem that fills its tile."""
    for dtype in ("dtype=float16", "dtype=float32,tf32=1", "dtype=float32"):
        problem = Problem.parse(f"n=32,h=14,w=14,c=256,k=256,padding=1,residual=1,{dtype}")
        for config in base_configs(problem, arch):
            yield problem, config
