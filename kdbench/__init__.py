"""kdbench: run, compare and publish knowledge-distillation experiments.

`kdbench.run` trains what a recipe plans, `kdbench.table` compares records, `kdbench.load_student` loads a trained
network, `kdbench.losses` holds the loss functions. Importing kdbench imports none of torch, pandas or pydantic.
"""

from kdbench.api import load_student, run, table
from kdbench.version import __version__

__all__ = ["__version__", "load_student", "run", "table"]
