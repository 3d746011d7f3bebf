"""Constants of the step policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

UNLIMITED: Final = 2**31


@dataclass(frozen=True, slots=True)
class StepRules:
    """Constants of the step policy."""

    margin: float = 0.02
    """The rate aimed at is higher than the owed one by this share, for what no model foresees,"""
    margin_tok_s: float = 1.0
    """and by so much at least: a second in which a slow stream gets one token less is a second missed."""
    review_steps: int = 16
    review_s: float = 0.2
    easy_review_s: float = 1.0
    """Steps and time after which the batch is chosen anew, if nothing calls for it earlier: the longer time
    while half as many again as there are would fit, and no step takes longer than the pace allows."""
    surprise: float = 1.1
    """A step that takes so many times what it should, and longer than the pace allows, calls for it."""
    turn_steps: int = 32
    """Steps for which a sequence takes part, or is held, before it may change places with another; in tokens
    over weight, what a seat must lag behind another to get a place of it."""
    horizon_s: float = 0.25
    """Time in which a lag is made up for, or a lead is given away; of slow streams, that of some tokens."""
    kept_lead_s: float = 0.03
    """A lead counts for at most this much time of the seat's rate."""
    kept_lag_s: float = 0.25
    """A lag counts for at most this much; more was not the batch's fault."""
    prefill_share: float = 0.5
    """Borrowed decodes leave room for as many prompt tokens as steps had of late, but at most this share of
    what the owed ones leave."""
    hurry: float = 2.0
    """An owed prompt whose first token is overdue is read so many times faster than it is owed."""
    stretch: float = 2.0
    most_stretch_s: float = 0.02
    """Prompts may lengthen a step to this many times the pace, but by no more time than this, while nobody
    is behind,"""
    prompt_lag_s: float = 0.03
    """or owed ones while nobody is behind by more than this much time of its rate."""
    spare_share: float = 0.125
    """Borrowed sequences of use in the engine beyond those that take part, so that no step goes short
    between an end and the next entry."""
    ramp_s: float = 0.15
    """Time in which `borrowed_limit` may double: a pause between two owed requests must not let in a crowd
    that would only be held."""
