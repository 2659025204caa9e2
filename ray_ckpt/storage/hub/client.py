"""How huggingface_hub is asked to talk to the Hub: how long it waits.

Its own client waits for ever. It has one client a process, and no other for an `HfApi`, so ours
takes its place when the first `HfApi` is made here, never at import; a client that somebody has
made with time-outs of their own stays, and gets ours only where it has none.

    CONNECT_S 10    a connection, with its certificates, across an ocean
    SILENCE_S 60    not a byte came, or none of ours was taken; counted anew with every byte. The
                    longest silence of a Hub that is well is a commit of many files. Cutting one off
                    does no harm: if it was made, the next attempt finds it

`HF_HUB_DOWNLOAD_TIMEOUT` has its say instead of the 60 seconds. Where the library tries again by
itself it does so five times: a silent Hub is known as one after a minute at the first call, which
is tried once, and after seven in the middle of an upload.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from ray_ckpt.core.errors import UsageError

CONNECT_S = 10.0
SILENCE_S = 60.0


def hub_api() -> Any:
    """A `huggingface_hub.HfApi` whose every request ends."""
    from huggingface_hub import HfApi, get_session, set_client_factory  # heavy, for hf:// only

    client: Any = get_session()
    if limit_request not in client.event_hooks["request"]:
        if any(client.timeout.as_dict().values()):
            _limit(client)
        else:
            set_client_factory(partial(_like, type(client), client.event_hooks))
    return HfApi()


def limit_request(request: Any) -> None:
    """The request waits no longer than this for anything that nobody has set a limit to.

    Calls of the library that say `timeout=None` come here as well.
    """
    silence_s = float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or SILENCE_S)
    ours = {"connect": CONNECT_S, "read": silence_s, "write": silence_s, "pool": silence_s}
    asked: dict[str, float | None] = request.extensions.get("timeout", {})
    set_by_others = {name: seconds for name, seconds in asked.items() if seconds is not None}
    request.extensions = {**request.extensions, "timeout": {**ours, **set_by_others}}


def _limit(client: Any) -> Any:
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [*hooks["request"], limit_request]}
    return client


def _like(kind: Callable[..., Any], hooks: dict[str, list[Any]]) -> Any:
    """A client as the library makes its own."""
    return _limit(kind(event_hooks=hooks, follow_redirects=True, timeout=None))


def parse_hub(destination: str) -> tuple[str, str]:
    """Repository and branch of `hf://org/repo[@branch]`.

    >>> parse_hub("hf://org/repo"), parse_hub("hf://org/repo@best")
    (('org/repo', 'main'), ('org/repo', 'best'))
    """
    repository, _, branch = destination.removeprefix("hf://").partition("@")
    if len([part for part in repository.split("/") if part]) != 2:
        raise UsageError(f"{destination!r} names no repository", do="write hf://org/repo")
    return repository, branch or "main"
