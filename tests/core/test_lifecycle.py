"""The two tables of legal moves, for all pairs of states."""

import itertools
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import TypeVar

import pytest

from ray_ckpt.core.errors import TransitionError
from ray_ckpt.core.lifecycle import (
    ACTION_MOVES,
    CHECKPOINT_MOVES,
    ActionState,
    CheckpointState,
    move_action,
    move_checkpoint,
)

PAIRS = [
    *(
        (move_checkpoint, CHECKPOINT_MOVES, a, b)
        for a, b in itertools.product(CheckpointState, repeat=2)
    ),
    *((move_action, ACTION_MOVES, a, b) for a, b in itertools.product(ActionState, repeat=2)),
]
TERMINAL = {
    ActionState.SUCCEEDED,
    ActionState.DEAD,
    ActionState.SUPERSEDED,
    ActionState.CANCELLED,
}


State = TypeVar("State", bound=StrEnum)


def reachable(moves: Mapping[State, frozenset[State]], start: State) -> set[State]:
    seen: set[State] = set()
    waiting = [start]
    while waiting:
        for state in moves[waiting.pop()] - seen:
            seen.add(state)
            waiting.append(state)
    return seen


@pytest.mark.parametrize(
    ("move", "table", "current", "to"), PAIRS, ids=lambda value: str(getattr(value, "value", ""))
)
def test_a_move_succeeds_if_and_only_if_it_is_in_the_table(
    move: Callable[..., StrEnum],
    table: Mapping[StrEnum, frozenset[StrEnum]],
    current: StrEnum,
    to: StrEnum,
) -> None:
    if to in table[current]:
        assert move(current, to) is to
        return
    with pytest.raises(TransitionError, match=f"that is {current} cannot become {to}") as caught:
        move(current, to)
    assert all(state in caught.value.do for state in table[current])


def test_a_final_state_says_so() -> None:
    with pytest.raises(TransitionError, match="it is final"):
        move_checkpoint(CheckpointState.PURGED, CheckpointState.COMMITTED)


def test_every_state_has_a_row() -> None:
    assert set(CHECKPOINT_MOVES) == set(CheckpointState)
    assert set(ACTION_MOVES) == set(ActionState)


@pytest.mark.parametrize("state", sorted(set(CheckpointState) - {CheckpointState.PURGED}))
def test_every_checkpoint_can_be_purged_in_the_end(state: CheckpointState) -> None:
    assert CheckpointState.PURGED in reachable(CHECKPOINT_MOVES, state)


def test_every_checkpoint_begins_as_a_save_or_as_somebody_elses_folder() -> None:
    born = {CheckpointState.SAVING, CheckpointState.FOREIGN}
    assert born.isdisjoint(frozenset().union(*CHECKPOINT_MOVES.values()))
    found = set().union(*(reachable(CHECKPOINT_MOVES, state) for state in born))
    assert found | born == set(CheckpointState)


def test_nothing_goes_from_use_to_purged_without_passing_the_trash() -> None:
    for state in (CheckpointState.COMMITTED, CheckpointState.VERIFIED, CheckpointState.FOREIGN):
        assert CheckpointState.PURGED not in CHECKPOINT_MOVES[state]


@pytest.mark.parametrize("state", ActionState)
def test_every_action_can_end(state: ActionState) -> None:
    assert state.is_terminal or reachable(ACTION_MOVES, state) & TERMINAL


@pytest.mark.parametrize("state", ActionState)
def test_terminal_states_move_only_when_a_person_retries(state: ActionState) -> None:
    assert state.is_terminal == (state in TERMINAL)
    if state.is_terminal:
        assert ACTION_MOVES[state] <= {ActionState.PENDING}


def test_success_is_never_undone() -> None:
    assert ACTION_MOVES[ActionState.SUCCEEDED] == frozenset()
