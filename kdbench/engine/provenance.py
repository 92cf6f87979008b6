"""What stands beside the CSV of an analysis: the command, what computed it, and hashes of all that it looked at."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdbench.engine.finish import git_state, machine
from kdbench.files import sha256_of, write_json
from kdbench.methods.deep_inversion.made import MadeImages
from kdbench.version import __version__


class Provenance:
    """Is told what an analysis looks at, and writes it down. It holds neither times nor paths of the machine: the same
    analysis gives the same file.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.data: dict[str, str] = {}
        self.networks: list[dict[str, str]] = []
        self.pools: list[dict[str, Any]] = []

    def network(self, name: str, file: Path) -> None:
        """A network and the file of its weights."""
        self.networks.append({"name": name, "sha256": sha256_of(file)})

    def pool(self, name: str, pool: MadeImages) -> None:
        """A pool of made images. Its sha256 is that of its batches' own in hex, one a line, in their order."""
        digests = [pool.about(batch).sha256 for batch in pool.whole()]
        digest = hashlib.sha256("".join(f"{one}\n" for one in digests).encode()).hexdigest()
        self.pools.append({"name": name, "batches": len(digests), "sha256": digest})

    def write(self, csv: Path) -> Path:
        """Write a JSON file beside a CSV, whose sha256 it holds: it stays that one's under any name."""
        file = csv.with_suffix(".json")
        about = {
            "command": command_line(["kdbench", *sys.argv[1:]], Path.cwd()),
            "kdbench": __version__,
            "git": git_state(),
            "machine": machine(self.device, torch.get_num_threads()),
            "data": [{"name": name, "fingerprint": found} for name, found in self.data.items()],
            "networks": self.networks,
            "pools": self.pools,
            "csv": {"name": csv.name, "sha256": sha256_of(csv)},
        }
        write_json(file, about)
        return file


def command_line(arguments: Sequence[str], folder: Path) -> str:
    """A command as a shell takes it, without the machine's paths: absolute ones relative to the folder in which it ran,
    and of those outside their last part alone, after "…/"."""
    return shlex.join(_without_machine(argument, folder) for argument in arguments)


def _without_machine(argument: str, folder: Path) -> str:
    option, sign, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    if not path.is_absolute():
        return argument
    shown = str(path.relative_to(folder)) if path.is_relative_to(folder) else f"…/{path.name}"
    return f"{option}{sign}{shown}"
