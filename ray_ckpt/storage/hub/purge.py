"""Old copies are gone from a repository on the Hub, and their large files with them.

    1  a note in the run's root, .ray_ckpt/hub/<org>/<repository>.json: which files are to go
    2  if that was asked for: the branch and names of ours that stay are left with one commit each
    3  the tags of old steps are removed
    4  of the files in the note those go that nothing in the repository names, by a look made then
    5  the note is removed, but for what somebody still names: a later purge looks at it again

Killed anywhere, it goes on when it is asked again: what is left to do is seen on the Hub, and what
can no longer be seen there is in the note.

The Hub moves no tag. A name that is to lead to a squashed commit gets a branch beside it first,
`ray_ckpt-moving-<name>`, which is squashed; then the tag is made anew and the branch removed. Such
a branch that a dead attempt has left says what the tag is to lead to.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConflictError, ObjectNotFoundError
from ray_ckpt.core.hub_purge import HubCommit, HubPurge, HubWish, Objects, plan_hub_purge
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.hub.client import hub_api, parse_hub
from ray_ckpt.storage.hub.errors import translated
from ray_ckpt.storage.hub.history import read_history
from ray_ckpt.storage.hub.repository import content_of, message_for, message_of
from ray_ckpt.storage.lease import Guard

_MOVING = "ray_ckpt-moving-"
_PLAIN = "history squashed by ray_ckpt"


def plan_purge_on_hub(destination: str, wish: HubWish) -> HubPurge:
    """What would go, and why; changes nothing.

    Raises:
        AuthorizationError, ObjectNotFoundError, TransientError
        IntegrityError: a manifest there is damaged.
    """
    repository, _ = parse_hub(destination)
    with translated(destination):
        return plan_hub_purge(read_history(hub_api(), repository), wish)


def purge_on_hub(
    store: Store, destination: str, wish: HubWish, *, guard: Guard
) -> tuple[HubPurge, Objects]:
    """What went, and the large files that are free now. Twice is harmless.

    `guard` is asked right before every change. No file goes that any branch, tag or pull request
    still names, in its whole history as it is then.

    Raises:
        ConflictError: a reference has moved since it was looked at; look again.
        AuthorizationError, ObjectNotFoundError, TransientError
    """
    repository, branch = parse_hub(destination)
    with translated(destination):
        api = hub_api()
        api.auth_check(repository, write=True)
        work = _Work(api=api, repository=repository, destination=destination, guard=guard)
        work.end_moves()
        planned = plan_hub_purge(read_history(api, repository), wish)
        doomed = {**_noted(store, repository), **planned.old_objects}
        guard()
        _note(store, repository, doomed)
        if planned.squashed_branch:
            work.squash(branch, planned.history.branches[branch], planned.history.commits)
        for tag, oid in planned.squashed_tags.items():
            work.move(tag, oid, planned.history.commits)
        for tag, oid in planned.tags.items():
            work.remove_tag(tag, oid)
        freed, left = work.remove_objects(doomed)
        _note(store, repository, left)
    return planned, freed


def _noted(store: Store, repository: str) -> Objects:
    """What earlier attempts have left to be removed."""
    try:
        return json.loads(store.read(names.hub_key(repository)))
    except ObjectNotFoundError:
        return {}


def _note(store: Store, repository: str, objects: Objects) -> None:
    if objects:
        store.write(names.hub_key(repository), json.dumps(objects).encode())
    else:
        store.delete([names.hub_key(repository)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """The changes, each harmless if it is made twice."""

    api: Any
    repository: str
    destination: str
    guard: Guard

    def squash(self, branch: str, oid: str, commits: Mapping[str, HubCommit]) -> None:
        """The branch has one commit, with the files that it showed."""
        self._expect(branch, oid, self._branches())
        self._squash(branch, _message(commits[oid]))
        before, now = self._contents(oid), self._contents(branch)
        if before != now:  # somebody committed in between: theirs is there, and is no copy of ours
            self._squash(branch, _PLAIN)

    def move(self, tag: str, oid: str, commits: Mapping[str, HubCommit]) -> None:
        """The tag leads to a commit with the same files and nothing behind it."""
        self._expect(tag, oid, self._tags())
        self.guard()
        beside = f"{_MOVING}{tag}"
        self.api.create_branch(self.repository, branch=beside, revision=oid)
        self._squash(beside, _message(commits[oid]))
        self._end_move(tag, self._branches()[beside])

    def end_moves(self) -> None:
        """What a dead attempt has begun to move is where it was to be, or where it was."""
        for beside, oid in self._branches().items():
            if beside.startswith(_MOVING):
                self._end_move(beside.removeprefix(_MOVING), oid)

    def remove_tag(self, tag: str, oid: str) -> None:
        """It is gone; one that leads elsewhere meanwhile stays."""
        if self._tags().get(tag) == oid:
            self.guard()
            self.api.delete_tag(self.repository, tag=tag)

    def remove_objects(self, doomed: Objects) -> tuple[Objects, Objects]:
        """What is gone, since nothing names it, and what has to stay."""
        if not doomed:
            return {}, {}
        needed = read_history(self.api, self.repository).objects()
        going = doomed.keys() - needed
        left = {name: size for name, size in doomed.items() if name in needed}
        listed = [f for f in self.api.list_lfs_files(self.repository) if f.file_oid in going]
        self.guard()
        self.api.permanently_delete_lfs_files(self.repository, listed, rewrite_history=False)
        return {file.file_oid: file.size for file in listed}, left

    def _end_move(self, tag: str, oid: str) -> None:
        is_squashed = len(self.api.list_repo_commits(self.repository, revision=oid)) == 1
        now = self._tags().get(tag)
        if is_squashed and now != oid and (now is None or self._content(now) == self._content(oid)):
            self.guard()
            if now is not None:
                self.api.delete_tag(self.repository, tag=tag)
            self.api.create_tag(self.repository, tag=tag, revision=oid)
        self.guard()
        self.api.delete_branch(self.repository, branch=f"{_MOVING}{tag}")

    def _squash(self, branch: str, message: str) -> None:
        self.guard()
        self.api.super_squash_history(self.repository, branch=branch, commit_message=message)

    def _expect(self, name: str, oid: str, now: Mapping[str, str]) -> None:
        if now.get(name) != oid:
            raise ConflictError(
                f"{name} has moved since it was looked at",
                self.destination,
                "no file was removed; what was not done yet is as it was",
                "run the same command again: it looks anew",
            )

    def _content(self, oid: str) -> str | None:
        commits = self.api.list_repo_commits(self.repository, revision=oid)
        return content_of(message_of(commits[0]))

    def _contents(self, revision: str) -> dict[str, str]:
        tree = self.api.list_repo_tree(self.repository, recursive=True, revision=revision)
        return {entry.path: entry.blob_id for entry in tree if hasattr(entry, "blob_id")}

    def _branches(self) -> dict[str, str]:
        refs = self.api.list_repo_refs(self.repository)
        return {ref.name: ref.target_commit for ref in refs.branches}

    def _tags(self) -> dict[str, str]:
        refs = self.api.list_repo_refs(self.repository)
        return {ref.name: ref.target_commit for ref in refs.tags}


def _message(commit: HubCommit) -> str:
    """By which a copy is found again; nothing is claimed of a commit that is none of ours."""
    if commit.copy is None:
        return _PLAIN
    return "\n\n".join(message_for(commit.copy.step, "", commit.copy.content_id))
