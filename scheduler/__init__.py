"""The scheduler: pure, synchronous, standard library only; time comes in as `now` (seconds).

`Admission` decides which queued request enters the engine; `steps.StepPolicy` which of the running sequences
take part in the next step, by the step times that `step_time.StepTimeFit` learns; `Ledger` keeps what each
seat was owed and what it got; `TokenBucket` holds the request and token limits. Nothing here does I/O, reads
a clock or knows vLLM, so a test or a simulation drives the very code that production runs.
docs/scheduling.md tells the theory.
"""

from scheduler.admission import Admission
from scheduler.seats import SeatReading
from scheduler.terms import Ask, Capacity, Policy, SeatTerms
from scheduler.tickets import Outcome, Reason, Refusal, State, Ticket

__all__ = [
    "Admission",
    "Ask",
    "Capacity",
    "Outcome",
    "Policy",
    "Reason",
    "Refusal",
    "SeatReading",
    "SeatTerms",
    "State",
    "Ticket",
]
