"""SimKD: the teacher's classifier, reused.

Chen, Mei, Zhang, Wang, Feng, Chen: Knowledge Distillation with the Reused Teacher Classifier. CVPR 2022,
arXiv 2203.14001.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, same_shape, two_maps
from kdbench.losses.features import maps_of_one_size, pooled


class Projector(nn.Module):
    """From the student's last map to the teacher's, through a bottleneck.

    Convolutions 1×1, 3×3 and 1×1 without bias, each followed by batch norm and ReLU, of C' / factor, C' / factor and C'
    channels. A student's map that is larger than the teacher's is average-pooled to its size first. The projector stays
    part of the student: it answers with the teacher's classifier behind it.

    Args:
        student_shape: (C, H, W).
        teacher_shape: (C', H', W').
        factor: By how much the bottleneck is narrower than the teacher's map.

    Raises:
        ValueError: A feature is no map, or the factor is not between 1 and C'.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, factor: int = 2) -> None:
        super().__init__()
        two_maps(student_shape, teacher_shape)
        inputs, outputs = student_shape[0], teacher_shape[0]
        if not 1 <= factor <= outputs:
            raise ValueError(f"factor must lie between 1 and the teacher's {outputs} channels, not {factor}")
        middle = outputs // factor
        self.size = (min(student_shape[1], teacher_shape[1]), min(student_shape[2], teacher_shape[2]))
        self.layers = nn.Sequential(
            *with_norm(nn.Conv2d(inputs, middle, 1, bias=False)),
            *with_norm(nn.Conv2d(middle, middle, 3, padding=1, bias=False)),
            *with_norm(nn.Conv2d(middle, outputs, 1, bias=False)),
        )

    def forward(self, student: Tensor) -> Tensor:
        """Maps [N, C, H, W] as the teacher's, [N, C', min(H, H'), min(W, W')]."""
        projected: Tensor = self.layers(pooled(student, self.size))
        return projected


def simkd(student: Tensor, teacher: Tensor, relu: bool = False) -> Tensor:
    r"""Mean squared error between the student's projected last map and the teacher's.

    $$
    L = \operatorname{mean} (P(F_S) - F_T)^2
    $$

    The only loss of the method: no labels and no logits. A teacher's map that is larger is average-pooled first.

    Args:
        student: P(F_S), the projector's output, [N, C, H, W].
        teacher: F_T, after the ReLU, [N, C, H', W'].
        relu: Whether the teacher's map comes before its ReLU, which is then applied.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes do not match.
    """
    student, teacher = maps_of_one_size(student, (teacher.relu() if relu else teacher).detach(), "simkd")
    same_shape(student, teacher, "simkd")
    return F.mse_loss(student, teacher)


def reused_head(projector: nn.Module, teacher_classifier: nn.Module) -> nn.Sequential:
    """Replaces the student's own classifier: its last map [N, C, H, W] to logits, by the teacher's classifier.

    Args:
        projector: Trained by `simkd`.
        teacher_classifier: From pooled features [N, C'] to logits.
    """
    return nn.Sequential(projector, nn.AdaptiveAvgPool2d(1), nn.Flatten(), teacher_classifier)


def with_norm(convolution: nn.Conv2d) -> list[nn.Module]:
    """A convolution, batch norm and ReLU."""
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]
