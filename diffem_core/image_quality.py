"""How alike two images are, and how real a set of them looks, as torchmetrics measures it.

Each function returns a number with its standard error, or the reason why there is none: images
that are too small, too few of them. Images are given in [0, 1].

torchmetrics takes a while to import: it is, when the first of these is called.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from diffem_core.measurement import Measurement
from diffem_core.seeds import seeded_initialization

__all__ = ["Lpips", "inception_score", "kernel_distance", "ms_ssim", "ssim"]

_BATCH = 256
_WINDOW = 11  # pixels of the Gaussian window of SSIM, of standard deviation 1.5
_LEVELS = 5  # of MS-SSIM; each halves the image
_LPIPS_SIDE = 32  # below it, the last layers of the networks have less than a pixel

Network = Literal["alex", "vgg", "squeeze"]


def ssim(x_hat: Tensor, x: Tensor) -> Measurement:
    """Measure the structural similarity of pairs of images.

    Arguments:
        x_hat: Images in [0, 1], shape (n, C, H, W).
        x: The clean images, of the same shape.

    Returns:
        The mean over images of SSIM (Gaussian window of 11 pixels; images are mirrored at their
        edges), at most 1; left out for images of less than 6 pixels.

    References:
        Wang et al. 2004 (Image quality assessment: from error visibility to structural
        similarity), equation 13.
    """
    _pairs(x_hat, x)
    if min(x.shape[-2:]) <= _WINDOW // 2:
        size = " x ".join(map(str, x.shape[-2:]))
        return Measurement.left_out(
            f"SSIM's window needs images of {_WINDOW // 2 + 1} pixels or more, these have {size}"
        )
    from torchmetrics.functional.image import structural_similarity_index_measure

    def measure(a: Tensor, b: Tensor) -> Tensor:
        # Variances are differences of squares: constant images need double precision.
        found = structural_similarity_index_measure(
            a.double(), b.double(), data_range=1.0, reduction="none"
        )
        assert isinstance(found, Tensor)
        return found

    return _mean_over(x_hat, x, measure)


def ms_ssim(x_hat: Tensor, x: Tensor) -> Measurement:
    """Measure the structural similarity of pairs of images at five scales.

    Arguments:
        x_hat: Images in [0, 1], shape (n, C, H, W).
        x: The clean images, of the same shape.

    Returns:
        The mean over images of MS-SSIM, at most 1; left out for images that five halvings make
        smaller than the window (176 pixels and less).

    References:
        Wang, Simoncelli and Bovik 2003 (Multiscale structural similarity), equation 7.
    """
    _pairs(x_hat, x)
    least = _WINDOW * 2 ** (_LEVELS - 1)
    if min(x.shape[-2:]) <= least:
        size = " x ".join(map(str, x.shape[-2:]))
        return Measurement.left_out(
            f"MS-SSIM needs images of more than {least} pixels, these have {size}"
        )
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure as measure_,
    )

    def measure(a: Tensor, b: Tensor) -> Tensor:
        values: Tensor = measure_(
            a.double(), b.double(), data_range=1.0, reduction="none", normalize="relu"
        )
        return values

    return _mean_over(x_hat, x, measure)


class Lpips:
    """Learned perceptual distance of pairs of images.

    Arguments:
        network: The network behind it.
        backbone: Weights of torchvision's network of that name (`alexnet`, `vgg16`,
            `squeezenet1_1`), as its `state_dict` names them. The calibration of its layers comes
            with torchmetrics.
        device: Where it is computed.

    Raises:
        ValueError: The weights are of another network.

    References:
        Zhang et al. 2018 (arXiv 1801.03924), equation 1.
    """

    def __init__(
        self,
        network: Network,
        backbone: Mapping[str, Tensor],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        with _offered(network, backbone), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the wrapped libraries, about each other
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            try:
                self._net = LearnedPerceptualImagePatchSimilarity(net_type=network).net.to(device)
            except (RuntimeError, KeyError) as problem:
                raise ValueError(
                    f"Lpips received weights that are not those of {_BACKBONES[network]} "
                    f"({str(problem).splitlines()[0]}); give torchvision's"
                ) from problem
        self._device = device

    def __call__(self, x_hat: Tensor, x: Tensor) -> Measurement:
        """Measure the distance of pairs of images.

        Arguments:
            x_hat: Images in [0, 1], shape (n, 3, H, W), or of one band.
            x: The clean images, of the same shape.

        Returns:
            The mean over images, not negative; left out for images of less than 32 pixels.
        """
        _pairs(x_hat, x)
        if min(x.shape[-2:]) < _LPIPS_SIDE:
            size = " x ".join(map(str, x.shape[-2:]))
            return Measurement.left_out(
                f"LPIPS needs images of {_LPIPS_SIDE} pixels or more, these have {size}"
            )

        @torch.inference_mode()
        def measure(a: Tensor, b: Tensor) -> Tensor:
            a, b = (_three_bands(part.to(self._device)) for part in (a, b))
            distances: Tensor = self._net(a, b, normalize=True)
            return distances.flatten().cpu()

        return _mean_over(x_hat, x, measure)


def kernel_distance(
    samples: Tensor, real: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int
) -> Measurement:
    """Estimate the squared maximum mean discrepancy of features, polynomial kernel (KID).

    Arguments:
        samples: Features of samples, shape (m, F).
        real: Features of real samples, shape (n, F).
        subsets: How many subsets it is the mean of.
        subset_size: Features of each side in a subset, at most.
        seed: Seed of the subsets.

    Returns:
        The estimate, which is unbiased and may be a little below 0. Its standard error is the
        standard deviation over subsets, as is usual: it tells that of one subset's estimate.

    References:
        Binkowski et al. 2018 (arXiv 1801.01401), section 4.
    """
    size = min(subset_size, len(samples), len(real))
    if size < 2:
        return Measurement.left_out(f"KID needs 2 samples on each side, there are {size}")
    from torchmetrics.image.kid import KernelInceptionDistance

    with _quiet(), seeded_initialization(seed):
        metric = KernelInceptionDistance(
            feature=_Given(samples.shape[1]), subsets=subsets, subset_size=size
        )
        metric.update(real.double().cpu(), real=True)
        metric.update(samples.double().cpu(), real=False)
        mean, deviation = metric.compute()
    return Measurement(value=float(mean), standard_error=float(deviation))


def inception_score(logits: Tensor, *, splits: int = 10, seed: int) -> Measurement:
    """Compute the inception score: how sure a classifier is, and of how many classes.

        IS = exp E KL(p(class | x) || p(class))

    Arguments:
        logits: Logits of samples, shape (n, classes).
        splits: Into how many parts they are dealt; the score is the mean over these.
        seed: Seed of the deal.

    Returns:
        The score, from 1 to the number of classes; its standard error is the standard deviation
        over parts, as is usual. Left out where a part would have less than 2 samples.

    References:
        Salimans et al. 2016 (arXiv 1606.03498), section 4.
    """
    if len(logits) < 2 * splits:
        return Measurement.left_out(
            f"{splits} splits of the inception score need {2 * splits} samples, there are "
            f"{len(logits)}"
        )
    from torchmetrics.image.inception import InceptionScore

    with _quiet(), seeded_initialization(seed):
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=splits)
        metric.update(logits.double().cpu())
        mean, deviation = metric.compute()
    return Measurement(value=float(mean), standard_error=float(deviation) if splits > 1 else None)


# ------------------------------------------------------------------------------------------- parts

_BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


class _Given(nn.Module):
    """Takes for features what it is given: they are computed already."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features


@contextlib.contextmanager
def _offered(network: Network, backbone: Mapping[str, Tensor]) -> Iterator[None]:
    """Have torchvision find weights where it keeps downloaded ones, so that it asks nobody."""
    import torchvision.models

    weights = torchvision.models.get_model_weights(_BACKBONES[network]).DEFAULT
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory(prefix="diffem-") as folder:
        (Path(folder) / "checkpoints").mkdir()
        torch.save(dict(backbone), Path(folder) / "checkpoints" / Path(weights.url).name)
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics tells each time that it keeps features
        yield


def _mean_over(x_hat: Tensor, x: Tensor, measure: object) -> Measurement:
    assert callable(measure)
    parts = [
        measure(a, b).double().cpu()
        for a, b in zip(torch.split(x_hat, _BATCH), torch.split(x, _BATCH), strict=True)
    ]
    values = torch.cat([part.reshape(-1) for part in parts])
    if not bool(values.isfinite().all()):
        count = int((~values.isfinite()).sum())
        return Measurement.left_out(f"it is not finite for {count} of {len(values)} images")
    if len(values) < 2:
        return Measurement(value=float(values.mean()))
    error = float(values.std()) / math.sqrt(len(values))
    return Measurement(value=float(values.mean()), standard_error=error)


def _three_bands(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def _pairs(x_hat: Tensor, x: Tensor) -> None:
    if x_hat.shape != x.shape or x.ndim != 4 or len(x) == 0:
        raise ValueError(
            f"received images of shapes {tuple(x_hat.shape)} and {tuple(x.shape)}; give pairs, "
            "shape (n, C, H, W)"
        )
