"""Processes of their own, as a person or a job would start them."""

import os
import subprocess
import sys
from collections.abc import Mapping

from tests.waiting import PATIENCE_S


def run_python(
    *arguments: str, environment: Mapping[str, str], check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments has ended; `environment` comes on top of this process's."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=check,
    )
