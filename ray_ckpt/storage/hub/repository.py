"""An export becomes one commit of a repository on the Hugging Face Hub, and a tag per step.

Large files are uploaded first and are invisible; the one commit shows all files at once. Its
message carries the content's id, which is looked for before anything is sent: a commit whose
answer was lost is found, not made again.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action
from ray_ckpt.core.copy_policy import Proof
from ray_ckpt.core.errors import ConflictError, IntegrityError, ObjectExistsError, UsageError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.hub.client import hub_api, parse_hub
from ray_ckpt.storage.hub.download import downloaded_damage
from ray_ckpt.storage.hub.errors import translated
from ray_ckpt.storage.hub.upload import Upload, sent
from ray_ckpt.storage.progress import UNTOLD, Progress

_TRAILER = "Ray-Ckpt-Content: "
_KEPT = frozenset({".gitattributes"})
_LOOKS = 4
"""So often the branch may move under one commit before somebody else gets a turn."""


def publish_to_hub(
    store: Store,
    export: ExportView,
    destination: str,
    *,
    verify: Proof = "sizes",
    progress: Progress = UNTOLD,
) -> tuple[str, int]:
    """Location and bytes sent; the branch holds exactly the export's files, in one commit.

    No file is read before the Hub has said that the content is not there yet and that this token
    may write; each is sent under its SHA-256, which the Hub compares. With `digests` all of them
    are downloaded and compared as well, before the step's tag is set.

    Raises:
        AuthorizationError, ObjectNotFoundError, TransientError, StorageFullError
        IntegrityError: a file differs from the export's manifest, and nothing became visible; or
            what the Hub gives does, and the commit has no tag.
        ObjectExistsError: the step's tag is there and leads elsewhere, or somebody has changed
            files of this copy while it was made; what is there is untouched.
    """
    repository, branch = parse_hub(destination)
    manifest = export.manifest
    tag = names.step_dir(manifest.step)
    location = f"hf://{repository}@{tag}"
    with translated(destination):
        api = hub_api()
        api.auth_check(repository, write=True)
        commit = _find_commit(api, repository, branch, manifest.content_id)
        _refuse_another_tag(api, repository, commit, manifest)
        is_there = commit is not None
        if commit is None:
            upload = Upload(api=api, repository=repository, branch=branch, store=store)
            commit = _commit(upload, export, progress)
        if verify == "digests":
            _expect_equal(api, repository, commit, manifest)
        api.create_tag(repository, tag=tag, revision=commit, exist_ok=True)
        _refuse_another_tag(api, repository, commit, manifest)
    return location, 0 if is_there else manifest.total_bytes


def _refuse_another_tag(api: Any, repository: str, commit: str | None, manifest: Manifest) -> None:
    """Nothing, if the step's tag is free or leads to that commit, or to another of this content.

    Raises:
        ObjectExistsError: somebody has moved it, or another export of the step is there.
    """
    tag = names.step_dir(manifest.step)
    found = next((t for t in api.list_repo_refs(repository).tags if t.name == tag), None)
    if found is None or found.target_commit == commit:
        return
    if not _holds(api, repository, found.target_commit, manifest.content_id):
        raise ObjectExistsError(
            f"the tag {tag} leads to something else, at {found.target_commit[:8]}",
            f"hf://{repository}@{tag}",
            "it is untouched",
            f"look at it; hf repos tag delete {repository} {tag}, then publish again",
        )


def _expect_equal(api: Any, repository: str, commit: str, manifest: Manifest) -> None:
    damage = downloaded_damage(api, repository, commit, manifest)
    if damage:
        raise IntegrityError(
            f"what the Hub gives is not what was sent: {'; '.join(damage)}",
            f"hf://{repository}@{commit[:8]}",
            "no tag was set on it; what it was made from is untouched",
            "look at it there; then publish to another branch, hf://ORG/REPO@BRANCH, or repository",
        )


def create_on_hub(destination: str) -> None:
    """The repository and the branch, or the bucket, are there; a new one is private.

    Twice is harmless.

    For a person who asks by name: nothing that repeats itself may make one that somebody removed.

    Raises:
        UsageError: the destination is not on the Hub.
        AuthorizationError, TransientError
    """
    if destination.startswith(names.BUCKETS):
        with translated(destination):
            bucket = "/".join(destination.removeprefix(names.BUCKETS).split("/")[:2])
            hub_api().create_bucket(bucket, private=True, exist_ok=True)
        return
    if not names.is_repository(destination):
        raise UsageError(
            "only repositories and buckets on the Hub are made beforehand",
            destination,
            "nothing was changed",
            "leave out --create: folders and prefixes come into being with the copy",
        )
    repository, branch = parse_hub(destination)
    with translated(destination):
        api = hub_api()
        api.create_repo(repository, private=True, exist_ok=True)
        if branch not in {found.name for found in api.list_repo_refs(repository).branches}:
            api.create_branch(repository, branch=branch, exist_ok=True)


def promote_on_hub(publish: Action, tag: str, *, content_id: str, guard: Callable[[], None]) -> str:
    """Location; `tag` names the commit of the step's own tag. Twice is harmless.

    The Hub moves no tag: it is deleted and made anew, and for a moment it is not there.

    Raises:
        UsageError: the step's tag is gone or holds something else, or `tag` names a branch.
        AuthorizationError, ObjectNotFoundError, TransientError
    """
    assert publish.destination is not None, "a publish action names where it went"
    repository, _ = parse_hub(publish.destination)
    with translated(publish.destination):
        api = hub_api()
        references = api.list_repo_refs(repository)
        tags = {found.name: found.target_commit for found in references.tags}
        commit = tags.get(names.step_dir(publish.step))
        if tag in {branch.name for branch in references.branches}:
            raise _not_promoted(f"a branch is called {tag}", publish)
        if commit is None or not _holds(api, repository, commit, content_id):
            raise _not_promoted("its tag is gone, or on something else", publish)
        if tags.get(tag) != commit:
            guard()
            if tag in tags:
                api.delete_tag(repository, tag=tag)
            api.create_tag(repository, tag=tag, revision=commit, exist_ok=True)
    return f"hf://{repository}@{tag}"


def content_at_tag(publish: Action) -> str | None:
    """What the commit says of itself that the step's own tag leads to; None without the tag.

    The content of a copy of ours is named there.

    Raises:
        AuthorizationError, ObjectNotFoundError, TransientError
    """
    assert publish.destination is not None, "a publish action names where it went"
    repository, _ = parse_hub(publish.destination)
    with translated(publish.destination):
        api = hub_api()
        tags = {found.name: found.target_commit for found in api.list_repo_refs(repository).tags}
        commit = tags.get(names.step_dir(publish.step))
        if commit is None:
            return None
        return message_of(next(iter(api.list_repo_commits(repository, revision=commit))))


def message_of(commit: Any) -> str:
    """All that a commit, as the Hub lists it, says of itself."""
    return f"{commit.title}\n\n{commit.message}"


def message_for(step: int, name: str, content_id: str) -> tuple[str, str]:
    """Title and text of the commit that holds a copy of this content."""
    return f"{names.step_dir(step)} {name}".rstrip(), f"{_TRAILER}{content_id}"


def content_of(message: str) -> str | None:
    """The content that a commit of ours says it holds."""
    found = re.search(rf"^{_TRAILER}(\S+)$", message, re.MULTILINE)
    return None if found is None else found[1]


def _holds(api: Any, repository: str, commit: str, content_id: str) -> bool:
    newest = next(iter(api.list_repo_commits(repository, revision=commit)))
    return content_of(message_of(newest)) == content_id


def _not_promoted(why: str, publish: Action) -> UsageError:
    return UsageError(
        f"{names.step_dir(publish.step)} is not promoted: {why}",
        str(publish.destination),
        "nothing was changed there",
        f"look at what is there, or publish it again: {publish.title}",
    )


def _find_commit(api: Any, repository: str, branch: str, content_id: str) -> str | None:
    """The commit on the branch that holds this very content."""
    for commit in api.list_repo_commits(repository, revision=branch):
        if content_of(message_of(commit)) == content_id:
            return str(commit.commit_id)
    return None


def _commit(upload: Upload, export: ExportView, progress: Progress) -> str:
    """The new commit. What others commit meanwhile stays: it is made on top of that."""
    from huggingface_hub import CommitOperationDelete

    api, repository, branch = upload.api, upload.repository, upload.branch
    manifest = export.manifest
    head = api.repo_info(repository, revision=branch).sha
    before = _contents(api, repository, head)
    additions = sent(upload, export, progress=progress)
    added = {addition.path_in_repo for addition in additions}
    stale = _stale(before, added)
    title, text = message_for(
        manifest.step, manifest.lineage.recipe.get("name", ""), manifest.content_id
    )
    create = partial(
        api.create_commit,
        repository,
        operations=[*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
        commit_message=title,
        commit_description=text,
        revision=branch,
    )
    for left in reversed(range(_LOOKS)):
        try:
            with translated(f"hf://{repository}@{branch}"):
                return str(create(parent_commit=head).oid)
        except ConflictError:
            if not left:
                raise
        head = api.repo_info(repository, revision=branch).sha
        now = _contents(api, repository, head)
        _refuse_changes(before, now, added | set(stale), f"hf://{repository}@{branch}")
    raise AssertionError("the last one returns or raises")


def _contents(api: Any, repository: str, revision: str) -> dict[str, str]:
    """Path to the name of its content, of every file at a revision."""
    tree = api.list_repo_tree(repository, recursive=True, revision=revision)
    return {entry.path: entry.blob_id for entry in tree if hasattr(entry, "blob_id")}


def _refuse_changes(
    before: Mapping[str, str], now: Mapping[str, str], ours: set[str], where: str
) -> None:
    """Nothing, if no path of ours holds anything else than before.

    Raises:
        ObjectExistsError: names those that somebody else has changed meanwhile.
    """
    changed = sorted(path for path in ours if before.get(path) != now.get(path))
    if changed:
        raise ObjectExistsError(
            f"somebody has changed {len(changed)} files meanwhile: {', '.join(changed[:10])}",
            where,
            "what they committed is untouched; nothing of this copy is visible",
            "look at it, then publish again or to another branch: hf://ORG/REPO@BRANCH",
        )


def _stale(present: Iterable[str], added: set[str]) -> list[str]:
    """Files of the step before that this one does not replace."""
    return sorted(set(present) - added - _KEPT)
