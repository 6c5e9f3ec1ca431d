"""Messages to the user that come once a process."""

import logging
from functools import cache

log = logging.getLogger(__name__)


@cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged it before."""
    log.warning(message)
