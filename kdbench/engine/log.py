"""What one cell did so far: kept in its checkpoint, and as metrics.jsonl and TensorBoard events."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdbench.files import EVENTS, METRICS, write_text


@dataclass
class Log:
    """What a member did so far.

    Attributes:
        history: an entry for every evaluation, as in metrics.jsonl.
        images: that it was trained on. seconds: of training. evaluation_seconds: of evaluations.
        rate: the learning rate of the step before.
        route: checkpoints that it kept of its way, as its record lists them.
        best: step, part, accuracy and weights of the best evaluation, where the recipe keeps it.
        compiled: whether networks or losses ran as graphs, replayed: whether steps were replayed, also before a stop.
        ranks: how many processes trained it together, one number after the other; nothing where it was always one.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    rate: float = 0.0
    route: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    compiled: bool = False
    replayed: bool = False
    ranks: list[int] = field(default_factory=list)


class MetricsLog:
    """Appends one line for every evaluation.

    Args:
        history: entries up to the checkpoint that the cell resumes from. The file is rewritten to exactly these, so
            that entries of steps that are trained again do not stand twice.
        tensorboard: also write TensorBoard events.
    """

    def __init__(self, folder: Path, history: list[dict[str, Any]], tensorboard: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.lines = folder / METRICS, [json.dumps(entry) + "\n" for entry in history]
        write_text(self.path, "".join(self.lines))
        self.file = self.path.open("a", encoding="utf-8")
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = history[-1]["step"] + 1 if history else 0
            self.writer = SummaryWriter(str(folder / EVENTS), purge_step=purge)

    def append(self, entry: dict[str, Any]) -> None:
        self.lines.append(json.dumps(entry) + "\n")
        self.file.write(self.lines[-1])
        self.file.flush()
        if (writer := self._events()) is not None:
            for tag, value in scalars(entry):
                writer.add_scalar(tag, value, entry["step"])

    def flush(self) -> None:
        """Have everything on the disk: what a checkpoint has seen is not written again."""
        if (writer := self._events()) is not None:
            writer.flush()

    def close(self) -> None:
        """Leave it whole, also where the file was removed meanwhile."""
        self.file.close()
        write_text(self.path, "".join(self.lines))
        if (writer := self._events()) is not None:
            writer.close()

    def _events(self) -> Any:
        """TensorBoard's writer, None where there is none. It opens its file anew each time, and would fail without a
        folder, which the user may have removed."""
        if self.writer is not None:
            (self.path.parent / EVENTS).mkdir(parents=True, exist_ok=True)
        return self.writer


def scalars(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of an entry as TensorBoard tags: train/loss, train/<term>, test/accuracy, metrics/<name>/<point> …"""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield f"{prefix}{key}", float(value)
