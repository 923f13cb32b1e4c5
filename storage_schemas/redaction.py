"""What may be shown of a URL, or of a message of a cloud library.

URLs are shown, stored, and passed to other processes. Messages of libraries name endpoints, and
sometimes hold what they were given.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["keep_libraries_quiet", "redact_url", "secret_part", "without_secrets"]

_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|CONNECTION_STRING|SAS|KEY(?!_?ID)", re.I)
_URL = re.compile(r"\b[A-Za-z][\w+.-]*://[^\s\"'<>]+")
_SHORTEST = 8  # replacing shorter values (test, 1234) would only mangle messages


def redact_url(url: str) -> str:
    """Return a URL without what may be secret in it: user and password, query and fragment."""
    if "://" not in url:
        return url
    # A secret key may itself hold slashes: after a colon, all up to the last @ is one.
    url = re.sub(r"(?<=://)(?:[^/@]*:.*|[^/@]*)@", "***@", url)
    return re.sub(r"[?#].*$", "?***", url)


def secret_part(url: str) -> str | None:
    """Say what of a URL may be secret, None if it can be shown as it is."""
    if re.search(r"://[^/@]*:.*@", url):
        return "a password"
    if "://" in url and re.search(r"[?#]", url):
        return "a query or fragment, where tokens are"
    return None


def without_secrets(text: str, options: Mapping[str, Any] | None = None) -> str:
    """Return a text without secrets of URLs, of the environment, and of storage options."""
    secrets = {*_secrets_of(os.environ), *_secrets_of(options or {})}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _URL.sub(lambda match: redact_url(match[0]), text)


def keep_libraries_quiet() -> None:
    """Let no cloud library log below WARNING unless its level was set: at DEBUG they log headers.

    These hold session tokens and signatures.
    """
    for name in ("botocore", "aiobotocore", "boto3", "azure", "adlfs", "gcsfs", "s3fs"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)


def _secrets_of(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _secrets_of(value)
        elif isinstance(value, str) and _SECRET_NAME.search(name):
            # A connection string, or a query, holds the secret as one of its parts.
            parts = re.findall(r"(?:AccountKey|SharedAccessSignature|sig)=([^;&]+)", value)
            yield from (part for part in (value, *parts) if len(part) >= _SHORTEST)
