"""Every sentence with which fused_resnet refuses something, read from its source, and what to do about it.

    python docs/code/sentences.py        # the list as Markdown

A sentence is what an exception is raised with, what a function returns that is annotated ``-> str | None`` or has
"why" in its name, or what is called ``reason`` or ``why_not``; its values stand as ``...``. A remedy is given for a
group (a part of the package) and, where there is more to say, by the first of :data:`REMEDIES` whose words are in the
sentence.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "fused_resnet"

GAP = "…"
ERRORS = {
    "ConfigError", "CheckpointError", "DataError", "NotImplementedError", "RuntimeError", "TypeError", "UserError",
    "ValueError", "ImportError", "ModuleNotFoundError", "Untraceable", "KeyError", "SystemExit",
    "Refused", "SeveralInputs",
}  # fmt: skip

#: Part of the package: heading, what its sentences mean for who reads one. The first that fits.
GROUPS: dict[str, tuple[str, str]] = {
    "surgery/frozen": (
        "Frozen models",
        "A call that asks for more than the answer runs on the live model, `fast.model`, with the right result. To "
        "run frozen, call it with plain tensors under `torch.inference_mode()`.",
    ),
    "surgery": (
        "Blocks that fuse leaves alone",
        "The block runs its own forward: the result is the model's own, only not faster. `explain(model)` shows the "
        "sentence with the block's name. Sentences that speak of a plan mean that something has changed since "
        "`fuse`: `fused_resnet.refresh(model)` plans anew.",
    ),
    "nn": (
        "Fused blocks",
        "A fused block looks at its parts at each call, and runs unfused while one of them is not what it seems.",
    ),
    "backends": (
        "Backends",
        'Only who asks for a backend by name (`backend="cuda"`, `FUSED_RESNET_BACKEND`) gets the sentence as an '
        'error; `"auto"` takes the next backend. `fused-resnet doctor` prints what runs here.',
    ),
    "selection": (
        "Choosing a kernel",
        "A kernel that failed its comparison is never run again on this device; the next one runs. `fused-resnet "
        "selftest` repeats the comparisons.",
    ),
    "ops": (
        "Arguments of the operators",
        "The sentence names the argument, what was expected and what was got; change the call.",
    ),
    "functional": ("Functions", "The sentence names the argument, what was expected and what was got."),
    "core": (
        "Problems, timing and the extension",
        "Values are checked where they are given: correct the named one.",
    ),
    "models": ("Building models and loading weights", "The weights or arguments do not fit the model: see the names."),
    "kernels": ("Launching Triton kernels", "Only who calls the kernels directly sees these."),
    "aot": ("Ahead-of-time compilation", "`fused-resnet compile` prints them and exits with status 2."),
    "devices": ("Devices", "Choose a name of the list in the sentence."),
    "tuning": ("Tuning", "The command ends with status 1 or 2; what was found before is kept."),
    "comparison": ("Comparing models", "The comparison could not be made; nothing is known of the model's errors."),
    "trainer": ("Training runs", "Nothing has been written over; correct the named option or file and start again."),
    "cli": ("The command line", "Exit status 2: the input was wrong. `--help` lists the options."),
    "": ("The package", "See the sentence."),
}

#: Words of a sentence (a regular expression) and the remedy for it.
REMEDIES: tuple[tuple[str, str], ...] = (
    # what was built and installed
    (r"is not built", "do what the sentence says; until then the next backend runs"),
    (r"does not load with torch", "build again beside this torch"),
    (r"package triton is not installed", "`pip install triton`"),
    (r"no NVIDIA GPU is visible|torch sees no GPU", "look at `nvidia-smi` and at `CUDA_VISIBLE_DEVICES`"),
    (r"needs (sm_|compute capability)", "nothing to do: cuDNN or eager runs on older GPUs"),
    (r"extension was built for", "build again with `TORCH_CUDA_ARCH_LIST` naming this GPU's capability"),
    # what a backend can run
    (r"groups must be 1", "nothing to do: grouped convolutions run on a backend that has them"),
    (r"activation must be relu", "nothing to do: `auto` takes another backend"),
    (r"(dtype|activations) must (be|not)", "nothing to do: `auto` takes another backend; or convert the model"),
    (r"must be on (a CUDA device|the CPU)|device must be", "move model and input to that device"),
    (r"oneDNN|cuDNN, got", "take a build of torch that has it"),
    (r"cudnn.enabled", "`torch.backends.cudnn.enabled = True`"),
    (r"takes x in channels_last|x or weight in channels_last", "`x.contiguous(memory_format=torch.channels_last)`"),
    # what fuse leaves alone
    (r"made inside forward", "make the module in `__init__`, where it is trained and saved"),
    (r"decides by the data", "move the decision out of the block's forward"),
    (
        r"no gain is expected on the CPU in NCHW",
        "`fuse(model.to(memory_format=torch.channels_last))` fuses it",
    ),
    (r"no gain is expected", "nothing to do; `fuse(model, everywhere=True)` fuses it all the same"),
    (r"takes more than one argument", "nothing to do: what is inside is planned by itself where it can be"),
    (r"cannot be traced", "look at the named error: a call that `torch.fx` cannot follow; write it another way"),
    (r"only batch norm fits", "nothing to do: other norms depend on the values of the convolution"),
    (r"has no conv -> BN", "nothing to do"),
    (r"draws random numbers", "move the random part into a module of its own, outside of the block"),
    (r"in its forward|which is not its own", "do it outside and hand over the value, as an argument or an attribute"),
    (r"compares classes", "compare a name or an attribute of your own"),
    (r"function that cannot be found again|default values hold", "define the function at the top level of its module"),
    (r"differs from its fused form|another structure", "the comparison did its work; please report the block"),
    (r"own backward fails|copied for the comparison", "make the block's backward and `copy.deepcopy` work"),
    (r"has a forward of its own", "remove the attribute `forward` of that instance"),
    (r"only zeros can be fused|pads unevenly", "nothing to do, or pad by zeros evenly"),
    # what has changed since fuse
    (r"hook is registered|hook for all modules", "remove the hook: it has to see every module called"),
    (r"the plan was made|which it was not|not what it was|has been set on|any more$|has lost|other default values|"
     r"other attributes|are no longer|it had |it was a |is gone", "`fused_resnet.refresh(model)`"),
    (r"TorchFunctionMode", "leave the mode's `with` block; inside it blocks run their own forward"),
    # frozen models, gradients
    (r"evaluation mode", "call `model.eval()` before"),
    (r"frozen model cannot be trained", "train `fast.model`, then call `fast.refresh()`"),
    (r"double backward|forward-mode differentiation is not", "`unfuse(model)` for that computation"),
    (r"cannot be copied, because", "`fuse(model, inplace=True)`; or `prune.remove`, `remove_parametrizations`"),
)  # fmt: skip


@dataclass(frozen=True)
class Sentence:
    group: str
    text: str
    remedy: str | None


def _text(node: ast.AST) -> str | None:
    """The text of a string, its values as ``…``; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None and right is None else (left or GAP) + (right or GAP)
    return None


def _gives_a_reason(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    returns = "" if function.returns is None else ast.unparse(function.returns)
    return returns == "str | None" or (returns == "str" and "why" in function.name)


def _strings(node: ast.AST | None) -> Iterator[str]:
    if isinstance(node, ast.IfExp):
        yield from _strings(node.body)
        yield from _strings(node.orelse)
    elif node is not None and (text := _text(node)) is not None:
        yield text


def _of_file(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))
            if name in ERRORS and node.exc.args:
                yield from _strings(node.exc.args[0])
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _gives_a_reason(node):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return):
                    yield from _strings(inner.value)
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("reason", "why_not"):
            yield from _strings(node.value)


def sentences() -> list[Sentence]:
    """All of them, in the order of the groups, each once in its group."""
    found: dict[Sentence, None] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).with_suffix("").as_posix()
        group = next(name for name in GROUPS if not name or place == name or place.startswith(f"{name}/"))
        for text in _of_file(path):
            text = re.sub(f"{GAP}(\\.?{GAP})+", GAP, re.sub(r"\s+", " ", text).strip())
            if len(re.sub(r"\W", "", text)) >= 8 and " " in text:  # more than a name or a format
                remedy = next((remedy for words, remedy in REMEDIES if re.search(words, text)), None)
                found[Sentence(group, text, remedy)] = None
    order = list(GROUPS)
    return sorted(found, key=lambda sentence: order.index(sentence.group))


def markdown() -> str:
    """A section for each group, a line for each sentence."""
    every = sentences()
    lines: list[str] = []
    for group, (heading, what) in GROUPS.items():
        own = [sentence for sentence in every if sentence.group == group]
        if own:
            lines += ["", f"## {heading}", "", what, ""]
        for sentence in own:
            shown = sentence.text.replace("`", "'")
            lines.append(f"- `{shown}`" + (f" → {sentence.remedy}" if sentence.remedy else ""))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown())
