"""Can a classifier tell re-corrupted reconstructions from real observations?

A classifier is trained on one half of both sets and scores the other half, and the other way
round. The area under its ROC curve,

    AUC = P(score of a re-corrupted one > score of a real one),

is 1/2 where there is nothing to learn and 1 where it is always right. Unlike a distance it needs
no choice of what to compare: whatever helps the classifier counts.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from diffem_core.measurement import Measurement
from diffem_core.two_sample import all_the_same, too_few

__all__ = ["ClassifierKind", "area_under_curve", "classifier_test"]

ClassifierKind = Literal["logistic", "mlp"]

_LEAST = 40
_FOLDS = 2


def classifier_test(
    real: Tensor,
    made: Tensor,
    *,
    model: ClassifierKind = "logistic",
    components: int = 32,
    seed: int,
) -> Measurement:
    """Train a classifier to tell two sets of vectors apart, and judge it on the rest.

    It works on principal components of unit variance, fitted like itself to the training half:
    `logistic` on them and their squares, so that it sees means and variances; `mlp` (one hidden
    layer of 64) on any combination of them.

    Arguments:
        real: Vectors of shape (n, D), n >= 40.
        made: Vectors of shape (m, D), m >= 40.
        model: The classifier.
        components: Principal components, at most.
        seed: Seed of the halves and of the first weights.

    Returns:
        The mean AUC of the two halves. The standard error is the mean of theirs, which is an upper
        bound, since the halves are not independent (each trained the other's classifier). The
        p-value is one-sided: twice the smaller of the halves' Mann-Whitney p-values, which holds
        its level whatever their dependence. Left out where there are too few vectors, or all are
        the same.

    References:
        Lopez-Paz and Oquab 2017 (arXiv 1610.06545); DeLong et al. 1988 for the standard error.
    """
    reason = too_few(real, made, least=_LEAST) or all_the_same(real, made)
    if reason is not None:
        return Measurement.left_out(reason)
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([real, made]).double().cpu().numpy()
    is_made = np.arange(len(x)) >= len(real)
    # Each set is dealt by itself, so that both halves hold as many of it.
    fold = np.concatenate(
        [torch.randperm(len(rows), generator=generator).numpy() % _FOLDS for rows in (real, made)]
    )
    areas, errors, p_values = [], [], []
    for k in range(_FOLDS):
        trained, judged = fold != k, fold == k
        if not np.ptp(x[trained], axis=0).any():
            return Measurement.left_out("every observation of one half is the same")
        scores = _scores(
            x[trained], is_made[trained], x[judged], model=model, components=components, seed=seed
        )
        theirs, ours = scores[is_made[judged]], scores[~is_made[judged]]
        area, error = area_under_curve(theirs, ours)
        areas.append(area)
        errors.append(error)
        p_values.append(
            float(stats.mannwhitneyu(theirs, ours, alternative="greater", method="asymptotic")[1])
        )
    value, error = float(np.mean(areas)), float(np.mean(errors))
    return Measurement(
        value=value,
        standard_error=error,
        interval=(max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)),
        p_value=max(min(1.0, _FOLDS * min(p_values)), 1e-300),
    )


def area_under_curve(
    positive: NDArray[np.float64], negative: NDArray[np.float64]
) -> tuple[float, float]:
    """Compute P(positive > negative) + P(equal) / 2, and its standard error.

    Arguments:
        positive: Scores of shape (n,), n >= 2.
        negative: Scores of shape (m,), m >= 2.

    Returns:
        The area under the ROC curve, and DeLong's standard error.
    """
    n, m = len(positive), len(negative)
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    # What a score alone says: the share of the other set below (above) it.
    below = (ranks[:n] - stats.rankdata(positive)) / m
    above = 1 - (ranks[n:] - stats.rankdata(negative)) / n
    variance = below.var(ddof=1) / n + above.var(ddof=1) / m
    return float(below.mean()), math.sqrt(float(variance))


def _scores(
    x: NDArray[np.float64],
    labels: NDArray[np.bool_],
    judged: NDArray[np.float64],
    *,
    model: ClassifierKind,
    components: int,
    seed: int,
) -> NDArray[np.float64]:
    # Half a second, for those who ask for it.
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    state = seed % 2**32
    steps: list[Any] = [
        PCA(min(components, x.shape[1], len(x) - 1), random_state=state),
        StandardScaler(),
    ]
    if model == "logistic":
        steps += [FunctionTransformer(_with_squares), StandardScaler()]
        steps.append(LogisticRegression(C=0.1, max_iter=200))
    else:
        steps.append(MLPClassifier((64,), alpha=1.0, max_iter=40, random_state=state))
    pipeline = make_pipeline(*steps)
    with warnings.catch_warnings():
        # Training that stops early gives a weaker classifier, and a test as valid.
        warnings.simplefilter("ignore", ConvergenceWarning)
        pipeline.fit(x, labels)
    if model == "logistic":
        scores: NDArray[np.float64] = pipeline.decision_function(judged)
        return scores
    probabilities: NDArray[np.float64] = pipeline.predict_proba(judged)
    return probabilities[:, 1]


def _with_squares(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.hstack([z, z**2])
