"""A run as one HTML page that opens anywhere: numbers, pictures, a verdict in words."""

from __future__ import annotations

from pipelines.report.page import render_report
from pipelines.report.reading import Report, Step, read_report

__all__ = ["Report", "Step", "read_report", "render_report"]
