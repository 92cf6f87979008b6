"""What a table holds: what `kdbench.results.tables` makes of records, and what every renderer shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdbench.record import Metric
from kdbench.record_parts import Metrics
from kdbench.results.across import Across
from kdbench.results.comparison import Column
from kdbench.results.copied import CopiedRow

# Numbers of seeds above it are not told apart.
CAP = 1000


@dataclass(frozen=True)
class Note:
    """A sentence below the table. `mark`: letter by which cells refer to it. `warning`: not to be missed."""

    text: str
    mark: str | None = None
    warning: bool = False


@dataclass(frozen=True)
class Measure:
    """A metric that loss cards declare, at its hook points. `share_of`: what its values in [0, 1] are shares of, as the
    card says; None for a metric of any other range."""

    metric: str
    points: tuple[str, ...]
    share_of: str | None

    @property
    def title(self) -> str:
        return self.metric.replace("_", " ")

    def show(self, value: float | None) -> str | None:
        if value is None:
            return None
        return f"{value:.4g}" if self.share_of is None else f"{100 * value:.1f} %"


@dataclass(frozen=True)
class Difference:
    """To the baseline of the same column, over the seeds that both have, in percent points.

    `low`, `high`, `p`, `p_holm` are None with one pair of seeds or without spread. `seeds_needed`: pairs with which the
    seen difference would be found with 80 % power at Holm's first step, 5 % over the number of the table's tests;
    None without a test, `CAP` + 1 for more than that.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    seeds_needed: int | None


@dataclass(frozen=True)
class Entry:
    """The seeds of one method in one column. `values`: accuracy in percent of each seed. `deviation`: None with one
    seed. `best`, `second`: by the mean as it is shown, in this column. `marks`: of the notes that belong to it.
    `metrics`: metric -> hook point -> mean over the seeds. `also`: accuracies beside the one on the test part, mean and
    deviation. `seconds`: mean training time of a seed."""

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    n: int
    mean: float
    deviation: float | None
    best: bool
    second: bool
    difference: Difference | None
    steps: int
    epochs: float
    extra_epochs: float
    metrics: Metrics
    also: Mapping[str, tuple[float, float | None]]
    seconds: float
    images_per_second: float
    marks: tuple[str, ...]


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
    """`axes`: dotted paths that vary across the columns, none where there is one column. `copied`: published numbers,
    never ranked among ours. `across`: None with one column."""

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
