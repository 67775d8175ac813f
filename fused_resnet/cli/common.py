"""What all commands share: the consoles, errors as one sentence, option types."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..core.errors import first_line

if TYPE_CHECKING:
    import torch

console = Console()
errors = Console(stderr=True)

#: Exit status of a user's mistake; 1 is a check that failed.
USER_ERROR = 2


class UserError(Exception):
    """Something only the user can put right; its text is one sentence."""


#: Modules that some commands need and calls never do, and the packages that bring them.
_OPTIONAL = {
    "PIL": "pillow", "matplotlib": "matplotlib", "numpy": "numpy", "safetensors": "safetensors",
    "sklearn": "scikit-learn", "torchmetrics": "torchmetrics", "torchvision": "torchvision", "triton": "triton",
}  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])


def reports_errors(function: F) -> F:
    """Decorator of a command: a :class:`UserError`, or the lack of an optional package, becomes one line on stderr
    and exit status 2.
    """

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            sentence = str(error)
        except ModuleNotFoundError as missing:
            module = (missing.name or "").partition(".")[0]
            if module not in _OPTIONAL:
                raise
            sentence = f"this command needs {module}: pip install {_OPTIONAL[module]}"
        errors.print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True, highlight=False)
        raise typer.Exit(USER_ERROR)

    return command  # type: ignore[return-value]


@contextmanager
def user_errors(*types: type[Exception], prefix: str = "") -> Iterator[None]:
    """Errors of these types, raised by the library for a user's input, become :class:`UserError`."""
    try:
        yield
    except types as error:
        raise UserError(prefix + first_line(error)) from error


def say(text: str = "") -> None:
    """Print one line as it is: not wrapped, no markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def progress_bar() -> Progress:
    """A progress bar on stderr, so that stdout can be piped; gone when it is done."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=errors, transient=True, disable=not errors.is_terminal,
    )  # fmt: skip


# ---- options -------------------------------------------------------------------------------------------------

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="torchvision or timm name, or file.py:object", show_default=False)
]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", help="checkpoint (.pt, .pth, .safetensors), or a torchvision weights name"),
]
BatchOption = Annotated[int, typer.Option("--batch", "-b", min=1, help="images in a batch")]
SizeOption = Annotated[int, typer.Option("--size", "-s", min=1, help="height and width of the input")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda; default: cuda where there is one")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16")]
BackendOption = Annotated[str, typer.Option("--backend", help="auto, or a backend of `fused-resnet doctor`")]
WinogradOption = Annotated[str, typer.Option("--winograd", help="CPU algorithm for 3x3: auto, f2 or off")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: torch's own")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


def device_of(text: str | None) -> torch.device:
    """The device named on the command line, or the best there is."""
    import torch

    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with user_errors(RuntimeError, prefix="--device: "):
        device = torch.device(text)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda was asked for, but torch sees no GPU (`fused-resnet doctor` says more)")
    return device


def dtype_of(text: str) -> torch.dtype:
    """The dtype named on the command line."""
    from ..core.problem import DTYPES

    if text not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


def fused_copy(model: torch.nn.Module, backend: str, winograd: str) -> torch.nn.Module:
    """``fuse(model)`` with the options of the command line."""
    from ..surgery import fuse

    with user_errors(ValueError, RuntimeError):
        return fuse(model, backend=backend, winograd=winograd)


def integers(option: str, text: str) -> Sequence[int]:
    """``"1,8,256"`` as numbers."""
    try:
        numbers = [int(piece) for piece in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option}: expected positive integers such as 1,8, got {text!r}")
    return numbers
