"""A comparison as one HTML page that needs nothing else.

Sortable tables, every number leading to its cells, curves, costs, and where everything comes from. Byte for byte the
same from the same records, in any order.
"""

import re
from collections.abc import Iterable, Sequence

from kdbench.errors import counted
from kdbench.recipe.loading import dump
from kdbench.record import Record
from kdbench.results.by_axis import axis_panels
from kdbench.results.comparison import compare
from kdbench.results.contents import Table
from kdbench.results.costs import cost_panels
from kdbench.results.curves import logs
from kdbench.results.facts import FACTS, grouped
from kdbench.results.layout import layout
from kdbench.results.plots import Panel, accuracy_panels, chart, metric_panels, metrics_of
from kdbench.results.rendering import rendered
from kdbench.results.tuned import trials

# Nothing may be loaded, from anywhere: what the page needs is in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
CURVES = "Test accuracy, mean over the seeds ± one deviation (band)."
METRIC = "At each hook point, mean over the seeds ± one deviation (band)."
COSTS = (
    "Mean accuracy ± one deviation (whisker). Time is one seed's own training, without evaluation; cells that train "
    "side by side share their teacher's passes."
)


def html(table: Table, records: Iterable[Record], charts: bool = True) -> str:
    """The page of a table and the records that it was built from.

    Records whose metrics are not beside them have no curve, and the page says so.

    Args:
        charts: whether to draw them, which takes a second: what is left without is what `without_charts` leaves.

    Raises:
        UserError: damaged metrics.
    """
    comparison = compare(records, table.baseline)
    ours = comparison.records
    log = logs(comparison, required=False)
    lacking = len(ours) - len(log)
    missing = f" No metrics.jsonl beside the record of {lacking} of {counted(len(ours), 'cell')}." if lacking else ""

    def drawn(key: str, panels: Sequence[Panel]) -> list[tuple[str, str]]:
        return [(p.title, chart(comparison, p, f"{key}-{n}") if charts else "") for n, p in enumerate(panels)]

    sections = [("curves", "Learning curves", CURVES + missing, accuracy_panels(comparison, log))]
    if panels := axis_panels(comparison, table.metric):
        said = f"Test error ({table.metric_label}), mean over the seeds ± one deviation (whisker)."
        sections.insert(0, ("axis", f"Test error by {comparison.axes[0].name}", said, panels))
    for n, metric in enumerate(metrics_of(log)):
        if panels := metric_panels(comparison, log, metric):
            sections.append((f"metric-{n}", metric.replace("_", " ").capitalize(), METRIC + missing, panels))
    sections.append(("cost", "Accuracy against time and size", COSTS, cost_panels(table, comparison)))
    cells = [
        (f"cells-{i}-{j}", row.label + (f" · {column.label}" if comparison.axes else ""), list(group.values()))
        for i, row in enumerate(comparison.rows)
        for j, column in enumerate(comparison.columns)
        if (group := comparison.cell(row, column))
    ]
    return rendered(
        "table.html",
        title=table.title or "Comparison",
        policy=POLICY,
        table=table,
        grids=layout(table),
        charts=[(key, name, said, drawn(key, panels)) for key, name, said, panels in sections],
        trials=trials(comparison),
        cells=cells,
        records=ours,
        seeds=sorted({record.cell.seed for record in ours}),
        provenance=_provenance,
        budget=_budget,
        recipe=lambda record: dump({key: value for key, value in record.spec.items() if key != "seed"}),
    )


def without_charts(page: str) -> str:
    """A page's data. Its charts are made of the same records, and look otherwise in another version of matplotlib."""
    return re.sub(r'<svg class="chart".*?</svg>', "", page, flags=re.DOTALL)


def _budget(record: Record) -> str:
    budget = record.budget
    stages = ", ".join(f"{stage.name} {stage.steps:,}" for stage in budget.stages)
    return f"{counted(budget.steps, 'step', ',')}, {counted(budget.epochs, 'epoch', 'g')}" + (
        f" ({stages})" if stages else ""
    )


def _provenance(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What the cells were made with; several values where they differ."""
    told = (
        pair
        for record in records
        for pair in (
            ("Recipe", record.recipe),
            *((name, say(record, None)) for name, say in FACTS.items()),
            ("Platform", f"Python {record.compute.python}, {record.compute.platform}"),
        )
    )
    found = grouped((name, value) for name, value in told if value)
    return [(name, "; ".join(values)) for name, values in found.items()]
