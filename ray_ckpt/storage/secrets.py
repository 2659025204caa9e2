"""Keys and tokens that must not be seen: not in a message, a record, a log or on the dashboard.

What clients say may hold them: a signed address, a header, the value of a variable.
"""

import os
import re

HIDDEN = "<hidden>"
_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)
_SHORTEST = 8
"""What is shorter is no secret, and might be a part of any word."""
_PATTERNS = (
    re.compile(r"()\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"(?i)\b(bearer\s+|authorization\W+basic\s+)[A-Za-z0-9+/._~=-]{8,}"),
    re.compile(r"(?i)((?:X-Amz-|X-Xet-)?(?:Signature|Security-Token|Credential)=)[^&\s'\",]+"),
    re.compile(r"(?i)((?:secret_access_key|session_token)['\"]?\s*[:=]\s*['\"]?)[^\s'\",}]+"),
    re.compile(r"(https?://)[^/\s:@]+:[^/\s@]+(?=@)"),
)


def without_secrets(text: str) -> str:
    """The same text with `<hidden>` for what must not be seen."""
    for value in filter(None, map(os.environ.get, _VARIABLES)):
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text
