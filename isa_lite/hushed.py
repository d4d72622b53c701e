"""Messages of other libraries that ask for nothing where we call them, left out of the log. Ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hushed(message: str) -> Iterator[None]:
    """Inside, the root logger lets nothing through that contains `message`; afterwards it is as it was."""

    def other(record: logging.LogRecord) -> bool:
        return message not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)
