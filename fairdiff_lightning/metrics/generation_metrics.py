"""The comparison of generated with real samples as a torchmetrics class."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fairdiff_lightning.metrics.generation import Distance, distance_function, generation_scores


class GenerationScores(Metric):
    """Minimum matching distance, coverage, 1-NNA and distance to the nearest real sample, of features or clouds.

    ``compute`` returns the scalars of :func:`~fairdiff_lightning.metrics.generation_scores` by name. All samples are
    kept, in float32, and gathered from all processes.

    Args:
        distance: between two samples: of features (``cosine`` as FairDiff, or ``euclidean``) or clouds (``chamfer``).
        reference_behaviour: swap the roles of generated and real in ``mmd`` and ``coverage``, as FairDiff's code does.
        kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    generated: list[Tensor]
    real: list[Tensor]
    sample_shape: Tensor

    def __init__(self, distance: Distance = "cosine", reference_behaviour: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        distance_function(distance)
        self.distance: Distance = distance
        self.reference_behaviour = reference_behaviour
        self.add_state("generated", default=[], dist_reduce_fx="cat")
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("sample_shape", default=torch.zeros(2, dtype=torch.int64), dist_reduce_fx="max")

    def update(self, samples: Tensor, real: bool) -> None:
        """Add samples: features (B, D), or clouds (B, P, 3) for ``chamfer``.

        Args:
            samples: finite floating point values.
            real: whether they are real ones.

        Raises:
            ValueError: the shape is another one, or not that of earlier samples.
        """
        if samples.dim() != (3 if self.distance == "chamfer" else 2):
            expected = "(B, P, 3)" if self.distance == "chamfer" else "(B, D)"
            raise ValueError(
                f"samples have shape {tuple(samples.shape)}, expected {expected} for distance {self.distance!r}."
            )
        shape, known = [1, *samples.shape[1:]][-2:], self.sample_shape.tolist()
        if any(known) and shape != known:
            raise ValueError(f"samples have shape {tuple(samples.shape)}, expected {known} for each as before.")
        self.sample_shape = torch.tensor(shape, device=samples.device)
        (self.real if real else self.generated).append(samples.detach().float().flatten())

    def compute(self) -> dict[str, Tensor]:
        """Return the scores.

        Raises:
            ValueError: there is no generated or no real sample.
        """
        generated, real = (self._samples(state) for state in (self.generated, self.real))
        return generation_scores(generated, real, self.distance, self.reference_behaviour)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states; a process without samples takes part with empty tensors."""
        for state in (self.generated, self.real):
            if len(state) == 0:
                state.append(torch.empty(0, device=self.device))
        super().sync(*args, **kwargs)

    def _samples(self, state: list[Tensor]) -> Tensor:
        points, width = self.sample_shape.tolist()
        flat = dim_zero_cat(state) if len(state) else torch.empty(0, device=self.device)
        samples = flat.view(-1, max(points, 1), max(width, 1))
        return samples if self.distance == "chamfer" else samples.squeeze(1)
