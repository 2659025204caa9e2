"""What a server says about when it wants to be asked again."""

import re
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

_RESET = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds from now, by `Retry-After` in either of its forms or the Hub's `ratelimit`.

    >>> retry_after_s({"Retry-After": "120"}), retry_after_s({"ratelimit": '"api";r=0;t=55'})
    (120.0, 55.0)
    """
    named = {name.lower(): value.strip() for name, value in headers.items()}
    text = named.get("retry-after", "")
    if text.isdecimal():
        return float(text)
    if text:
        return _until(text)
    reset = _RESET.search(named.get("ratelimit", ""))
    return float(reset[1]) if reset else None


def _until(date: str) -> float | None:
    """Seconds until an HTTP date; None for a text that is none."""
    try:
        moment = parsedate_to_datetime(date)
    except ValueError:
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, aware.timestamp() - time.time())
