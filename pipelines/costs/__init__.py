"""What a run will cost: rates measured here, and what the plan makes of them."""

from __future__ import annotations

from pipelines.costs.advice import advice
from pipelines.costs.flops import network_flops
from pipelines.costs.forecast import Forecast, StageCost, forecast
from pipelines.costs.rates import Affine, NetworkRates, Rates
from pipelines.costs.rehearsal import rehearse

__all__ = [
    "Affine",
    "Forecast",
    "NetworkRates",
    "Rates",
    "StageCost",
    "advice",
    "forecast",
    "network_flops",
    "rehearse",
]
