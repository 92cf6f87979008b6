"""Hard distillation, of DeiT.

Touvron, Cord, Douze, Massa, Sablayrolles, Jégou: Training data-efficient image transformers & distillation through
attention. ICML 2021, arXiv 2012.12877.
"""

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, logits_shape


def hard_distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Cross-entropy with the class that the teacher predicts, averaged over the batch (section 4 of the paper).

    $$
    L = -\frac{1}{N} \sum_n \log p^S_{n, c_n}, \qquad c_n = \arg\max_k z^T_{nk}
    $$

    Args:
        student_logits: [N, K]; of a network with a distillation token those of the token's own head.
        teacher_logits: [N, K]. They get no gradient.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes are not the same [N, K].
    """
    logits_shape(student_logits, teacher_logits, "hard_distillation")
    return F.cross_entropy(full(student_logits), teacher_logits.argmax(dim=1))
