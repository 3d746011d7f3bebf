"""Rules of a ticket's life."""

from itertools import product

import pytest

from scheduler import Policy, SeatTerms
from scheduler.seats import Seat
from scheduler.tickets import ENDED, TRANSITIONS, Event, State, Ticket


def ticket_in(state: State) -> Ticket:
    seat = Seat(SeatTerms("a", 1, 0.0, 1000.0, 10, 1000), Policy(), now=0.0)
    ticket = Ticket(
        1, seat, input_tokens=1, max_tokens=1, count=1, submitted_at=0.0, deadline=1.0, expires_at=60.0
    )
    ticket.state = state
    return ticket


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_only_moves_in_the_table_happen(state: State, event: Event) -> None:
    ticket = ticket_in(state)
    if (state, event) in TRANSITIONS:
        ticket.apply(event)
        assert ticket.state is TRANSITIONS[state, event]
        return
    with pytest.raises(RuntimeError, match=f"cannot {event.value}"):
        ticket.apply(event)
    assert ticket.state is state


@pytest.mark.parametrize("state", [state for state in State if state in ENDED])
def test_nothing_follows_an_end(state: State) -> None:
    assert not [event for event in Event if (state, event) in TRANSITIONS]
    assert ticket_in(state).ended


def test_every_state_that_has_not_ended_can_end() -> None:
    for state in set(State) - ENDED:
        assert any(after in ENDED for (before, _), after in TRANSITIONS.items() if before is state)
