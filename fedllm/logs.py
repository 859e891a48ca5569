"""Logging, set up once per process: one format for our own loggers, whoever configured the root."""

from __future__ import annotations

import logging
import os
import sys

PACKAGES = ("fedllm", "strategies", "server_app", "client_app")
LEVEL_VARIABLE = "FEDLLM_LOG_LEVEL"


def set_up_logging() -> None:
    """Send our loggers to standard error in one format; safe to call often.

    The level is ``FEDLLM_LOG_LEVEL``, else INFO. Other packages' loggers are left as they are.
    """
    level = os.environ.get(LEVEL_VARIABLE, "INFO").upper()
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(level)
        logger.propagate = False
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(levelname)-7s %(message)s"))
            logger.addHandler(handler)
