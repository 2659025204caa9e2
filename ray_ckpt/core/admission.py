"""Which of the actions that may start do so now, and on which node. Pure: data in, data out.

    places     none at one that rests because it fails: `core.breaker`
    limits     in all, of a kind, at a destination
    nodes      those with slots of `ckpt_io`, where any has them; none that is being drained; the
               one that touched the bytes last goes first: its page cache still holds them

An action that names its node runs there or nowhere: what it reads lies on that node's own disk.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.draft import Node
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.core.limits import Limits
from ray_ckpt.core.wanted import export_of

NODE = "node"
"""Where an action ran, in its record's result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveNode:
    """One living node, as far as it matters for where actions run."""

    id: str
    name: str
    """What people call it."""
    num_slots: int | None = None
    """How many actions it takes at once; None where it says nothing about that."""
    is_draining: bool = False
    """It will be taken away soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Where actions may run, and which of them each would best run on."""

    living: Sequence[LiveNode]
    near: Mapping[str, str]
    """By the action's key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where an attempt is to run."""

    node: LiveNode
    strength: Literal["prefer", "require"]
    """Whether another node will do, should this one turn out to be busy or gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """An action that runs already."""

    action: Action
    node: str | None = None
    """Id of its node, as far as anybody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """An action that starts now."""

    action: Action
    placement: Placement | None
    """None where nothing is known of nodes, or where its own is not there: it starts, and fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What starts, and why the others do not."""

    starts: tuple[Start, ...]
    waits: Mapping[str, str]
    """Reason by the action's key."""


def admit(
    actions: Iterable[Action],
    running: Sequence[Occupant],
    *,
    limits: Limits,
    resting: Mapping[str, str],
    nodes: Nodes | None,
) -> Admission:
    """Which of `actions` start beside those that run, in their order.

    `resting` tells for a destination why nothing begins there now; `nodes` is None for somebody who
    only wants to know.
    """
    taken, starts, waits = list(running), list[Start](), dict[str, str]()
    for action in actions:
        placed = resting.get(action.destination or "") or _over_limit(action, taken, limits)
        if placed is None and nodes is not None:
            near = nodes.near.get(action.key)
            placed = _place(action, taken, nodes.living, limits.per_node, near)
        if isinstance(placed, str):
            waits[action.key] = placed
            continue
        starts.append(Start(action=action, placement=placed))
        taken.append(Occupant(action=action, node=placed.node.id if placed else None))
    return Admission(starts=tuple(starts), waits=waits)


def nodes_of_bytes(
    actions: Iterable[Action], records: Mapping[str, ActionRecord]
) -> dict[str, str]:
    """By key, the node that touched last what an action reads, as far as records tell."""
    found: dict[str, str] = {}
    for action in actions:
        before = _reader_before(action)
        record = records.get(before.key) if before else None
        if record is not None and record.result.get(NODE) is not None:
            found[action.key] = str(record.result[NODE])
    return found


def _reader_before(action: Action) -> Action | None:
    if action.kind not in (ActionKind.EXPORT, ActionKind.PUBLISH):
        return None
    if action.kind is ActionKind.EXPORT or action.export is None:
        return replace(action, kind=ActionKind.VERIFY, export=None, destination=None)
    return export_of(action)


def _over_limit(action: Action, running: Sequence[Occupant], limits: Limits) -> str | None:
    """The limit that keeps the action waiting; None if there is room."""
    if len(running) >= limits.total:
        return f"{_actions(len(running))} already, limits.total"
    same_kind = sum(o.action.kind is action.kind for o in running)
    if same_kind >= limits.per_kind.get(action.kind, limits.total):
        return f"{_actions(same_kind, action.kind)} already, limits.per_kind.{action.kind}"
    if action.destination is not None and action.kind is not ActionKind.LOOK:
        at_work = [o.action for o in running if o.action.kind is not ActionKind.LOOK]
        same_place = sum(other.destination == action.destination for other in at_work)
        if same_place >= limits.per_destination:
            return f"{_actions(same_place)} at {action.destination} already, limits.per_destination"
    return None


def _actions(count: int, kind: str = "action") -> str:
    return f"{count} {kind} runs" if count == 1 else f"{count} {kind}s run"


def _place(
    action: Action,
    running: Sequence[Occupant],
    nodes: Sequence[LiveNode],
    per_node: int,
    near: str | None,
) -> Placement | str | None:
    """Where the action runs, or why it cannot start anywhere now."""
    load = {node.id: sum(o.node == node.id for o in running) for node in nodes}
    if action.node is not None:
        return _on_its_node(action.node, nodes, load, per_node)
    have_slots = any(node.num_slots is not None for node in nodes)
    usable = [node for node in nodes if not node.is_draining]
    with_slots = [node for node in usable if node.num_slots is not None or not have_slots]
    if not with_slots:
        return (
            "no node that may run it is there: all are being drained"
            if nodes
            else "no node is there"
        )
    free = [node for node in with_slots if load[node.id] < _room(node, per_node)]
    if not free:
        names = ", ".join(sorted(node.name for node in with_slots))
        return f"every node has its fill ({names}): limits.per_node, slots of ckpt_io"
    chosen = min(free, key=lambda node: (node.id != near, load[node.id], node.id))
    return Placement(node=chosen, strength="prefer")


def _on_its_node(
    wanted: Node, nodes: Sequence[LiveNode], load: Mapping[str, int], per_node: int
) -> Placement | str | None:
    """There, even while it is being drained: what lies on its disk must leave before it goes.

    A node that has joined again has another id, and is known by its host. None if it is not there.
    """
    same = [node for node in nodes if node.id == wanted.id]
    node = next(iter((*same, *(node for node in nodes if node.name == wanted.host))), None)
    if node is None:
        return None
    if load[node.id] >= per_node:
        return f"{_actions(load[node.id])} on its node {node.name} already, limits.per_node"
    return Placement(node=node, strength="require")


def _room(node: LiveNode, per_node: int) -> int:
    return per_node if node.num_slots is None else min(per_node, node.num_slots)
