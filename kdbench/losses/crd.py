"""Contrastive representation distillation (CRD).

Tian, Krishnan, Isola: Contrastive Representation Distillation. ICLR 2020, arXiv 1910.10699.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdbench.losses.checks import Shape, at_least_one, full, positive, shape, share
from kdbench.losses.features import inner_products

# Numbers that are drawn at once.
DRAWN = 2**26


def noise_contrastive(log_scores: Tensor, samples: int, eps: float = 1e-7) -> Tensor:
    r"""Noise-contrastive estimation: the first score of each row belongs to a pair, the others to noise.

    $$
    L = -\frac{1}{N} \sum_n \left[ \log \frac{x_{n0}}{x_{n0} + c} + \sum_{k \ge 1} \log \frac{c}{x_{nk} + c} \right],
    \qquad c = \frac{K}{M}
    $$

    ε is added to both denominators.

    Args:
        log_scores: log x, [N, 1 + K].
        samples: M, from which the noise is drawn: the size of the training set.
        eps: ε.

    Returns:
        Scalar, at least 0; not finite in float32 where a log x is above 88.

    Raises:
        ValueError: The scores are not [N, 1 + K] with K at least 1.
    """
    if log_scores.ndim != 2 or len(log_scores) == 0 or log_scores.shape[1] < 2:
        raise ValueError(f"noise_contrastive needs scores [N, 1 + K], not {shape(log_scores)}")
    log_scores = full(log_scores)
    noise = (log_scores.shape[1] - 1) / samples
    log_sums = (log_scores.exp() + (noise + eps)).log()
    pairs, others = log_scores[:, 0] - log_sums[:, 0], math.log(noise) - log_sums[:, 1:]
    return -(pairs.sum() + others.sum()) / len(log_scores)


class ContrastiveRepresentation(nn.Module):
    r"""CRD with two memory banks: each network's embedding is told apart from noise with the other network's bank.

    $$
    x_{nk} = \frac{1}{Z} \exp \frac{\langle e_n, b_{i_{nk}} \rangle}{\tau}
    $$

    e are embeddings of unit length (one fully connected layer for each network, both trained), b the other network's
    embeddings of training images i as the bank remembers them. The loss is the sum of `noise_contrastive` in both
    directions. In train mode the banks then take in the batch (momentum · old + (1 - momentum) · new, of unit length).
    Z is the mean of the first batch's exponentials times the size of the bank, and stays. Banks and both Z are buffers:
    they belong into checkpoints.

    Args:
        student_shape: Of one sample, flattened.
        teacher_shape: Of one sample, flattened.
        samples: Size of the training set, and of each bank, at least 2.
        dim: Width of the embeddings, at least 1.
        temperature: τ, above 0.
        momentum: Share of the old entry that a bank keeps, from 0 to 1.
        eps: ε of `noise_contrastive`.

    Raises:
        ValueError: An option is out of range, or there is one sample only.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_z: Tensor

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        *,
        samples: int,
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        positive(temperature)
        share(momentum, "momentum")
        at_least_one(dim, "dim")
        at_least_one(samples - 1, "samples besides an image's own")
        self.student = nn.Linear(math.prod(student_shape), dim)
        self.teacher = nn.Linear(math.prod(teacher_shape), dim)
        self.temperature, self.momentum, self.eps = temperature, momentum, eps
        bound = math.sqrt(3 / dim)
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(samples, dim).uniform_(-bound, bound))
        # Logarithms of Z, of the student's scores and of the teacher's. Infinite until the first batch.
        self.register_buffer("log_z", torch.full((2,), math.inf))

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, negatives: Tensor) -> Tensor:
        """The loss of one batch; in train mode the banks change.

        Args:
            student: Features, [N, *student_shape].
            teacher: Features, [N, *teacher_shape]. They get no gradient.
            index: Positions of the images in the training set, int64 [N].
            negatives: Positions of K other images for each, int64 [N, K]; `draw_negatives` makes them.

        Returns:
            Scalar.

        Raises:
            ValueError: The indices do not match the batch.
        """
        n = len(student)
        if len(teacher) != n or index.shape != (n,) or negatives.ndim != 2 or len(negatives) != n:
            raise ValueError(
                f"CRD needs an index [N] and negatives [N, K]: student {shape(student)}, teacher {shape(teacher)}, "
                f"index {shape(index)}, negatives {shape(negatives)}"
            )
        # In half precision, exp(1 / τ) = 10⁶ would be out of range.
        with torch.autocast(student.device.type, enabled=False):
            own = F.normalize(self.student(full(student).flatten(1)), dim=1)
            taught = F.normalize(self.teacher(full(teacher.detach()).flatten(1)), dim=1)
        places = torch.cat([index.unsqueeze(1), negatives], dim=1)
        pairs = ((own, self.teacher_bank), (taught, self.student_bank))
        # With all rows of a bank, then those that are asked for: to gather 16,384 rows of 128 numbers for each image
        # first takes 40 times the memory, and ten times as long on a CPU.
        # Of a copy, for a bank changes before the backward pass.
        scores = torch.stack([inner_products(one, bank.clone()).gather(1, places) for one, bank in pairs], dim=1)
        scores = scores / self.temperature
        samples = len(self.student_bank)
        means = scores.detach().movedim(1, 0).flatten(1).logsumexp(dim=1) - math.log(places.numel())
        log_z = torch.where(self.log_z.isinf(), means + math.log(samples), self.log_z)
        log_scores = scores - log_z.view(1, 2, 1)
        if self.training:
            self.log_z.copy_(log_z)
            self._remember(self.student_bank, own, index)
            self._remember(self.teacher_bank, taught, index)
        of_student, of_teacher = (noise_contrastive(one, samples, self.eps) for one in log_scores.unbind(dim=1))
        return of_student + of_teacher

    @torch.no_grad()
    def _remember(self, bank: Tensor, embedding: Tensor, index: Tensor) -> None:
        kept = self.momentum * bank[index] + (1 - self.momentum) * embedding.to(bank)
        bank.index_copy_(0, index, F.normalize(kept, dim=1))


class ContrastiveDistillation(nn.Module):
    r"""CRD with noise that is drawn anew for every batch: training images of other classes, without replacement.

    $$
    L = L_{NCE}(x^S) + L_{NCE}(x^T), \qquad x_{nk} = \frac{1}{Z} \exp \frac{\langle e_n, b_{i_{nk}} \rangle}{\tau}
    $$

    Each network's embeddings e are told from noise by the other network's bank b (`ContrastiveRepresentation`). Draws
    come from torch's default generator, on the device of the features.

    Args:
        student_shape: Of one sample, flattened.
        teacher_shape: Of one sample, flattened.
        training_labels: Of the training set, int64 [M].
        negatives: K, images of noise for each image; as many as there are outside of the largest class, if these are
            fewer.
        dim: Width of the embeddings.
        temperature: Above 0.
        momentum: Share of the old entry that a bank keeps.

    Raises:
        ValueError: There is one class only, or an option is out of range.
    """

    training_labels: Tensor

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        *,
        training_labels: Tensor,
        negatives: int = 16384,
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        samples = len(training_labels)
        self.negatives = min(negatives, samples - int(training_labels.bincount().max()))
        if self.negatives < 1:
            raise ValueError(f"CRD needs images of other classes, and at least one of them: {self.negatives}")
        self.contrast = ContrastiveRepresentation(
            student_shape, teacher_shape, samples=samples, dim=dim, temperature=temperature, momentum=momentum
        )
        self.register_buffer("training_labels", training_labels, persistent=False)

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch; in train mode the banks change.

        Args:
            student: Features, [N, *student_shape].
            teacher: Features, [N, *teacher_shape]. They get no gradient.
            index: Positions of the images in the training set, int64 [N].
            labels: Of the batch, int64 [N].

        Returns:
            Scalar.
        """
        samples = len(self.training_labels)
        # A batch of ImageNet would draw 1.3 GB at once.
        drawn = [
            draw_negatives(
                torch.rand(len(some), samples, device=student.device), self.training_labels, some, self.negatives
            )
            for some in labels.split(max(DRAWN // samples, 1))
        ]
        chosen = torch.cat(drawn)
        loss: Tensor = self.contrast(student, teacher, index, chosen)
        return loss


def draw_negatives(uniform: Tensor, classes: Tensor, labels: Tensor, k: int) -> Tensor:
    """K training images of other classes for each image of a batch, without replacement.

    Those with the K smallest of the given numbers: a function of its arguments, so that draws can be addressed.

    Args:
        uniform: Independent numbers in [0, 1), [N, M].
        classes: Labels of the training set, int64 [M].
        labels: Labels of the batch, int64 [N].
        k: K, at most M less the images of the largest class. More would take images of the own class.

    Returns:
        Positions in the training set, int64 [N, K].

    Raises:
        ValueError: The shapes do not match, or K is not in 1 to M.
    """
    if uniform.shape != (*labels.shape, *classes.shape) or uniform.ndim != 2 or not 1 <= k <= uniform.shape[1]:
        raise ValueError(
            f"draw_negatives needs numbers [N, M] and K in 1 to M: numbers {shape(uniform)}, labels {shape(labels)}, "
            f"classes {shape(classes)}, K = {k}"
        )
    same_class = labels.unsqueeze(1) == classes
    return uniform.masked_fill(same_class, 2.0).topk(k, dim=1, largest=False, sorted=False).indices
