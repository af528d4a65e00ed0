"""Uncertainty maps from sampled probabilities, one sample at a time.

The entropy of the mean probabilities (total uncertainty) is the mean of the samples' entropies plus the mutual
information between label and sample (Depeweg et al., ICML 2018; Kendall and Gal, NeurIPS 2017). All are in nats. For
overlapping regions, which are independent Bernoulli variables given a sample, entropies are summed over the regions.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAPS = ("entropy", "expected_entropy", "mutual_information")


def entropy(probabilities: Tensor, regions: bool = False) -> Tensor:
    """Entropy of every voxel (*D), in nats.

    Args:
        probabilities: (C, *D), which sum to 1 over C, or for regions lie between 0 and 1 each.
        regions: Bernoulli probabilities of overlapping regions.
    """
    result = torch.special.entr(probabilities).sum(0)
    return result + torch.special.entr(1 - probabilities).sum(0) if regions else result


def predictive_entropy(samples: Tensor, regions: bool = False) -> Tensor:
    """Entropy (*D) of the mean of sampled probabilities (S, C, *D): total uncertainty, in nats."""
    return entropy(samples.mean(0), regions)


def expected_entropy(samples: Tensor, regions: bool = False) -> Tensor:
    """Mean (*D) of the entropies of sampled probabilities (S, C, *D): what remains within a sample, in nats."""
    return torch.stack([entropy(sample, regions) for sample in samples]).mean(0)


def mutual_information(samples: Tensor, regions: bool = False) -> Tensor:
    """Predictive less expected entropy (*D) of probabilities (S, C, *D): how much the samples disagree, in nats."""
    return (predictive_entropy(samples, regions) - expected_entropy(samples, regions)).clamp(min=0)


class RunningMaps:
    """The three maps without keeping the samples.

    Args:
        regions: Bernoulli probabilities of overlapping regions.
    """

    def __init__(self, regions: bool = False) -> None:
        self.regions, self.total = regions, 0.0

    def add(self, probabilities: Tensor, weight: float = 1.0) -> None:
        """Count a sample's probabilities (C, *D) in."""
        own = entropy(probabilities, self.regions)
        if self.total == 0:
            self.probabilities, self.entropies = probabilities * weight, own * weight
        else:
            self.probabilities.add_(probabilities, alpha=weight)
            self.entropies.add_(own, alpha=weight)
        self.total += weight

    def maps(self) -> dict[str, Tensor]:
        """The maps (*D) by their names in ``MAPS``."""
        total, expected = entropy(self.probabilities / self.total, self.regions), self.entropies / self.total
        return dict(zip(MAPS, (total, expected, (total - expected).clamp(min=0)), strict=True))
