"""Softmax regression representation learning (SRRL).

Yang, Martinez, Bulat, Tzimiropoulos: Knowledge Distillation via Softmax Regression Representation Learning. ICLR 2021.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, full


class SoftmaxRegression(nn.Module):
    r"""The student's feature, brought to the teacher's width, as feature and through the teacher's classifier.

    $$
    L = \operatorname{mean} (a - f_T)^2 + \beta \operatorname{mean} (W_T a + b_T - z_T)^2, \qquad
    a = \operatorname{pool} \operatorname{ReLU} \operatorname{BN} (V F_S)
    $$

    V is a 1×1 convolution without bias. For a pooled feature, (D,), it has torch's default initialization, for a map
    N(0, 2 / C'), as in the code of each form. The teacher's classifier is not trained.

    Args:
        student_shape: (C, H, W), or (D,).
        teacher_shape: (C',), the pooled feature that its classifier reads.
        beta: β, weight of the classifier's part.

    Raises:
        ValueError: The student's feature is neither a map nor a vector, or the teacher's is no vector.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, *, beta: float = 1.0) -> None:
        super().__init__()
        if len(student_shape) not in (1, 3) or len(teacher_shape) != 1:
            raise ValueError(
                f"it takes a map or a vector of the student and a vector of the teacher, not {student_shape} and "
                f"{teacher_shape}"
            )
        convolution = nn.Conv2d(student_shape[0], teacher_shape[0], 1, bias=False)
        if len(student_shape) == 3:
            nn.init.normal_(convolution.weight, std=math.sqrt(2 / teacher_shape[0]))
        self.connector = nn.Sequential(convolution, nn.BatchNorm2d(teacher_shape[0]), nn.ReLU())
        self.beta = beta

    def forward(self, student: Tensor, teacher: Tensor, teacher_classifier: nn.Module) -> Tensor:
        """The loss of features [N, *student_shape] and [N, C']; no gradient reaches the latter.

        Args:
            student: V F_S is made of it.
            teacher: f_T.
            teacher_classifier: From [N, C'] to logits, in float32.

        Returns:
            Scalar, at least 0.
        """
        student, teacher = full(student), full(teacher.detach())
        adapted = self.connector(student if student.ndim == 4 else student[:, :, None, None]).mean(dim=(2, 3))
        logits = F.mse_loss(full(teacher_classifier(adapted)), full(teacher_classifier(teacher)).detach())
        return F.mse_loss(full(adapted), teacher) + self.beta * logits
