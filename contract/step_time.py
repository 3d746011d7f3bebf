"""How long one step of a continuous-batching engine takes, by what is in it.

    t = a + b*P + c*S + d*KV + f*(1 - (1 - k/E)^S)

P prompt tokens prefilled in the step, S decoding sequences, KV tokens in the cache that the step reads. The
last term is a mixture of E experts with k active for each token: S sequences touch that share of the experts,
whose weights must be read once. A scheduler fits it, a simulation runs by it, and a control plane judges with
it what a node can honour, so it stands here, in the standard library's terms alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepTime:
    """The constants of one model on one machine, in seconds; each is 0 or more.

    Invariant: `seconds` grows with each of its arguments.
    """

    base_s: float
    prefill_token_s: float
    decode_s: float
    kv_token_s: float
    experts_s: float = 0.0
    """Reading the weights of all experts; 0 for a dense model."""
    active_share: float = 0.0
    """k/E: the share of the experts that one token uses."""

    def seconds(self, prefill_tokens: float, decodes: float, kv_tokens: float) -> float:
        """The time of a step with this in it."""
        seconds = (
            self.base_s
            + self.prefill_token_s * prefill_tokens
            + self.decode_s * decodes
            + self.kv_token_s * kv_tokens
        )
        if self.experts_s:
            seconds += self.experts_s * self.touched(decodes)
        return seconds

    def touched(self, decodes: float) -> float:
        """The share of the experts that `decodes` sequences use together, expected."""
        return float(1.0 - (1.0 - self.active_share) ** decodes) if self.active_share else 0.0
