"""Figures out of a server's Prometheus metrics. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


def counter(text: str, name: str) -> float:
    """The sum of a sample over all its labels; 0 where there is none."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    )


@dataclass(frozen=True, slots=True)
class Histogram:
    """Cumulative counts by upper edge, in order, and the sum of all observations."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    sum: float

    @classmethod
    def read(cls, text: str, name: str) -> Histogram | None:
        """The histogram of that name, over all its labels; None where there is none."""
        counts: dict[float, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"{name}_bucket":
                    edge = float(sample.labels["le"])
                    counts[edge] = counts.get(edge, 0.0) + sample.value
        if not counts:
            return None
        edges = tuple(sorted(counts))
        return cls(edges, tuple(counts[edge] for edge in edges), counter(text, f"{name}_sum"))

    def __sub__(self, earlier: Histogram) -> Histogram:
        """What was observed since; edges must be the same."""
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return Histogram(self.edges, counts, self.sum - earlier.sum)

    @property
    def count(self) -> float:
        return self.counts[-1]

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else float("nan")

    def share_within(self, edge: float) -> float:
        """The share of the observations up to that edge, which must be one of its own; NaN of none."""
        return self.counts[self.edges.index(edge)] / self.count if self.count else float("nan")

    def edge_above(self, share: float) -> float:
        """The lowest edge below which at least `share` of the observations are; NaN of none."""
        for edge, count in zip(self.edges, self.counts, strict=True):
            if self.count and count >= share * self.count:
                return edge
        return float("nan")
