"""Trackers that people already use, told of a run's commits: TensorBoard, MLflow, W&B.

    with tracking(store) as track:
        ...         # the start, an iteration or the prior is committed
        track()     # tells every tracker of `config.trackers` what it does not know yet

What is told is read from the commits, and each tracker says itself what it has: a run that is
resumed tells nothing twice, and a tracker that is added later hears of everything. A step is an EM
iteration (000 is step 0; the start is step -1; the prior stands at the last one). A tracker that
fails costs a warning, never the run; it is told again after the next commit.
"""

from __future__ import annotations

from pipelines.trackers.telling import Told, Tracker, told_of, tracking

__all__ = ["Told", "Tracker", "told_of", "tracking"]
