"""Semantic calibration of cross-layer distillation (SemCKD).

Chen, Mei, Zhang, Wang, Wang, Feng, Chen: Cross-Layer Distillation with Semantic Calibration. AAAI 2021,
arXiv 2012.03236.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, at_least_one, full, lists_of_maps, positive
from kdbench.losses.features import inner_products, maps_of_one_size
from kdbench.losses.simkd import with_norm


class SemanticCalibration(nn.Module):
    r"""Every layer of the student learns from every layer of the teacher, by a share that is learned for each image.

    $$
    L = \frac{1}{N S} \sum_{n,i,j} \alpha_{nij} \operatorname{mean} \left( P_{ij}(F^S_{ni}) - F^T_{nj} \right)^2, \qquad
    \alpha_{ni\cdot} = \operatorname{softmax}_j \frac{\langle q_{ni}, k_{nj} \rangle}{\tau}
    $$

    q and k are of unit length, a network of two layers from an image's similarities to the batch at a layer: its inner
    products with all images. P is 1×1, 3×3 and 1×1 convolutions without bias, twice as wide as the teacher's map, with
    batch norm and ReLU between them. The larger map of a pair is average-pooled to the smaller.

    Args:
        student_shapes: Maps (C, H, W) of S layers.
        teacher_shapes: Maps of the teacher's layers.
        batch_size: Size of the largest batch, which is the width of q's and k's inputs. A smaller batch is padded with
            zeros.
        soft: τ, above 0.
        factor: By how much q and k are narrower than the batch, at least 1.

    Raises:
        ValueError: The layers are not maps, or an option is out of range.
    """

    def __init__(
        self,
        student_shapes: Sequence[Shape],
        teacher_shapes: Sequence[Shape],
        *,
        batch_size: int,
        soft: float = 1.0,
        factor: int = 4,
    ) -> None:
        super().__init__()
        lists_of_maps(student_shapes, teacher_shapes)
        positive(soft, "soft")
        at_least_one(factor, "factor")
        at_least_one(batch_size, "batch_size")
        self.batch_size, self.soft = batch_size, soft
        width = max(1, batch_size // factor)
        self.queries, self.keys = (
            nn.ModuleList(
                nn.Sequential(nn.Linear(batch_size, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in shapes
            )
            for shapes in (student_shapes, teacher_shapes)
        )
        pairs = ((own[0], taught[0]) for own in student_shapes for taught in teacher_shapes)
        self.projections = nn.ModuleList(_projection(*pair) for pair in pairs)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of maps [N, C, H, W], one of each layer. Scalar, at least 0.

        Raises:
            ValueError: The batch is larger than the batch size.
        """
        n = len(student[0])
        if n > self.batch_size:
            raise ValueError(f"it was made for batches of at most {self.batch_size} images, and this one has {n}")
        teacher = [one.detach() for one in teacher]
        queries, keys = self._embedded(student, self.queries), self._embedded(teacher, self.keys)
        shares = F.softmax(inner_products(queries, keys) / self.soft, dim=2)
        pairs = [(own, taught) for own in student for taught in teacher]
        errors = [self._error(*pair, project) for pair, project in zip(pairs, self.projections, strict=True)]
        return (shares.flatten(1) * torch.stack(errors, dim=1)).sum() / (n * len(student))

    def _embedded(self, features: Sequence[Tensor], embeds: nn.ModuleList) -> Tensor:
        """Unit vectors of an image's similarities at each layer, [N, layers, width]."""
        found = []
        for feature, embed in zip(features, embeds, strict=True):
            rows = full(feature).flatten(1)
            similarities = F.pad(inner_products(rows, rows), (0, self.batch_size - len(rows)))
            found.append(F.normalize(full(embed(similarities)), dim=1))
        return torch.stack(found, dim=1)

    @staticmethod
    def _error(student: Tensor, teacher: Tensor, project: nn.Module) -> Tensor:
        """Mean squared error of each image, [N]."""
        student, teacher = maps_of_one_size(student, teacher, "semantic_calibration")
        return (full(project(student)) - teacher).square().flatten(1).mean(dim=1)


def _projection(student: int, teacher: int) -> nn.Sequential:
    middle = 2 * teacher
    return nn.Sequential(
        *with_norm(nn.Conv2d(student, middle, 1, bias=False)),
        *with_norm(nn.Conv2d(middle, middle, 3, padding=1, bias=False)),
        nn.Conv2d(middle, teacher, 1, bias=False),
    )
