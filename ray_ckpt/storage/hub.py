"""An export becomes one commit of a repository on the Hugging Face Hub, and a tag per step.

Large files are uploaded first and are invisible; the one commit shows all files at once. Its
message carries the content's id, which is looked for before anything is sent: a commit whose
answer was lost is found, not made again.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action
from ray_ckpt.core.errors import (
    AuthorizationError,
    ConflictError,
    ObjectNotFoundError,
    RayCkptError,
    StorageError,
    StorageFullError,
    ThrottledError,
    TransientError,
    UsageError,
)
from ray_ckpt.core.manifest import Manifest

_TRAILER = "Ray-Ckpt-Content: "
_KEPT = frozenset({".gitattributes"})
_BY_STATUS: dict[int, type[StorageError]] = {
    401: AuthorizationError,
    403: AuthorizationError,
    404: ObjectNotFoundError,
    412: ConflictError,  # the branch moved meanwhile: look again
    413: StorageFullError,
    507: StorageFullError,
    429: ThrottledError,
    **dict.fromkeys((408, 500, 502, 503, 504), TransientError),
}
_CURES: dict[type[StorageError], str] = {
    AuthorizationError: "hf auth login (with a token that may write), then the same command again",
    ObjectNotFoundError: "hf repos create ORG/REPO --private, then the same command again",
    TransientError: "run the same command again; what was sent already is not sent twice",
    StorageFullError: "free space on the Hub, then the same command again",
}


def publish_to_hub(
    fill: Callable[[], Path], manifest: Manifest, destination: str
) -> tuple[str, int]:
    """Location and bytes sent; the branch holds exactly the files of a folder, in one commit.

    `fill` gives the folder; it is called once the Hub has said that the content is not there yet
    and that this token may write.

    Raises:
        AuthorizationError, ObjectNotFoundError, TransientError, StorageFullError
    """
    repository, branch = parse_hub(destination)
    tag = names.step_dir(manifest.step)
    location = f"hf://{repository}@{tag}"
    with translated(destination):
        from huggingface_hub import HfApi  # heavy, and needed for hf:// only

        api = HfApi()
        api.auth_check(repository, write=True)
        commit = _find_commit(api, repository, branch, manifest.content_id)
        if commit is not None:
            api.create_tag(repository, tag=tag, revision=commit, exist_ok=True)
            return location, 0
        commit = _commit(api, repository, branch, folder=fill(), manifest=manifest)
        api.create_tag(repository, tag=tag, revision=commit, exist_ok=True)
    return location, manifest.total_bytes


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
        from huggingface_hub import HfApi  # heavy, and needed for hf:// only

        api = HfApi()
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


def _holds(api: Any, repository: str, commit: str, content_id: str) -> bool:
    newest = next(iter(api.list_repo_commits(repository, revision=commit)))
    return f"{_TRAILER}{content_id}" in newest.message


def _not_promoted(why: str, publish: Action) -> UsageError:
    return UsageError(
        f"{names.step_dir(publish.step)} is not promoted: {why}",
        str(publish.destination),
        "nothing was changed there",
        f"look at what is there, or publish it again: {publish.title}",
    )


def parse_hub(destination: str) -> tuple[str, str]:
    """Repository and branch of `hf://org/repo[@branch]`.

    >>> parse_hub("hf://org/repo"), parse_hub("hf://org/repo@best")
    (('org/repo', 'main'), ('org/repo', 'best'))
    """
    repository, _, branch = destination.removeprefix("hf://").partition("@")
    if len([part for part in repository.split("/") if part]) != 2:
        raise UsageError(f"{destination!r} names no repository", do="write hf://org/repo")
    return repository, branch or "main"


def _find_commit(api: Any, repository: str, branch: str, content_id: str) -> str | None:
    """The commit on the branch that holds this very content."""
    for commit in api.list_repo_commits(repository, revision=branch):
        if f"{_TRAILER}{content_id}" in commit.message:
            return str(commit.commit_id)
    return None


def _commit(api: Any, repository: str, branch: str, *, folder: Path, manifest: Manifest) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = api.repo_info(repository, revision=branch).sha
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    added = {path.relative_to(folder).as_posix(): path for path in files}
    additions = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
        for name, path in added.items()
    ]
    stale = _stale(api.list_repo_files(repository, revision=head), added)
    api.preupload_lfs_files(repository, additions=additions, revision=branch)
    info = api.create_commit(
        repository,
        operations=[*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
        commit_message=f"{names.step_dir(manifest.step)} {manifest.lineage.recipe.get('name', '')}",
        commit_description=f"{_TRAILER}{manifest.content_id}",
        revision=branch,
        parent_commit=head,
    )
    return str(info.oid)


def _stale(present: Iterable[str], added: dict[str, Path]) -> list[str]:
    """Files of the step before that this one does not replace."""
    return sorted(set(present) - set(added) - _KEPT)


@contextmanager
def translated(destination: str) -> Generator[None]:
    """Turns what the Hub's client raises into ours, once."""
    try:
        yield
    except RayCkptError:
        raise
    except Exception as error:
        kind, text = _kind(error)
        if kind is None:
            raise
        safe = "nothing became visible there; the export is untouched"
        cure = next((cure for known, cure in _CURES.items() if issubclass(kind, known)), "")
        if kind is ThrottledError:
            raise ThrottledError(text, destination, safe, cure, _retry_after_s(error)) from error
        raise kind(text, destination, safe, cure) from error


def _retry_after_s(error: BaseException) -> float | None:
    """What the Hub's `Retry-After` says, where it gives seconds."""
    answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    text = answer.headers.get("Retry-After", "") if answer is not None else ""
    return float(text) if text.isdecimal() else None


def _kind(error: BaseException) -> tuple[type[StorageError] | None, str]:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return _BY_STATUS.get(status, StorageError), f"the Hub answered {status}: {error}"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _kind(error.__cause__)  # an upload that failed for good wraps its reason
    if isinstance(error, ConnectionError) or type(error).__module__.startswith(
        ("httpx", "httpcore")
    ):
        return TransientError, f"the Hub cannot be reached: {error}"
    return None, str(error)
