"""SHA256SUMS: the sha256 of every file that a results folder keeps, in the form that `sha256sum -c` reads.

Cross-checks between a record and its metrics cannot see a digit that stands in one place only (a loss in the middle of
training, a commit). These sums do. They guard against accidents and slips, not against somebody who writes them anew.
"""

from collections.abc import Iterable
from pathlib import Path

from kdbench.errors import UserError
from kdbench.files import PUBLISHED, RUN, sha256_of, weight_files, write_text
from kdbench.reading import inside, read_text

NAME = "SHA256SUMS"

# What is kept of a run when it is published: everything but students' weights, events and checkpoints.
_KEPT = (RUN, "table.*", "records.csv", "*.png", "*.html")


def published_files(folder: Path) -> list[Path]:
    """Files of a run's or results folder that are published, by path.

    Its tables and plots, and every record with its metrics and test logits one folder below, with a teacher's weights
    too. UserError for a link that leaves the folder.
    """
    files = {file for pattern in _KEPT for file in folder.glob(pattern)}
    files |= {file for name in PUBLISHED for file in folder.glob(f"*/{name}")}
    files |= {file for teacher in (folder / "teacher", *folder.glob("teacher-*")) for file in weight_files(teacher)}
    return sorted(inside(folder, *file.relative_to(folder).parts) for file in files if file.is_file())


def write(folder: Path) -> Path:
    """Sum up the kept files of a folder."""
    return _write(folder, {file.relative_to(folder).as_posix(): sha256_of(file) for file in published_files(folder)})


def renew(folder: Path, files: Iterable[Path]) -> None:
    """Take the sums of these files anew, and of no others: a table may be written again, a record may not."""
    if (known := read_sums(folder)) is not None:
        _write(folder, known | {file.relative_to(folder).as_posix(): sha256_of(file) for file in files})


def read_sums(folder: Path) -> dict[str, str] | None:
    """Path below the folder -> sha256; None where nothing was summed up.

    Raises:
        UserError: a line that is none of these, or a path that leaves the folder.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    found = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        digest, two_spaces, name = line.partition("  ")
        if len(digest) != 64 or not two_spaces or not name:
            raise UserError("this line is not a sha256 with a path", where=f"{file}:{number}")
        inside(folder, *name.split("/"), where=f"{file}:{number}")
        found[name] = digest
    return found


def changed(folder: Path) -> list[str]:
    """What is not as it was summed up, in words: files that changed, are gone, or came later."""
    if (known := read_sums(folder)) is None:
        return []
    here = {file.relative_to(folder).as_posix() for file in published_files(folder)}
    problems = []
    for name, digest in sorted(known.items()):
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is gone")
        elif sha256_of(file) != digest:
            problems.append(f"{name} has changed")
    return problems + [f"{name} is not among them" for name in sorted(here - known.keys())]


def _write(folder: Path, sums: dict[str, str]) -> Path:
    file = folder / NAME
    write_text(file, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    return file
