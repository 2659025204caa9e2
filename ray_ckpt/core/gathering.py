"""What brings a staged save from its nodes to the root, and what follows from a lost one. Pure.

    staged ──► gather, one a node ──► commit ──► free, one a node ──► forgotten
                  │                                 ▲
                  └──► abandoned: a node, or bytes on it, are lost; the next branch has overtaken it

What was brought is judged by what lies at the root, never by a record that says so.
"""

from collections.abc import Iterator, Mapping, Sequence

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.draft import Draft, Node
from ray_ckpt.core.failures import ErrorClass
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Observation

_FOR_GOOD = {ErrorClass.LOST: "node lost", ErrorClass.INTEGRITY: "damaged"}
"""Failures of a gather after which the save can never be whole."""
Planned = tuple[Action, str, str | None]
"""An action, why, and why it does not start now."""


def gather_action(draft: Draft, node: Node) -> Action:
    """Bring to the root what the node holds of the draft."""
    return Action(kind=ActionKind.GATHER, step=draft.step, source_id=draft.save_id, node=node)


def commit_action(draft: Draft) -> Action:
    """Make a checkpoint of the draft, all of which was brought."""
    return Action(kind=ActionKind.COMMIT, step=draft.step, source_id=draft.save_id)


def free_action(draft: Draft, node: Node) -> Action:
    """Remove from the node what it holds of the draft."""
    return Action(kind=ActionKind.FREE, step=draft.step, source_id=draft.save_id, node=node)


def draft_actions(observed: Observation) -> Iterator[Planned]:
    """What is to be done with every draft, oldest step first."""
    busy = _running_commit(observed.records)
    for draft in sorted(observed.drafts, key=_age):
        if draft.ended is not None:
            for node in _unfreed(draft, observed):
                yield free_action(draft, node), f"the save is {draft.ended.how}", None
        elif _is_brought(draft, observed):
            commit = commit_action(draft)
            # must be one at a time: each may set aside what another one makes visible
            busy = busy or commit
            before = _running_gather(draft, observed.records) or busy
            not_now = None if before.key == commit.key else f"after {before.title}"
            yield commit, "all of it was brought here", not_now
        else:
            for node in draft.nodes:
                if draft.missing_from(node):
                    yield gather_action(draft, node), "ranks have saved to their nodes", None


def abandonments(observed: Observation) -> Iterator[tuple[Draft, str]]:
    """Drafts that can never become a checkpoint, each with the reason."""
    for draft in observed.drafts:
        reason = None if draft.ended is not None else _why_never(draft, observed.records)
        if reason is not None:
            yield draft, reason


def leftovers(observed: Observation) -> list[Draft]:
    """Abandoned drafts of which parts lie at the root that nobody adds to any more."""
    return [
        draft
        for draft in observed.drafts
        if draft.ended is not None
        and draft.ended.how == "abandoned"
        and draft.brought
        and not _is_checkpoint(draft, observed)
        and not _is_running(draft, observed)
    ]


def forgettable(observed: Observation, *, now: float) -> list[Draft]:
    """Drafts that have ended and left nothing behind; people see abandoned ones for a while."""
    grace_s = observed.policy.keep.trash_grace_s
    return [
        draft
        for draft in observed.drafts
        if draft.ended is not None
        and (draft.ended.how == "committed" or now - draft.ended.at >= grace_s)
        and (not draft.brought or _is_checkpoint(draft, observed))
        and not _unfreed(draft, observed)
        and not _is_running(draft, observed)
    ]


def hosts_needed(observed: Observation) -> dict[int, list[str]]:
    """For each staged step, the hosts from which something is still to be brought."""
    return {
        draft.step: sorted({node.host for node in draft.nodes if draft.missing_from(node)})
        for draft in observed.drafts
        if draft.ended is None and not draft.is_whole
    }


def is_moot(action: Action, observed: Observation) -> str | None:
    """Why nobody needs this unfinished action about a draft any more; None if somebody does."""
    draft = _draft_of(action, observed)
    record = observed.records.get(action.key)
    if action.kind is ActionKind.FREE:
        is_lost = record is not None and record.error_class is ErrorClass.LOST
        return "its node is gone, and what was to be removed with it" if is_lost else None
    if draft is None or draft.ended is None:
        return "its draft is gone" if draft is None else None
    return f"the save is {draft.ended.how}"


def is_done(action: Action, observed: Observation) -> bool:
    """Whether the effect of a gather or a commit is there, whatever its record says."""
    draft = _draft_of(action, observed)
    if draft is None or action.kind is ActionKind.FREE:
        return False
    if draft.ended is not None:
        return draft.ended.how == "committed"
    if action.kind is ActionKind.COMMIT or action.node is None:
        return False
    return not draft.missing_from(action.node)


def _draft_of(action: Action, observed: Observation) -> Draft | None:
    return next((d for d in observed.drafts if d.save_id == action.source_id), None)


def draft_views(
    drafts: Sequence[Draft], checkpoints: Sequence[CheckpointView]
) -> list[CheckpointView]:
    """The checkpoints, and each draft that is none yet or never will be.

    What lies in a step's own folder and is nobody else's is the draft's.
    """
    committed = {view.manifest.save_id for view in checkpoints if view.manifest is not None}
    open_drafts = [
        draft
        for draft in drafts
        if draft.save_id not in committed
        and (draft.ended is None or draft.ended.how == "abandoned")
    ]
    return [*checkpoints, *(_view(draft) for draft in open_drafts)]


def _view(draft: Draft) -> CheckpointView:
    state, problem = CheckpointState.SAVING, progress(draft)
    if draft.ended is not None:
        state, problem = CheckpointState.ABANDONED, draft.ended.reason
    return CheckpointView(step=draft.step, state=state, manifest=draft.manifest, problem=problem)


def progress(draft: Draft) -> str:
    """How far it has come, for people: `on 2 nodes, 1 of 2 brought here`."""
    num_nodes = len(draft.nodes)
    brought = sum(not draft.missing_from(node) for node in draft.nodes)
    nodes = "1 node" if num_nodes == 1 else f"{num_nodes} nodes"
    return f"staged on {nodes}, {brought} of {num_nodes} brought here"


def _why_never(draft: Draft, records: Mapping[str, ActionRecord]) -> str | None:
    for node in draft.nodes:
        record = records.get(gather_action(draft, node).key)
        if record is None or record.state is not ActionState.DEAD or record.error_class is None:
            continue
        missing = draft.missing_from(node)
        if record.error_class in _FOR_GOOD and missing:
            why = _FOR_GOOD[record.error_class]
            files = f"{len(missing)} files of step-{draft.step}, which was never committed"
            return f"{why}: {node.title} held {files}; {_first_line(record.error)}"
    commit = records.get(commit_action(draft).key)
    if commit is None or commit.state is not ActionState.DEAD:
        return None
    exists = commit.error_kind == "StepExistsError"
    return f"step-{draft.step} is committed already, by another save" if exists else None


def _running_commit(records: Mapping[str, ActionRecord]) -> Action | None:
    running = (r.action for r in records.values() if r.state is ActionState.RUNNING)
    return next((action for action in running if action.kind is ActionKind.COMMIT), None)


def _is_brought(draft: Draft, observed: Observation) -> bool:
    """Whether nothing is to be brought: all has arrived, or a commit takes or took it to its place.

    While one runs, what waited may be gone already although nobody has said yet how it ended.
    """
    return draft.is_whole or _is_being_committed(draft, observed) or _is_checkpoint(draft, observed)


def _running_gather(draft: Draft, records: Mapping[str, ActionRecord]) -> Action | None:
    found = [records.get(gather_action(draft, node).key) for node in draft.nodes]
    running = (r.action for r in found if r is not None and r.state is ActionState.RUNNING)
    return next(running, None)


def _is_being_committed(draft: Draft, observed: Observation) -> bool:
    return observed.state_of(commit_action(draft)) is ActionState.RUNNING


def _is_running(draft: Draft, observed: Observation) -> bool:
    is_gathered_now = _running_gather(draft, observed.records) is not None
    return is_gathered_now or _is_being_committed(draft, observed)


def _is_checkpoint(draft: Draft, observed: Observation) -> bool:
    """Whether the very save was committed, and then maybe trashed: its bytes are no leftovers."""
    no_checkpoint = (CheckpointState.SAVING, CheckpointState.ABANDONED)
    views = (v for v in observed.checkpoints if v.state not in no_checkpoint and v.manifest)
    return any(v.manifest is not None and v.manifest.save_id == draft.save_id for v in views)


def _unfreed(draft: Draft, observed: Observation) -> list[Node]:
    over = (ActionState.SUCCEEDED, *GIVEN_UP)
    return [n for n in draft.nodes if observed.state_of(free_action(draft, n)) not in over]


def _age(draft: Draft) -> tuple[int, str, str]:
    return draft.step, draft.manifest.created_at, draft.save_id


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
