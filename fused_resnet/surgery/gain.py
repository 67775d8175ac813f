"""Whether a plan is worth running: on the CPU not every tail is faster than eager's three operators.

Each launch costs some Python (what its module reads is looked at, weights are compared with their packed copies) and,
where the model's layout is NCHW, two copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import fx, nn

from ..backends.cpu_rule import gains_alone
from ..core import extensions
from ..core.height_width import height_width
from ..core.layout import looks_channels_last
from ..nn import tail
from .guards import descend
from .plan import Plan
from .rewrite import TAILS, is_value

#: So many weights to a convolution, at 7 x 7 pixels and more, take several times what a launch costs.
_MUCH_TO_DO = 1 << 18

Planned = Callable[[nn.Module], bool]


def why_not_worth(module: nn.Module, plan: Plan, planned: Planned) -> str | None:
    """None where ``plan`` is expected to make ``module`` faster, else a clause that says why it does not.

    On the CPU a plan gains by a convolution of which our kernels gain by themselves
    (:func:`.cpu_rule.gains_alone`), or by handing an activation, as it is, to or from a submodule that is ``planned``.
    In NCHW a convolution does not gain what eager's would in channels_last, unless another tail shares its copies.
    """
    if not on_cpu(module) or hands_on(module, plan, planned):
        return None
    gaining = [conv for conv in plan.convs(module) if gains_alone(conv)] if extensions.cpu() is not None else []
    if not gaining:
        return why_no_gain(module, plan)
    if is_chain(plan) or any(looks_channels_last(c.weight.shape, c.weight.stride()) for c in gaining):
        return None
    return (
        f"no gain is expected on the CPU in NCHW ({_kinds(gaining)}), where it stands between two copies; after "
        "model.to(memory_format=torch.channels_last) it is fused, fuse(everywhere=True) fuses it all the same"
    )


def blocks_gain(blocks: Sequence[tuple[nn.Module, Plan]]) -> bool:
    """The same for the residual blocks of a model, all of them: they hand activations on to one another.

    On the CPU they gain where a convolution of one group gathers pixels, or where there is much to do in each launch:
    never between depthwise convolutions. (One thread, AVX2, batch 1: ResNet-50 1.15 times eager's speed; grouped,
    ResNeXt-50 of 470 000 weights for each launch 1.08, RegNetY-400MF of 85 000 0.84; depthwise, MobileNetV2 0.9.)
    """
    if not all(on_cpu(module) for module, _ in blocks):
        return True
    convs = [conv for module, plan in blocks for conv in plan.convs(module)]
    if any(c.groups == 1 and tuple(c.weight.shape[2:]) != (1, 1) for c in convs):
        return True
    if any(1 < c.groups == c.in_channels for c in convs):
        return False
    return sum(c.weight.numel() for c in convs) >= _MUCH_TO_DO * len(convs)


def on_cpu(module: nn.Module) -> bool:
    """Whether the parameters of ``module`` are on the CPU, where not everything gains."""
    tensor = next(module.parameters(), None)
    return tensor is not None and tensor.device.type == "cpu"


def why_no_gain(module: nn.Module, plan: Plan) -> str:
    """The clause that says why ``plan`` gains nothing."""
    kinds = _kinds(plan.convs(module))
    return f"no gain is expected on the CPU ({kinds}); fuse(everywhere=True) fuses it all the same"


def hands_on(module: nn.Module, plan: Plan, planned: Planned) -> bool:
    """Whether a ``planned`` submodule of ``module`` gets its input from a tail, or another, or hands one its output."""
    nodes = plan.programs[-1].graph.nodes
    calls = {n for n in nodes if n.target is tail.call and planned(_called(module, n))}
    makers = calls | {n for n in nodes if n.target in TAILS}
    return any(_sources(node) & (makers if node in calls else calls) for node in makers)


def is_chain(plan: Plan) -> bool:
    """Whether a tail of ``plan`` hands its activation, as it is, to another."""
    tails = [n for n in plan.programs[-1].graph.nodes if n.target in TAILS]
    return any(not _sources(node).isdisjoint(tails) for node in tails)


def _called(module: nn.Module, call: fx.Node) -> nn.Module:
    path = str(cast(fx.Node, call.args[0]).target)
    called = descend(module, tuple(path.split(".")))
    assert called is not None
    return called


def _sources(node: fx.Node) -> set[fx.Node]:
    """The tails and calls whose values ``node`` reads, what is free of layouts in between."""
    found: set[fx.Node] = set()
    stack = [n for n in node.all_input_nodes if is_value(n)]
    while stack:
        value = stack.pop()
        if value.target in (*TAILS, tail.call):
            found.add(value)
        else:
            stack += [n for n in value.all_input_nodes if is_value(n)]
    return found


def _kinds(convs: Sequence[nn.Conv2d]) -> str:
    return ", ".join(dict.fromkeys(map(_kind, convs)))


def _kind(conv: nn.Conv2d) -> str:
    """What is said of a convolution that does not gain: ``depthwise 3x3``, ``7x7 with stride 2``, ``3 channels``."""
    k, c, r, s = conv.weight.shape
    size, stride = f"{r}x{s}", max(height_width("stride", conv.stride))
    if conv.groups > 1:
        return f"{'depthwise' if conv.groups == conv.in_channels else 'grouped'} {size}"
    if stride > 1:
        return f"{size} with stride {stride}"
    return f"{size} of {c} to {k} channels" if (r, s) == (3, 3) else size
