"""Losses as plain functions of tensors, usable in anyone's training loop, in the manner of `torch.nn.functional`.

Every function takes the student's tensor first, then the teacher's (or the labels), and returns a scalar. No gradient
reaches the teacher, but for `kl_divergence`; `mmd` takes two samples of one network. float16 and bfloat16 are computed
in float32; float32 and float64 stay as they are. Shapes that do not fit are a ValueError that names both.
"""

from kdbench.losses.ab import activation_agreement, activation_boundary, centred_mse
from kdbench.losses.at import attention_transfer
from kdbench.losses.bss import angle_similarity, magnitude_similarity, soft_cross_entropy
from kdbench.losses.ce import cross_entropy
from kdbench.losses.fitnets import fitnets
from kdbench.losses.kd import kd
from kdbench.losses.kl import kl_divergence
from kdbench.losses.mmd import mmd

__all__ = [
    "activation_agreement",
    "activation_boundary",
    "angle_similarity",
    "attention_transfer",
    "centred_mse",
    "cross_entropy",
    "fitnets",
    "kd",
    "kl_divergence",
    "magnitude_similarity",
    "mmd",
    "soft_cross_entropy",
]
