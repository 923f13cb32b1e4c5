"""Prefect's settings, chosen before its import: quiet, offline, and with a complete history.

Whatever the user's environment sets stays as it is.
"""

from __future__ import annotations

import os
import warnings

__all__ = ["apply_defaults"]

_DEFAULTS = {
    # No telemetry: neither the server's, nor the client's.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # Bars and tables say what happens; the flow's own log lines still go to the API, so that the
    # UI shows them.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    # Where the server is lost, every event that does not reach it would be printed in full.
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    # The embedded server stops before its recorder has drained with the default batch sizes, and
    # loses task runs.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
    # A first start migrates a fresh database, which takes a while on a slow disk.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def apply_defaults() -> None:
    """Set the defaults that the environment does not set already.

    Raises:
        AssertionError: If Prefect was imported before, since it reads its settings at import.
    """
    import sys

    assert "prefect" not in sys.modules or "PREFECT_SERVER_ANALYTICS_ENABLED" in os.environ, (
        "apply_defaults() must run before the first import of prefect"
    )
    for key, value in _DEFAULTS.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore", module=r"prefect\..*")
