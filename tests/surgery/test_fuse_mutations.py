"""Random changes of a model in use, of every kind, on an eager model and its fused twin: never another answer."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from fused_resnet import fuse
from tests.support.surgery_helpers import SmallResNet, randomise

Mutation = Callable[[Any, int], None]
MUTATIONS: list[Mutation] = []


def mutation(function: Mutation) -> Mutation:
    """Register a change of ``model``, made of nothing but the model and ``seed``: equal on both sides."""
    MUTATIONS.append(function)
    return function


def pick(model: nn.Module, cls: Any, seed: int) -> Any:
    found = [m for m in model.modules() if isinstance(m, cls)]
    return found[seed % len(found)]


def noise(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape, generator=generator).to(like) - 0.5


# ---- weights, by many routes ---------------------------------------------------------------------------------


@mutation
def weight_under_no_grad(model: Any, seed: int) -> None:
    weight = pick(model, nn.Conv2d, seed).weight
    with torch.no_grad():
        weight.add_(noise(weight, seed), alpha=0.2)


@mutation
def weight_data(model: Any, seed: int) -> None:
    weight = pick(model, nn.Conv2d, seed).weight
    weight.data[seed % len(weight)].mul_(-1.5)


@mutation
def weight_replaced(model: Any, seed: int) -> None:
    conv = pick(model, nn.Conv2d, seed)
    conv.weight = nn.Parameter(conv.weight.detach() * 0.8)


@mutation
def weight_storage(model: Any, seed: int) -> None:
    weight = pick(model, nn.Conv2d, seed).weight
    weight.data = weight.data.clone().mul_(0.9)


@mutation
def weight_by_numpy(model: Any, seed: int) -> None:
    weight = pick(model, nn.Conv2d, seed).weight
    if weight.is_contiguous():
        weight.detach().numpy().reshape(-1)[seed % weight.numel()] += 0.5


@mutation
def weight_by_optimizer(model: Any, seed: int) -> None:
    weight = pick(model, nn.Conv2d, seed).weight
    weight.grad = noise(weight, seed)
    torch.optim.SGD([weight], lr=0.1, fused=weight.dtype is torch.float32).step()
    weight.grad = None


@mutation
def weight_by_state_dict(model: Any, seed: int) -> None:
    name = [n for n, t in model.state_dict().items() if t.dim() == 4][seed % 3]
    model.load_state_dict({name: model.state_dict()[name] * 0.95}, strict=False)


@mutation
def weight_swapped(model: Any, seed: int) -> None:
    weight = pick(model, nn.Conv2d, seed).weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 1.05))


@mutation
def weight_through_a_view(model: Any, seed: int) -> None:
    weight = pick(model, nn.Conv2d, seed).weight
    weight.detach()[:, seed % weight.shape[1]].mul_(-0.7)


@mutation
def all_weights_averaged(model: Any, seed: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.lerp_(noise(parameter, seed), 0.02)


# ---- batch norms ------------------------------------------------------------------------------------------------


@mutation
def running_statistics(model: Any, seed: int) -> None:
    bn = pick(model, nn.BatchNorm2d, seed)
    bn.running_mean.add_(noise(bn.running_mean, seed))
    bn.running_var.mul_(1.1)


@mutation
def gamma_and_beta(model: Any, seed: int) -> None:
    bn = pick(model, nn.BatchNorm2d, seed)
    if bn.weight is not None:
        bn.weight.data.mul_(-0.9)
        bn.bias.data.add_(0.1)


@mutation
def eps(model: Any, seed: int) -> None:
    pick(model, nn.BatchNorm2d, seed).eps = 10.0 ** -(1 + seed % 5)


@mutation
def batch_norm_mode(model: Any, seed: int) -> None:
    bn = pick(model, nn.BatchNorm2d, seed)
    bn.train(not bn.training)


@mutation
def batch_norm_replaced(model: Any, seed: int) -> None:
    block = pick(model, BasicBlock, seed)
    block.bn1 = randomise(nn.BatchNorm2d(block.bn1.num_features), seed=seed, dtype=block.conv1.weight.dtype).eval()


# ---- attributes, methods, hooks ------------------------------------------------------------------------------------


@mutation
def activation(model: Any, seed: int) -> None:
    pick(model, BasicBlock, seed).relu = [nn.ReLU, nn.ReLU6, nn.GELU, nn.LeakyReLU, nn.Sequential][seed % 5]()


@mutation
def padding_mode(model: Any, seed: int) -> None:
    conv = pick(model, BasicBlock, seed).conv2
    conv.padding_mode = ["zeros", "circular"][seed % 2]


@mutation
def geometry(model: Any, seed: int) -> None:
    conv = pick(model, BasicBlock, seed).conv2
    dilation = 1 + seed % 2
    form: Any = [int, lambda v: (v, v), lambda v: [v, v]][seed % 3]
    conv.padding = conv.dilation = form(dilation)


@mutation
def forward_of_ones_own(model: Any, seed: int) -> None:
    bn = pick(model, BasicBlock, seed).bn1
    if bn.__dict__.pop("forward", None) is None:
        bn.forward = lambda x: 0.5 * type(bn).forward(bn, x)


@mutation
def convolution_of_ones_own(model: Any, seed: int) -> None:
    conv = pick(model, BasicBlock, seed).conv1
    if conv.__dict__.pop("_conv_forward", None) is None:
        conv._conv_forward = lambda x, w, b: 0.5 * type(conv)._conv_forward(conv, x, w, b)


@mutation
def hook(model: Any, seed: int) -> None:
    module = pick(model, (nn.Conv2d, nn.BatchNorm2d), seed)
    if module._forward_hooks:
        module._forward_hooks.clear()
    else:
        module.register_forward_hook(lambda m, args, out: out * 0.5)


@mutation
def downsample(model: Any, seed: int) -> None:
    block = model.layer1[0]
    block.downsample = None if block.downsample is not None else nn.Identity()


# ---- modules, modes, dtypes, layouts ---------------------------------------------------------------------------------


@mutation
def block_replaced(model: Any, seed: int) -> None:
    dtype = next(model.parameters()).dtype
    model.layer1[0] = randomise(BasicBlock(8, 8), seed=seed, dtype=dtype).eval()


@mutation
def block_appended(model: Any, seed: int) -> None:
    if len(model.layer1) > 2:
        del model.layer1[2]
    else:
        model.layer1.append(randomise(BasicBlock(12, 12), seed=seed, dtype=next(model.parameters()).dtype).eval())


@mutation
def mode(model: Any, seed: int) -> None:
    model.train(seed % 3 == 0)


@mutation
def dtype_there_and_back(model: Any, seed: int) -> None:
    model.to([torch.float32, torch.float64][seed % 2])


@mutation
def layout(model: Any, seed: int) -> None:
    model.to(memory_format=[torch.channels_last, torch.contiguous_format][seed % 2])


@mutation
def frozen_weights(model: Any, seed: int) -> None:
    model.requires_grad_(seed % 2 == 0)


def answer(model: nn.Module, x: Tensor, grad: bool) -> Tensor | str:
    with torch.set_grad_enabled(grad):
        try:
            return model(x).detach()
        except Exception as error:
            return type(error).__name__


def assert_never_different(count: int, seed: int) -> None:
    """Each of ``count`` mutations is followed by a call of both; a fresh pair of models every 25."""
    choose = random.Random(seed)
    model: Any = None
    done: list[str] = []
    for number in range(count):
        if number % 25 == 0:
            model = randomise(SmallResNet(), torch.float32, seed=number).eval()
            fused: Any = fuse(model)
            done = []
        change, value = choose.choice(MUTATIONS), choose.randrange(1000)
        change(model, value)
        change(fused, value)
        done.append(f"{change.__name__}({value})")
        x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(number))
        x = x.to(next(model.parameters()).dtype)
        grad = choose.random() < 0.3
        state = copy.deepcopy(model.state_dict())
        expected, got = answer(model, x, grad), answer(fused, x, grad)
        if isinstance(expected, str):
            assert isinstance(got, str), f"eager raises {expected} after {done}"
            continue
        assert isinstance(got, Tensor), f"{got} after {done}"
        if not expected.isfinite().all() or expected.abs().max() > 1e4:  # nothing is compared well any more
            model.load_state_dict(state)
            continue
        error = float((got - expected).abs().max()) / (1 + float(expected.abs().max()))
        assert error < 2e-3, f"differs by {error:.2g} after {done}"


@pytest.mark.parametrize("seed", range(2))
def test_no_mutation_goes_unnoticed(seed: int) -> None:
    assert_never_different(100, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_two_thousand_mutations(seed: int) -> None:
    assert_never_different(200, seed)
