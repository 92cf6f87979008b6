"""Attention-based feature matching, "Show, attend and distill" (its authors call it AFD too).

Ji, Heo, Park: Show, Attend and Distill: Knowledge Distillation via Attention-based Feature Matching. AAAI 2021.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, at_least_one, full, lists_of_maps, shape
from kdbench.losses.features import inner_products


def matched_attention(student: Sequence[Tensor], teacher: Sequence[Tensor], shares: Tensor) -> Tensor:
    r"""Squared distances of the attention maps of all pairs of layers, by a share for each pair and image.

    $$
    L = \frac{1}{N} \sum_{n,j,i} \alpha_{nji} \operatorname{mean}_{hw} \left( \phi_j(S_{ni}) - \phi_j(T_{nj}) \right)^2,
    \qquad \phi_j(A) = \frac{q}{\| q \|_2}, \quad q = \operatorname{pool}_j \frac{1}{C} \sum_c A_c^2
    $$

    i counts the student's layers and j the teacher's. The student's map is averaged over its channels, then pooled to
    the height and width of the teacher's layer j, larger or smaller, so that widths and sizes may differ.

    Args:
        student: Maps [N, C, H, W] of S layers.
        teacher: Maps of T layers.
        shares: α, at least 0, [N, T, S]. A gradient reaches them.

    Returns:
        Scalar, at least 0. Where an image's shares for a layer of the teacher sum to one, it is at most the sum of
        2 / (H W) over the teacher's layers.

    Raises:
        ValueError: The features are not maps of one batch, or the shares have another shape.
    """
    _maps_of_one_batch(student, teacher)
    if shares.shape != (expected := (len(student[0]), len(teacher), len(student))):
        raise ValueError(f"matched_attention needs shares {[*expected]} of images and layers, not {shape(shares)}")
    energies = [full(feature).square().mean(dim=1, keepdim=True) for feature in student]
    total = torch.zeros((), device=shares.device)
    for j, feature in enumerate(teacher):
        taught = full(feature.detach()).square().mean(dim=1, keepdim=True)
        size = (taught.shape[2], taught.shape[3])
        own = torch.cat([F.adaptive_avg_pool2d(energy, size) for energy in energies], dim=1)
        errors = F.normalize(own.flatten(2), dim=2) - F.normalize(taught.flatten(2), dim=2)
        total = total + (full(shares[:, j]) * errors.square().mean(dim=2)).sum() / len(feature)
    return total


def _maps_of_one_batch(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    given = [*student, *teacher]
    if not student or not teacher or {f.ndim for f in given} != {4} or len({*map(len, given)}) > 1 or not len(given[0]):
        raise ValueError(
            "matched_attention needs lists of maps [N, C, H, W] of one batch: "
            f"student {[shape(f) for f in student]}, teacher {[shape(f) for f in teacher]}"
        )


class _Rows(nn.Module):
    """A linear layer and a batch norm of rows [N, D]. A single row, which has no deviation, gets the running ones."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs)

    def forward(self, rows: Tensor) -> Tensor:
        mapped = full(self.linear(rows))
        if len(mapped) > 1:
            normed: Tensor = self.norm(mapped)
            return normed
        norm = self.norm
        return F.batch_norm(mapped, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class AttentionMatching(nn.Module):
    r"""`matched_attention` with learned shares: each layer of the teacher asks which of the student's are like it.

    $$
    \alpha_{nj\cdot} = \operatorname{softmax}_i \frac{\langle q_{nj}, k_{nij} \rangle + \langle p^T_j, p^S_i \rangle}
    {\sqrt{d}}
    $$

    The query q is a linear layer and a batch norm of the teacher's channel means. The student's go through a linear
    layer, batch norm and ReLU of each layer, then through one more linear layer and batch norm for all layers, which
    gives a key k of width d for each layer of the teacher. The vectors p are drawn as Xavier's normal.

    Args:
        student_shapes: Maps (C, H, W) of S layers.
        teacher_shapes: Maps of T layers.
        dim: d, at least 1.
        relu: Whether the maps come before their ReLU, which is then applied to both networks'.

    Raises:
        ValueError: The layers are not maps, or d is out of range.
    """

    def __init__(
        self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], *, dim: int = 128, relu: bool = False
    ) -> None:
        super().__init__()
        lists_of_maps(student_shapes, teacher_shapes)
        at_least_one(dim, "dim")
        self.dim, self.relu = dim, relu
        self.queries = nn.ModuleList(_Rows(one[0], dim) for one in teacher_shapes)
        self.keys = nn.ModuleList(_Rows(one[0], dim) for one in student_shapes)
        self.bilinear = _Rows(dim, dim * len(teacher_shapes))
        self.student_layers, self.teacher_layers = (
            nn.Parameter(nn.init.xavier_normal_(torch.empty(len(shapes), dim)))
            for shapes in (student_shapes, teacher_shapes)
        )

    def shares(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """α of maps [N, C, H, W], one of each layer: of sum one over the student's layers, [N, T, S]."""
        queries = torch.stack([ask(_means(one)) for one, ask in zip(teacher, self.queries, strict=True)], dim=1)
        hidden = torch.stack([key(_means(one)).relu() for one, key in zip(student, self.keys, strict=True)], dim=1)
        keys = self.bilinear(hidden.flatten(0, 1)).view(len(hidden), len(student), len(teacher), self.dim)
        alike = inner_products(queries.unsqueeze(2), keys.transpose(1, 2)).squeeze(2)
        places = inner_products(full(self.teacher_layers), full(self.student_layers))
        return F.softmax((alike + places) / self.dim**0.5, dim=2)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of maps [N, C, H, W], one of each layer; no gradient reaches the teacher's. Scalar, at least 0."""
        _maps_of_one_batch(student, teacher)
        teacher = [one.detach() for one in teacher]
        if self.relu:
            student, teacher = ([one.relu() for one in side] for side in (student, teacher))
        return matched_attention(student, teacher, self.shares(student, teacher))


def _means(feature: Tensor) -> Tensor:
    return full(feature).mean(dim=(2, 3))
