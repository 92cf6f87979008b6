"""A results folder as far as it can be read, and what checks find in it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdbench.errors import UserError, counted
from kdbench.files import METRICS, RECORD, RUN
from kdbench.reading import inside
from kdbench.record import Record, RunFile, metrics, read_record, read_run

Level = Literal["agrees", "remark", "unchecked", "disagrees"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    `where`: the file or cell that it is about. `check`: what could not be checked, of such a finding.
    """

    level: Level
    what: str
    where: str = ""
    check: str = ""


@dataclass(frozen=True)
class Folder:
    """What lies in a results folder, as far as it could be read.

    Attributes:
        records, histories: by folder name, teachers' among them.
        unread: what could not be read.
    """

    path: Path
    run: RunFile
    records: dict[str, Record]
    histories: dict[str, list[dict[str, Any]]]
    unread: list[Finding]

    @property
    def planned(self) -> dict[str, Record]:
        """Records of the comparison's cells: without teachers'."""
        cells = self.run.cells
        named = cells if cells is not None else [name for name in self.records if is_cell(name)]
        return {name: self.records[name] for name in named if name in self.records}


def verdict(findings: Iterable[Finding]) -> str:
    """All findings in one line: whether everything agrees, and what was not checked."""
    findings = list(findings)
    wrong = sum(finding.level == "disagrees" for finding in findings)
    skipped = list(dict.fromkeys(finding.check for finding in findings if finding.level == "unchecked"))
    said = counted(wrong, "disagreement") if wrong else "everything agrees"
    if not skipped:
        return said
    return f"{said if wrong else 'everything checked agrees'}; not checked: {', '.join(skipped)}"


def read_folder(path: Path) -> Folder:
    """What can be read of a results folder, and what cannot."""
    findings: list[Finding] = []
    run = RunFile()
    try:
        run = read_run(path)
    except UserError as error:
        findings.append(Finding("disagrees", error.what, RUN))
    records, histories = {}, {}
    for file in sorted(path.glob(f"*/{RECORD}")):
        name = file.parent.name
        try:
            records[name] = read_record(inside(path, name, RECORD))
            histories[name] = metrics(file.parent) if (file.parent / METRICS).is_file() else []
        except UserError as error:
            findings.append(Finding("disagrees", error.what, name))
    return Folder(path, run, records, histories, findings)


def is_cell(name: str) -> bool:
    """Whether a folder with a record is a cell of the comparison. A published teacher's is called so."""
    return name != "teacher" and not name.startswith("teacher-")
