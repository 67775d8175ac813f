"""The command line as the tests call it: in this process, with its exit status looked at."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner, Result

from fused_resnet.cli import app

torchvision = pytest.importorskip("torchvision")

#: A small ResNet in a user's own file: two residual blocks, one with a projection.
MODEL_FILE = """
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

class Net(nn.Module):
    def __init__(self, classes=4, channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        down = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 32, 2, down))
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))

class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))

instance = Net()
factory = lambda: Net(classes=3)
number = 5

def needs_arguments(width):
    return Net()

def fails():
    raise OSError("no such disk")
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def ok(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object) -> str:
    """The last line on stderr of a user's error: its one sentence."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    *notes, error = result.stderr.splitlines()
    assert error.startswith("error: "), result.stderr
    assert all(note.startswith(("note: ", "unreadable: ")) for note in notes), result.stderr
    return error
