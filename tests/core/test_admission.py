"""Which actions start beside those that run, and where: limits, nodes and bytes, without Ray."""

from dataclasses import replace

import pytest

from ray_ckpt.core.actions import Action
from ray_ckpt.core.admission import (
    NODE,
    Admission,
    LiveNode,
    Nodes,
    Occupant,
    Placement,
    Start,
    admit,
    nodes_of_bytes,
)
from ray_ckpt.core.draft import Node
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.limits import Limits
from ray_ckpt.core.policy import policy_of_toml
from ray_ckpt.core.wanted import export_action, publish_action, verify_action
from tests.core.worlds import HF, observe, view, with_record

A, B = LiveNode(id="a", name="host-a", num_slots=4), LiveNode(id="b", name="host-b", num_slots=4)
TRAINER = LiveNode(id="t", name="trainer")


def verify(step: int) -> Action:
    return verify_action(view(step))


def export(step: int) -> Action:
    return export_action(view(step), HF)


def publish(step: int, to: str) -> Action:
    return publish_action(view(step), HF, to)


def admitted(
    *actions: Action,
    running: tuple[Occupant, ...] = (),
    limits: Limits | None = None,
    nodes: tuple[LiveNode, ...] | None = None,
    near: dict[str, str] | None = None,
    resting: dict[str, str] | None = None,
) -> Admission:
    return admit(
        actions,
        running,
        limits=limits or Limits(),
        resting=resting or {},
        nodes=None if nodes is None else Nodes(living=nodes, near=near or {}),
    )


def started(admission: Admission) -> list[str]:
    return [start.action.title for start in admission.starts]


def places(admission: Admission) -> list[str]:
    return [start.placement.node.id for start in admission.starts if start.placement]


def test_so_many_run_at_once_and_no_more() -> None:
    done = admitted(verify(1), verify(2), verify(3), limits=Limits(total=2))
    assert started(done) == ["verify step-1", "verify step-2"]
    assert done.waits == {verify(3).key: "2 actions run already, limits.total"}


def test_a_kind_that_is_full_lets_others_pass() -> None:
    running = (Occupant(action=export(1)), Occupant(action=export(2)))
    limits = Limits(per_kind={"export": 2})
    done = admitted(export(3), verify(4), running=running, limits=limits)
    assert started(done) == ["verify step-4"]
    assert done.waits[export(3).key] == "2 exports run already, limits.per_kind.export"


def test_a_destination_that_hangs_holds_one_slot_and_others_go_on() -> None:
    running = (Occupant(action=publish(1, "s3://dead")),)
    done = admitted(publish(2, "s3://dead"), publish(1, "/good"), running=running)
    assert started(done) == ["publish step-1 hf to /good"]
    assert done.waits == {
        publish(2, "s3://dead").key: "1 action runs at s3://dead already, limits.per_destination"
    }


def test_copies_are_removed_and_made_at_one_place_one_after_the_other() -> None:
    retire = replace(publish(1, "/copies"), kind=ActionKind.RETIRE)
    done = admitted(publish(2, "/copies"), running=(Occupant(action=retire),))
    assert started(done) == []


def test_actions_are_spread_over_the_nodes_up_to_their_limit() -> None:
    done = admitted(*map(verify, range(5)), nodes=(A, B), limits=Limits(per_node=2))
    assert places(done) == ["a", "b", "a", "b"]
    assert list(done.waits.values()) == [
        "every node has its fill (host-a, host-b): limits.per_node, slots of ckpt_io"
    ]


def test_a_node_takes_no_more_than_it_has_slots() -> None:
    small = replace(A, num_slots=1)
    assert places(admitted(verify(1), verify(2), nodes=(small,))) == ["a"]


def test_where_any_node_has_slots_the_others_are_left_alone() -> None:
    assert places(admitted(verify(1), nodes=(TRAINER, B))) == ["b"]
    assert places(admitted(verify(1), nodes=(TRAINER,))) == ["t"]


def test_the_node_that_touched_the_bytes_last_goes_first_while_it_has_room() -> None:
    near = {verify(1).key: "b", verify(2).key: "b", verify(3).key: "gone"}
    done = admitted(*map(verify, (1, 2, 3)), nodes=(A, B), near=near, limits=Limits(per_node=1))
    assert places(done) == ["b", "a"]
    assert all(s.placement and s.placement.strength == "prefer" for s in done.starts)


def test_nodes_that_are_being_drained_get_nothing_new() -> None:
    leaving = replace(A, is_draining=True)
    assert places(admitted(verify(1), nodes=(leaving, B), near={verify(1).key: "a"})) == ["b"]
    (why,) = admitted(verify(1), nodes=(leaving, TRAINER)).waits.values()
    assert why == "no node that may run it is there: all are being drained"


def test_an_action_that_names_its_node_runs_there_or_nowhere() -> None:
    pinned = replace(verify(1), node=Node(host="trainer", id="t"))
    (start,) = admitted(pinned, nodes=(A, TRAINER)).starts
    assert start == Start(action=pinned, placement=Placement(node=TRAINER, strength="require"))
    leaving = replace(TRAINER, is_draining=True)
    assert places(admitted(pinned, nodes=(A, leaving))) == ["t"]  # its bytes must leave first
    (lost,) = admitted(pinned, nodes=(A, B)).starts
    assert lost.placement is None, "it starts, and fails: a lost node is for its own rules"
    again = replace(TRAINER, id="joined again")
    assert places(admitted(pinned, nodes=(A, again))) == ["joined again"]
    busy = (Occupant(action=verify(3), node="t"), Occupant(action=verify(4), node="t"))
    assert admitted(pinned, nodes=(A, TRAINER), running=busy).waits == {
        pinned.key: "2 actions run on its node trainer already, limits.per_node"
    }


def test_bytes_are_where_the_action_before_ran() -> None:
    observed = with_record(observe(view(1)), verify(1), ActionState.SUCCEEDED, result={NODE: "b"})
    observed = with_record(observed, export(2), ActionState.SUCCEEDED, result={NODE: "a"})
    wanted = [export(1), publish(2, "/copies"), verify(3), export(3)]
    assert nodes_of_bytes(wanted, observed.records) == {
        export(1).key: "b",
        publish(2, "/copies").key: "a",
    }


def test_limits_are_read_from_the_policy_and_unknown_kinds_are_refused() -> None:
    text = "[lifecycle.limits]\ntotal = 3\nper_kind = {export = 1}\nhung_after_s = 60\n"
    limits = policy_of_toml(text, where="a file").limits
    assert limits == Limits(total=3, per_kind={"export": 1}, hung_after_s=60.0)
    with pytest.raises(ConfigError, match="no action is called 'exprot'"):
        Limits(per_kind={"exprot": 1})
    with pytest.raises(ConfigError, match=r"limits\.per_kind\.export must be at least 1"):
        Limits(per_kind={"export": 0})
    with pytest.raises(ConfigError, match="per_node must be at least 1"):
        Limits(per_node=0)


def test_a_place_that_rests_keeps_its_own_actions_waiting_and_no_others() -> None:
    admission = admitted(
        publish(1, "/dead"), publish(1, "/well"), resting={"/dead": "/dead rests for 9 s"}
    )
    assert started(admission) == [publish(1, "/well").title]
    assert list(admission.waits.values()) == ["/dead rests for 9 s"]
