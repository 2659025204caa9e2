"""Which copies on the Hub may go, and what of their content nothing names any more. Pure.

    main      5 ── 6 ── 7 ── 8        a commit a step, each on top of the one before
    tags      step-5 ... step-8, latest

A commit stays as long as a branch or a tag is above it. So removing the tag step-5 frees nothing by
itself: main and step-8 still have it in their history. Squashing makes a reference's newest commit
its only one; it is done to the branch and to names of ours alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ray_ckpt.core import names
from ray_ckpt.core.retention import Candidate, Policy, Verdict

Objects = Mapping[str, int]
"""SHA-256 of large files to their sizes."""


def branch_title(name: str) -> str:
    """A branch and a tag may have one name."""
    return f"branch {name}"


def tag_title(name: str) -> str:
    """See `branch_title`."""
    return f"tag {name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCopy:
    """What a commit says of itself that a run of ours has made."""

    run_id: str
    step: int
    content_id: str
    num_files: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCommit:
    """One commit, with the large files of its whole tree."""

    message: str
    objects: Objects
    copy: HubCopy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HubHistory:
    """Everything that can be reached in a repository."""

    branches: Mapping[str, str]
    """Name to the commit it leads to."""
    tags: Mapping[str, str]
    others: Mapping[str, str]
    """Pull requests, and what the Hub has converted."""
    lines: Mapping[str, tuple[str, ...]]
    """Every commit that something leads to, and all before it, newest first."""
    commits: Mapping[str, HubCommit]

    def references(self) -> dict[str, str]:
        """`branch main`, `tag step-5`, `refs/pr/1`: every name with the commit it leads to."""
        return {
            **{branch_title(name): oid for name, oid in self.branches.items()},
            **{tag_title(name): oid for name, oid in self.tags.items()},
            **self.others,
        }

    def objects(self) -> set[str]:
        """Every large file that anything names, however long ago."""
        return {name for commit in self.commits.values() for name in commit.objects}


@dataclass(frozen=True, slots=True, kw_only=True)
class HubWish:
    """What is to stay, and what may be done."""

    run_id: str
    branch: str
    policies: Sequence[Policy]
    held: Mapping[int, str]
    """Step to a reason why it stays: pinned, or asked for."""
    pointers: frozenset[str]
    """Tags that the run's own policy moves: `latest`."""
    squash: bool
    """Whether the history may be rewritten; else only what nothing has above it becomes free."""


@dataclass(frozen=True, kw_only=True)  # no slots: what becomes free is worked out once
class HubPurge:
    """What goes, what stays and why."""

    wish: HubWish
    history: HubHistory
    verdicts: tuple[Verdict, ...]
    """One a copy, oldest first."""

    def copy(self, step: int) -> HubCopy:
        """The copy that the step's tag leads to."""
        found = self.history.commits[self.history.tags[names.step_dir(step)]].copy
        assert found is not None, "a verdict is about a copy"
        return found

    @cached_property
    def tags(self) -> dict[str, str]:
        """Those that go, and where they lead."""
        going = [names.step_dir(verdict.step) for verdict in self.verdicts if not verdict.keep]
        return {tag: self.history.tags[tag] for tag in going}

    @cached_property
    def squashed_branch(self) -> bool:
        """Whether the branch has anything behind it that goes."""
        head = self.history.branches.get(self.wish.branch)
        return self.wish.squash and head is not None and self._has_old(head)

    @cached_property
    def squashed_tags(self) -> dict[str, str]:
        """Names of ours that stay, lead to a copy and have something behind it that goes."""
        ours = {names.step_dir(v.step) for v in self.verdicts if v.keep} | self.wish.pointers
        return {
            tag: head
            for tag, head in self.history.tags.items()
            if self.wish.squash
            and tag in ours
            and self.history.commits[head].copy is not None
            and self._has_old(head)
        }

    @cached_property
    def freed(self) -> Objects:
        """Large files of copies that go, and that nothing names afterwards."""
        kept = {name for objects in self._remaining().values() for name in objects}
        return {name: size for name, size in self.old_objects.items() if name not in kept}

    def holding(self) -> dict[str, int]:
        """Reference to the bytes that are on the Hub for nothing but its history."""
        kept = {
            reference: sum(size for name, size in self.old_objects.items() if name in objects)
            for reference, objects in self._remaining().items()
        }
        return {reference: size for reference, size in kept.items() if size}

    @cached_property
    def _old(self) -> frozenset[str]:
        """Commits of ours whose step goes, also those whose tag has gone before."""
        staying = {verdict.step for verdict in self.verdicts if verdict.keep}
        shown = self._shown()
        return frozenset(
            oid
            for oid, commit in self.history.commits.items()
            if commit.copy is not None
            and commit.copy.run_id == self.wish.run_id
            and commit.copy.step not in staying
            and oid not in shown
        )

    @cached_property
    def old_objects(self) -> Objects:
        """Large files of copies that go, but for those that something that stays shows as well."""
        commits = self.history.commits
        shown = {name for oid in self._shown() for name in commits[oid].objects}
        old = {name: size for oid in self._old for name, size in commits[oid].objects.items()}
        return {name: size for name, size in old.items() if name not in shown}

    def _has_old(self, head: str) -> bool:
        return any(oid in self._old for oid in self.history.lines[head])

    def _remaining(self) -> dict[str, set[str]]:
        """Reference to the large files that can be reached from it afterwards."""
        squashed = {tag_title(tag) for tag in self.squashed_tags}
        squashed |= {branch_title(self.wish.branch)} if self.squashed_branch else set()
        return {
            title: {
                name
                for oid in ((head,) if title in squashed else self.history.lines[head])
                for name in self.history.commits[oid].objects
            }
            for title, head in self.history.references().items()
            if self._stays(title)
        }

    def _shown(self) -> set[str]:
        """Commits that something leads to that stays."""
        return {oid for title, oid in self.history.references().items() if self._stays(title)}

    def _stays(self, title: str) -> bool:
        return title not in {tag_title(tag) for tag in self.tags}


def plan_hub_purge(history: HubHistory, wish: HubWish) -> HubPurge:
    """One verdict a copy of this run that a tag of its step leads to; other tags are not ours."""
    heads = {step: head for step, head in _copies(history, wish.run_id)}
    candidates = [Candidate(step=step, is_verified=True, metrics={}) for step in sorted(heads)]
    wanted = [policy.reasons(candidates) for policy in wish.policies]
    titles = ", ".join(policy.title for policy in wish.policies)
    newest = max(heads, default=None)
    verdicts: list[Verdict] = []
    for step in sorted(heads):
        reasons = [
            *(given[step] for given in wanted if step in given),
            *(["newest copy"] if step == newest else []),
            *([wish.held[step]] if step in wish.held else []),
            *_shown_by(history, step, heads[step]),
        ]
        why_not = "" if reasons else f"kept by none of: {titles}"
        verdicts.append(Verdict(step=step, reasons=tuple(reasons), why_not=why_not))
    return HubPurge(wish=wish, history=history, verdicts=tuple(verdicts))


def _copies(history: HubHistory, run_id: str) -> list[tuple[int, str]]:
    """Steps with the commits that their own tags lead to."""
    found: list[tuple[int, str]] = []
    for tag, head in history.tags.items():
        copy = history.commits[head].copy
        if copy is not None and copy.run_id == run_id and tag == names.step_dir(copy.step):
            found.append((copy.step, head))
    return found


def _shown_by(history: HubHistory, step: int, head: str) -> list[str]:
    own = tag_title(names.step_dir(step))
    leading = [title for title, oid in history.references().items() if oid == head and title != own]
    return [f"{title} leads to it" for title in sorted(leading)]
