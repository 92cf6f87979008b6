"""kdbench: run, compare and publish knowledge-distillation experiments.

`kdbench.run` trains the cells of a recipe, `kdbench.table` compares records, `kdbench.load_student` loads a trained
network, and `kdbench.losses` has the loss functions. Importing kdbench does not import torch, pandas or pydantic.
"""

from kdbench.api import load_student, run, table
from kdbench.version import __version__

__all__ = ["__version__", "load_student", "run", "table"]
