"""Whether a repository on the Hub can be published to: token, rights, branch. Looks only."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from ray_ckpt.core.errors import StorageError
from ray_ckpt.core.findings import Finding, ok, problem, warning
from ray_ckpt.storage.hub.client import hub_api, parse_hub
from ray_ckpt.storage.hub.errors import translated

_SOON_DAYS = 7
_NEW_TOKEN = "make a new one at https://huggingface.co/settings/tokens, then hf auth login"


def look_at_repository(destination: str) -> Iterator[Finding]:
    """What would stop a copy to `hf://org/repo[@branch]`.

    Raises:
        AuthorizationError, ObjectNotFoundError, TransientError
    """
    from huggingface_hub import get_token

    repository, branch = parse_hub(destination)
    if get_token() is None:
        yield problem(
            "no token: nobody is signed in to the Hub on this host",
            destination,
            "hf auth login, or set HF_TOKEN where the manager's tasks run",
        )
        return
    with translated(destination):
        api = hub_api()
        api.auth_check(repository, write=True)
        branches = {found.name for found in api.list_repo_refs(repository).branches}
    if branch not in branches:
        do = f"hf repos branch create {repository} {branch}"
        yield problem(f"there is no branch {branch}", destination, do)
    yield ok("this token may write there", destination)
    yield from _of_expiry(api, destination)


def _of_expiry(api: Any, destination: str) -> Iterator[Finding]:
    """Nothing where the Hub does not say; it answers this question seldom."""
    try:
        with translated(destination):
            auth: Mapping[str, Any] = api.whoami().get("auth") or {}
    except StorageError:
        return
    token: Mapping[str, Any] = auth.get("accessToken") or {}
    told = auth.get("expiresAt") or token.get("expiresAt")
    if not told:
        return
    ends_at = datetime.fromisoformat(str(told).replace("Z", "+00:00"))
    left_days = (ends_at - datetime.now(UTC)).total_seconds() / 86400
    text = f"the token ends on {ends_at:%Y-%m-%d %H:%M} UTC"
    if left_days < _SOON_DAYS:
        yield warning(f"{text}, in {left_days:.1f} days", destination, _NEW_TOKEN)
    else:
        yield ok(text, destination)
