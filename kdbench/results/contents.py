"""What a table holds: what `kdbench.results.tables` makes of records, and what every renderer shows."""

from collections.abc import Mapping
from dataclasses import dataclass

from kdbench.record import Metric, Record
from kdbench.record_parts import Budget, RecordedTuning
from kdbench.results.across import Across
from kdbench.results.comparison import Column
from kdbench.results.copied import CopiedRow
from kdbench.results.statistics import Paired, Summary


@dataclass(frozen=True)
class Note:
    """A sentence below the table. `mark`: letter by which cells refer to it. `warning`: not to be missed."""

    text: str
    mark: str | None = None
    warning: bool = False


@dataclass(frozen=True)
class Measure:
    """A metric that loss cards declare, at its hook points.

    `share_of`: what its values in [0, 1] are shares of, as the card says; None for a metric of any other range.
    """

    metric: str
    points: tuple[str, ...]
    share_of: str | None

    @property
    def title(self) -> str:
        return self.metric.replace("_", " ")

    def show(self, value: float) -> str:
        return f"{value:.4g}" if self.share_of is None else f"{100 * value:.1f} %"


@dataclass(frozen=True)
class Entry:
    """The seeds of one method in one column.

    `values`: accuracy in percent of each seed. `deviation`: None with one seed. `best`, `second`: by the mean as it is
    shown, in this column. `difference`: to the baseline of the column, in percentage points. `marks`: of the notes that
    belong to it. `numbers`: means of those that records name so. `also`: accuracies beside the one on the test part.
    `seconds`: mean training time of a seed.
    """

    records: tuple[Record, ...]
    values: tuple[float, ...]
    n: int
    mean: float
    deviation: float | None
    difference: Paired | None
    numbers: Mapping[str, Summary]
    also: Mapping[str, Summary]
    seconds: float
    images_per_second: float
    marks: tuple[str, ...]
    best: bool = False
    second: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.cell.seed for record in self.records)

    @property
    def budget(self) -> Budget:
        return self.records[0].budget

    @property
    def tuning(self) -> RecordedTuning | None:
        return self.records[0].cell.tuning


@dataclass(frozen=True)
class MethodRow:
    """A method; `cells` in the order of the table's columns, None where nothing is finished."""

    method: str
    label: str
    is_baseline: bool
    cells: tuple[Entry | None, ...]


@dataclass(frozen=True)
class TeacherRow:
    """A teacher's accuracy in percent in each column, None where it does not teach or was not measured."""

    name: str
    accuracies: tuple[float | None, ...]


@dataclass(frozen=True)
class Table:
    """`axes`: dotted paths that vary across the columns, none where there is one column.

    `copied`: published numbers, never ranked among ours. `across`: None with one column.
    """

    title: str
    metric: Metric
    metric_label: str
    baseline: str
    axes: tuple[str, ...]
    columns: tuple[Column, ...]
    teachers: tuple[TeacherRow, ...]
    rows: tuple[MethodRow, ...]
    copied: tuple[CopiedRow, ...]
    across: Across | None
    measures: tuple[Measure, ...]
    also: tuple[str, ...]
    notes: tuple[Note, ...]
