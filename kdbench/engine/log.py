"""metrics.jsonl and TensorBoard events of one cell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdbench.files import write_text

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends one line for every evaluation.

    Args:
        history: entries up to the checkpoint that the cell resumes from. The file is rewritten to exactly these, so
            that entries of steps that are trained again do not stand twice.
        tensorboard: also write TensorBoard events.
    """

    def __init__(self, folder: Path, history: list[dict[str, Any]], tensorboard: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / NAME, "".join(json.dumps(entry) + "\n" for entry in history))
        self.file = (folder / NAME).open("a", encoding="utf-8")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = history[-1]["step"] + 1 if history else 0
            self.writer = SummaryWriter(str(folder / "events"), purge_step=purge)

    def append(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        if self.writer is not None:
            for tag, value in scalars(entry):
                self.writer.add_scalar(tag, value, entry["step"])

    def flush(self) -> None:
        """Have everything on the disk: what a checkpoint has seen is not written again."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def scalars(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of an entry as TensorBoard tags: train/loss, train/<term>, test/accuracy, metrics/<name>/<point> …"""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield f"{prefix}{key}", float(value)
