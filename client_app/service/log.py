"""The log of a site's service: what it says itself, and every line of the programs that it runs."""

from __future__ import annotations

import json
import logging
from logging.handlers import RotatingFileHandler

from client_app.service.folder import ServiceFolder
from fedllm.logs import json_line

LOG_BYTES, LOG_FILES = 10 << 20, 5
OWN = "[service] "
"""What the service's own lines begin with."""


def service_log(folder: ServiceFolder, site: str, *, echo: bool, as_json: bool) -> logging.Logger:
    """Return the logger of a service.

    Args:
        folder: Where the file is.
        site: The site's name.
        echo: Write to standard error too.
        as_json: One object a line.
    """
    logger = logging.Logger(f"site service {folder.kit}")
    file = RotatingFileHandler(folder.log, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
    handlers: tuple[logging.Handler, ...] = (file, logging.StreamHandler()) if echo else (file,)
    for handler in handlers:
        handler.setFormatter(ServiceLines(site) if as_json else logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
    return logger


class ServiceLines(logging.Formatter):
    """Makes one object of every line; a line of the ClientApp's that is one already stays as it is.

    Args:
        site: The site's name.
    """

    def __init__(self, site: str) -> None:
        super().__init__()
        self._site = site

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        message = record.getMessage()
        if _is_object(message):
            return message
        is_own = message.startswith(OWN)
        return json_line(
            message.removeprefix(OWN),
            time=record.created,
            level=record.levelname,
            event="service" if is_own else "output",
            logger="client_app.service" if is_own else "flower",
            about={"node": self._site},
        )


def _is_object(text: str) -> bool:
    if not text.startswith("{"):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
