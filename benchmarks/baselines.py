"""The rivals: every way a user may already run a tail or a ResNet, as sides of a comparison.

Rivals that need a library are optional: where it is missing, the row says so. CPU rivals get the number of threads
of the comparison; all weights are float32 unless a rival's name says otherwise.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fused_resnet import backends, functional
from fused_resnet.comparison import sides
from fused_resnet.comparison.sides import EAGER, EAGER_CHANNELS_LAST, FUSED, channels_last_inputs
from fused_resnet.core.packed_weights import PackedWeights
from fused_resnet.core.problem import Problem
from fused_resnet.core.reference import TailArguments, conv_bn, reference, scale_shift
from fused_resnet.core.timing import Contender
from fused_resnet.testing import call_arguments, make_tail

from . import onednn

EAGER_LAYOUTS = (EAGER, EAGER_CHANNELS_LAST)
FOLDED, ONEDNN, COMPILED, FREEZING = "folded", "oneDNN fused", "torch.compile", "torch.compile + freezing"
CUDNN, ORT, OPENVINO, NCNN = "cuDNN fused", "ONNX Runtime", "OpenVINO", "ncnn"
GPU_BACKENDS, TMA = ("triton", "cuda", "cudnn", "two_pass"), "fused, triton TMA"


# ---- the tail ------------------------------------------------------------------------------------------------


def tail_inputs(problem: Problem, device: torch.device) -> Callable[[int], tuple[Tensor, ...]]:
    """Fresh activations for each round: x and what is added (the residual, or the projection's input).

    Rectified, since in a network both are what a ReLU left. It matters: a CPU's matrix tiles are limited by power, and
    take up to a quarter longer for values without zeros. Nothing else is drawn: weights that nobody uses would push
    those in use out of the last cache.
    """

    shapes = [(problem.n, problem.c, problem.h, problem.w)]
    if problem.projection is not None:
        shapes.append((problem.n, problem.projection.c, problem.projection.h, problem.projection.w))
    elif problem.residual is not None:
        shapes.append(problem.output_shape)
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format

    def make(round_number: int) -> tuple[Tensor, ...]:
        g = torch.Generator(device).manual_seed(round_number)
        drawn = (torch.randn(shape, generator=g, device=device).relu() for shape in shapes)
        return tuple(t.to(device, problem.dtype, memory_format=layout) for t in drawn)

    return make


def _with_activations(tail: TailArguments, *activations: Tensor) -> TailArguments:
    x, *added = activations
    if tail.proj is not None:
        return tail._replace(x=x, proj_x=added[0])
    return tail._replace(x=x, residual=added[0] if added else None)


def _nchw(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous().clone() for t in inputs)


def tail_contenders(problem: Problem, device: torch.device, compiled: bool) -> list[Contender]:
    """All sides of one tail. Weights are made once; activations are fresh in each round."""
    tail = _weights_of(problem, device)
    conv = tail.conv
    nchw = tail._replace(conv=conv._replace(weight=conv.weight.contiguous()))
    if tail.proj is not None:
        nchw = nchw._replace(proj=tail.proj._replace(weight=tail.proj.weight.contiguous()))
    folded = _folded(tail)

    def fused(backend: str, winograd: str = "auto") -> Callable[..., Tensor]:
        # Weights of its own, as every side of a comparison has: calls with other options on the same weights would
        # make each call look its plan up anew.
        own = _weights_of(problem, device)
        arguments = call_arguments(own) | {"backend": backend, "winograd": winograd, "packed_weights": PackedWeights()}
        del arguments["x"]
        if tail.proj is not None:
            del arguments["proj_x"]
            with_projection = partial(functional.conv_bn_proj_add_relu, **arguments)
            return lambda x, proj_x: with_projection(x, proj_x=proj_x)
        arguments.pop("residual", None)
        function = partial(functional.conv_bn_add_relu, **arguments)
        return lambda x, residual=None: function(x, residual=residual)

    contenders = [
        Contender(EAGER, lambda: lambda *a: reference(_with_activations(nchw, *a)), _nchw),
        Contender(EAGER_CHANNELS_LAST, lambda: lambda *a: reference(_with_activations(tail, *a)), channels_last_inputs),
        Contender(FOLDED, lambda: lambda *a: reference(_with_activations(folded, *a)), channels_last_inputs),
    ]
    if device.type == "cpu":
        contenders.append(Contender(ONEDNN, lambda: onednn.tail(tail), channels_last_inputs, optional=True))
    else:
        contenders.append(Contender(CUDNN, lambda: _cudnn(folded), channels_last_inputs, optional=True))
    if compiled:
        for name, freezing in ((COMPILED, False), (FREEZING, True)):
            build = _compiled_tail(tail, freezing)
            contenders.append(Contender(name, build, channels_last_inputs, optional=True))
    contenders.append(Contender(FUSED, lambda: fused("auto"), channels_last_inputs))
    if device.type == "cuda":
        contenders += [
            Contender(f"fused, {name}", lambda name=name: fused(name), channels_last_inputs, optional=True)
            for name in GPU_BACKENDS
        ]
        contenders.append(Contender(TMA, lambda: _described(problem, device), channels_last_inputs, optional=True))
    if device.type == "cpu":
        contenders.append(Contender("fused, f2", lambda: fused("auto", "f2"), channels_last_inputs))
        contenders.append(Contender("fused, no Winograd", lambda: fused("auto", "off"), channels_last_inputs))
    return contenders


def _weights_of(problem: Problem, device: torch.device) -> TailArguments:
    """A tail of one image for its weights: activations of whole batches are drawn on the device, not here."""
    return make_tail(dataclasses.replace(problem, n=1), device=device)


def _described(problem: Problem, device: torch.device) -> Callable[..., Tensor]:
    """Triton's preferred tile with operands through tensor descriptors, launched without the operator."""
    from fused_resnet.kernels import config, launch

    if (reason := config.why_not_tma(problem, launch.capability(device))) is not None:
        raise RuntimeError(reason)
    tail = _weights_of(problem, device)
    chosen = next(c for c in launch.preferred(problem, device) if c.tma)
    call = backends.get("triton").bind(problem, tail, chosen)
    return lambda *activations: call(_with_activations(tail, *activations))


def _folded(tail: TailArguments) -> TailArguments:
    """BN folded into weights and bias, as deployment guides do; the rest is eager."""

    def fold(c: Any) -> Any:
        scale, shift = scale_shift(c)
        weight = c.weight if scale is None else (c.weight.float() * scale.view(-1, 1, 1, 1)).to(c.weight.dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        bias = None if shift is None else shift.to(c.weight.dtype)
        return type(c)(weight, bias)

    return tail._replace(conv=fold(tail.conv), proj=None if tail.proj is None else fold(tail.proj))


def _cudnn(folded: TailArguments) -> Callable[..., Tensor]:
    """aten's fused convolution + add + ReLU of cuDNN, on folded weights; the projection is a launch before it."""
    conv = folded.conv

    def run(x: Tensor, added: Tensor) -> Tensor:
        if folded.proj is not None:
            added = conv_bn(added, folded.proj, folded.proj_stride, (0, 0), (1, 1), 1)
        return torch.cudnn_convolution_add_relu(
            x, conv.weight, added, 1.0, conv.bias, folded.stride, folded.padding, folded.dilation, folded.groups
        )

    return run


class _TailModule(nn.Module):
    """The tail as a module: freezing needs the weights to be parameters."""

    def __init__(self, tail: TailArguments) -> None:
        super().__init__()
        self.tail = tail
        for prefix, part in (("conv", tail.conv), ("proj", tail.proj)):
            for name, value in part._asdict().items() if part is not None else ():
                if isinstance(value, Tensor):
                    self.register_parameter(f"{prefix}_{name}", nn.Parameter(value, requires_grad=False))

    def _part(self, prefix: str, part: Any) -> Any:
        own = {name: getattr(self, f"{prefix}_{name}", value) for name, value in part._asdict().items()}
        return part._replace(**own)

    def forward(self, *activations: Tensor) -> Tensor:
        tail = self.tail._replace(conv=self._part("conv", self.tail.conv))
        if tail.proj is not None:
            tail = tail._replace(proj=self._part("proj", tail.proj))
        return reference(_with_activations(tail, *activations))


def _compiled_tail(tail: TailArguments, freezing: bool) -> Callable[[], Callable[..., Tensor]]:
    return lambda: _compile(_TailModule(tail).eval(), freezing)


def _compile(module: nn.Module, freezing: bool) -> Callable[..., Any]:
    """``torch.compile``, with freezing or without.

    Freezing is asked for twice: Dynamo reads the global switch while it traces, and ``options`` give this side a
    backend of its own, without which it would share the other side's compiled code (two copies of one module pass
    each other's guards).
    """
    run = torch.compile(module, options={"freezing": freezing})
    first = [True]

    def compiled(*inputs: Tensor) -> Any:
        with _freezing(freezing):
            if first[0]:
                first[0] = False
                with torch.inference_mode(False), torch.no_grad():  # weights are folded outside inference mode
                    run(*(t.clone() for t in inputs))
            return run(*inputs)

    return compiled


@contextmanager
def _freezing(on: bool) -> Iterator[None]:
    from torch._inductor import config

    before = config.freezing
    config.freezing = on
    try:
        yield
    finally:
        config.freezing = before


# ---- whole models --------------------------------------------------------------------------------------------


def model_contenders(model: nn.Module, x: Tensor, threads: int) -> list[Contender]:
    """All sides of a whole network with the input ``x``."""
    contenders = [
        sides.eager(model),
        sides.eager_channels_last(model),
        Contender(FOLDED, lambda: _folded_model(model), channels_last_inputs),
    ]
    if x.device.type == "cpu" and x.dtype is torch.float32:
        contenders.append(Contender(ONEDNN, lambda: onednn.network(model), channels_last_inputs, optional=True))
    contenders.append(Contender(COMPILED, lambda: _compile(_last(model), False), channels_last_inputs, optional=True))
    contenders.append(Contender(FREEZING, lambda: _compile(_last(model), True), channels_last_inputs, optional=True))
    if x.device.type == "cpu" and x.dtype is torch.float32:
        numpy_inputs = _numpy
        contenders += [
            Contender(ORT, lambda: _onnx_runtime(model, x, threads), numpy_inputs, optional=True),
            Contender(OPENVINO, lambda: _openvino(model, x, threads), numpy_inputs, optional=True),
            Contender(NCNN, lambda: _ncnn(model, x, threads), numpy_inputs, optional=True),
        ]
    contenders += [sides.fused(model), sides.frozen(model)]
    if x.device.type == "cpu":
        contenders.append(sides.fused(model, "fused, no Winograd", winograd="off"))
    else:
        for name in GPU_BACKENDS:
            own = sides.fused(model, f"fused, {name}", backend=name)
            contenders.append(Contender(own.name, own.build, own.inputs, own.output, optional=True))
    return contenders


def _last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().to(memory_format=torch.channels_last)


def _numpy(x: Tensor) -> tuple[Any, ...]:
    return (x.contiguous().numpy().copy(),)


def _folded_model(model: nn.Module) -> nn.Module:
    """BN folded into each convolution before it, by torch's own helper; everything else eager, channels_last."""
    folded = copy.deepcopy(model).eval()
    modules = dict(folded.named_modules())
    previous: tuple[str, nn.Module] | None = None
    for name, module in modules.items():
        if isinstance(module, nn.BatchNorm2d) and previous is not None:
            conv_name, conv = previous
            _put(folded, conv_name, fuse_conv_bn_eval(conv, module))
            _put(folded, name, nn.Identity())
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            previous = (name, module) if isinstance(module, nn.Conv2d) else None
    return folded.to(memory_format=torch.channels_last)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _onnx_runtime(model: nn.Module, x: Tensor, threads: int) -> Callable[..., Any]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "model.onnx")
        torch.onnx.export(copy.deepcopy(model).eval(), (x.clone(),), str(path), dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle workers of ORT would take the other contenders' cores between its own turns.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})


def _openvino(model: nn.Module, x: Tensor, threads: int) -> Callable[..., Any]:
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(copy.deepcopy(model).eval(), example_input=x.clone())
    converted.reshape(list(x.shape))
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    return lambda array: torch.from_numpy(compiled(array)[0])


def _ncnn(model: nn.Module, x: Tensor, threads: int) -> Callable[..., Any]:
    """ncnn by its own converter, whose weights are float16; one image at a time, as ncnn has no batches."""
    import ncnn
    import pnnx

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = Path(folder, "model.pt")
        pnnx.export(copy.deepcopy(model).eval(), str(traced), x[:1].clone())
        network = ncnn.Net()
        network.opt.num_threads = threads
        network.opt.use_fp16_packed = network.opt.use_fp16_storage = network.opt.use_fp16_arithmetic = False
        network.load_param(str(traced.with_suffix(".ncnn.param")))
        network.load_model(str(traced.with_suffix(".ncnn.bin")))

    def run(array: Any) -> Tensor:
        outputs = []
        for image in array:
            extractor = network.create_extractor()
            extractor.input("in0", ncnn.Mat(image))
            outputs.append(torch.from_numpy(extractor.extract("out0")[1].numpy().copy()))
        return torch.stack(outputs)

    run.network = network  # type: ignore[attr-defined]  # ncnn's Mat refers to it
    return run


def reference_of(problem: Problem, device: torch.device) -> Callable[..., Tensor]:
    """The float64 answer for a round's activations."""
    exact = _weights_of(problem, device).to(torch.float64)
    return lambda *a: reference(_with_activations(exact, *(t.double() for t in a)))


__all__ = [
    "COMPILED", "CUDNN", "EAGER_LAYOUTS", "FOLDED", "FREEZING", "FUSED", "GPU_BACKENDS", "NCNN", "ONEDNN", "OPENVINO",
    "ORT", "TMA", "model_contenders", "reference_of", "tail_contenders", "tail_inputs",
]  # fmt: skip
