"""A small image classifier, whose features measure how digits are distributed.

Trained on clean, labelled images and used for evaluation only: pixel distances hardly tell a
blurred digit from a sharp one, features of a classifier do.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed, seeded_initialization

__all__ = ["DigitClassifier"]

_FEATURES = 64


class DigitClassifier(nn.Module):
    """A convolutional classifier of small square images.

    Arguments:
        x_shape: Shape (C, H, W) of an image; H = W >= 8.
        classes: Number of labels.
        scaling: The change from the data's units to about unit size.
    """

    def __init__(self, x_shape: tuple[int, ...], *, classes: int, scaling: Scaling) -> None:
        super().__init__()
        if len(x_shape) != 3 or x_shape[1] != x_shape[2] or x_shape[1] < 8:
            raise ValueError(
                f"DigitClassifier received images of shape {tuple(x_shape)}; give (C, H, H) with "
                "H >= 8"
            )
        self.scaling = scaling
        self.classes = classes
        halvings = int(math.log2(x_shape[1] // 4))
        layers: list[nn.Module] = [nn.Conv2d(x_shape[0], 32, 3, padding=1), nn.SiLU()]
        width = 32
        for _ in range(halvings):
            layers += [nn.Conv2d(width, 64, 3, stride=2, padding=1), nn.SiLU()]
            width = 64
        layers += [nn.Flatten(), nn.LazyLinear(_FEATURES), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(_FEATURES, classes)
        self.trunk(torch.zeros(1, *x_shape))  # Fixes the size of the lazy layer.

    @classmethod
    def fit(
        cls,
        x: Tensor,
        labels: Tensor,
        *,
        scaling: Scaling,
        seed: int,
        epochs: int = 20,
        batch_size: int = 128,
        learning_rate: float = 2e-3,
    ) -> DigitClassifier:
        """Train a classifier on clean images.

        Arguments:
            x: Images of shape (n, C, H, W), in the data's units.
            labels: Integer labels of shape (n,), from 0.
            scaling: The change to network units.
            seed: Seed of the first weights and of the order of the images.
            epochs: Passes through the images.
            batch_size: Images per step.
            learning_rate: First learning rate of Adam; it falls to 0 along half a cosine.

        Returns:
            The classifier, in evaluation mode, without gradients.
        """
        if len(x) != len(labels) or len(x) == 0:
            raise ValueError(
                f"received {len(x)} images and {len(labels)} labels; give one label per image"
            )
        with seeded_initialization(derive_seed(seed, "classifier")):
            model = cls(tuple(x.shape[1:]), classes=int(labels.max()) + 1, scaling=scaling)
        model.to(x.device)
        labels = labels.long()
        generator = torch.Generator().manual_seed(derive_seed(seed, "classifier", "order"))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, weight_decay=1e-2, fused=True
        )
        total = epochs * math.ceil(len(x) / batch_size)
        step = 0
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(x), generator=generator), batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
                rows = rows.to(x.device)
                loss = F.cross_entropy(model(x[rows]), labels[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
        return model.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, of shape (n, classes), of images in the data's units."""
        out: Tensor = self.head(self.trunk(self.scaling.to_network(x)))
        return out

    @torch.inference_mode()
    def features(self, x: Tensor) -> Tensor:
        """Compute the last hidden layer, of shape (n, 64), of images in the data's units."""
        parts = [self.trunk(self.scaling.to_network(part)) for part in torch.split(x, 1024)]
        return torch.cat(parts)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Compute logits, of shape (n, classes), of many images in the data's units."""
        return torch.cat([self(part) for part in torch.split(x, 1024)])

    @torch.inference_mode()
    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Compute the fraction of images that are classified as labelled."""
        guesses = torch.cat([self(part).argmax(1) for part in torch.split(x, 1024)])
        return float((guesses == labels).double().mean())
