#!/usr/bin/env python3
"""Trains the demo's network on scikit-learn's handwritten digits and writes examples/digits.onnx.

python tools/train_digits.py [--out examples/digits.onnx] [--epochs 40] [--seed 0]

One thread, fixed seeds: the same versions on the same machine give the same file. Needs the "demo" extra. BatchNorm
stays in the exported network, so that lowering it has something to fold.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# This checkout first, and without tools/, whose modules could hide others.
sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "tools")]

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from examples.digits_data import INPUT, SIZE, digits  # noqa: E402


class ConvNorm(nn.Module):
    """relu(bn(conv3x3(x)))."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


class Residual(nn.Module):
    """relu(x + bn(conv3x3(relu(bn(conv3x3(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(x + self.second_norm(self.second(inner)))


def network() -> nn.Sequential:
    """121,386 parameters: (N, 1, 16, 16) -> (N, 10) logits."""

    return nn.Sequential(
        OrderedDict(
            stem=ConvNorm(1, 32, 1),
            down1=ConvNorm(32, 32, 2),
            block1=Residual(32),
            down2=ConvNorm(32, 64, 2),
            block2=Residual(64),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(64, 10),
        )
    )


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -2 to 2 pixels in both directions, zeros moving in."""
    padded = functional.pad(images, (2, 2, 2, 2))
    moves = torch.randint(0, 5, (len(images), 2), generator=generator)
    moved = [p[:, y : y + SIZE, x : x + SIZE] for p, (y, x) in zip(padded, moves.tolist(), strict=True)]
    return torch.stack(moved)


def train(model: nn.Sequential, epochs: int, seed: int) -> None:
    """SGD with Nesterov momentum under a cosine schedule; reports the validation accuracy on stderr."""
    images, labels = (torch.from_numpy(a) for a in digits("train"))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batch = 64
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images), batch):
            index = order[start : start + batch]
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(shifted(images[index], generator)), labels[index])
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}: val {accuracy(model, 'val'):.2%}", file=sys.stderr)


def accuracy(model: nn.Sequential, part: str) -> float:
    images, labels = digits(part)
    model.eval()
    with torch.no_grad():
        found = model(torch.from_numpy(images)).argmax(1).numpy()
    return float(np.mean(found == labels))


def export(model: nn.Sequential, path: Path) -> None:
    """ONNX with a symbolic batch; BatchNorm nodes stay in inference form."""
    model.eval()
    torch.onnx.export(
        model,
        (torch.zeros(2, 1, SIZE, SIZE),),
        str(path),
        dynamo=False,
        opset_version=17,
        # PRESERVE, because the exporter folds BatchNorm into convolutions in EVAL mode
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        input_names=[INPUT],
        output_names=["logits"],
        dynamic_axes={INPUT: {0: "batch"}, "logits": {0: "batch"}},
    )
    onnx.checker.check_model(str(path), full_check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's network and export it to ONNX.")
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "digits.onnx")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    model = network()
    train(model, options.epochs, options.seed)
    export(model, options.out)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.out}: {count:,} parameters, test accuracy {accuracy(model, 'test'):.2%}")


if __name__ == "__main__":
    main()
