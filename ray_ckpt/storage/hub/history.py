"""Everything that can be reached in a repository on the Hub, read once; looks only."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray_ckpt.core import names
from ray_ckpt.core.errors import UnknownSchemaError
from ray_ckpt.core.hub_purge import HubCommit, HubCopy, HubHistory
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.hub.repository import content_of, message_of


def read_history(api: Any, repository: str) -> HubHistory:
    """Every branch, tag and pull request with all commits behind it and their large files."""
    found = api.list_repo_refs(repository, include_pull_requests=True)
    branches, tags = _heads(found.branches), _heads(found.tags)
    others = {**_heads(found.converts), **_heads(found.pull_requests or [])}
    lines: dict[str, tuple[str, ...]] = {}
    messages: dict[str, str] = {}
    for head in {*branches.values(), *tags.values(), *others.values()}:
        commits = api.list_repo_commits(repository, revision=head)
        lines[head] = tuple(commit.commit_id for commit in commits)
        messages |= {commit.commit_id: message_of(commit) for commit in commits}
    return HubHistory(
        branches=branches,
        tags=tags,
        others=others,
        lines=lines,
        commits={oid: _commit(api, repository, oid, text) for oid, text in messages.items()},
    )


def _heads(references: Iterable[Any]) -> dict[str, str]:
    return {reference.name: reference.target_commit for reference in references}


def _commit(api: Any, repository: str, oid: str, message: str) -> HubCommit:
    tree = list(api.list_repo_tree(repository, recursive=True, revision=oid))
    large = (entry.lfs for entry in tree if getattr(entry, "lfs", None))
    content_id = content_of(message)
    is_copy = content_id is not None and any(entry.path == names.MANIFEST for entry in tree)
    return HubCommit(
        message=message,
        objects={entry.sha256: entry.size for entry in large},
        copy=_copy(api, repository, oid, content_id) if is_copy else None,
    )


def _copy(api: Any, repository: str, oid: str, content_id: str | None) -> HubCopy | None:
    """What the manifest in the commit says; None if it is none of ours, or of another content."""
    path = Path(api.hf_hub_download(repository, names.MANIFEST, revision=oid))
    try:
        manifest = Manifest.from_json(path.read_bytes(), f"hf://{repository}@{oid}")
    except UnknownSchemaError:
        return None
    if content_id is None or manifest.content_id != content_id:
        return None
    return HubCopy(
        run_id=manifest.lineage.run_id,
        step=manifest.step,
        content_id=content_id,
        num_files=len(manifest.files),
        size_bytes=manifest.total_bytes,
    )
