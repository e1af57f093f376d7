"""Figures of a running server for Prometheus, at ``/metrics``. No label names a client.

Not here: a run's own figures (``metrics.jsonl``).
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)


class Metrics:
    """A server's counters; every server has its own, so that several can live in one process.

    Example:
        >>> metrics = Metrics()
        >>> metrics.answers.labels("check-in", "accepted").inc()
        >>> b'foedus_answers_total{answer="accepted",asked="check-in"} 1.0' in metrics.text()
        True
    """

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.answers = Counter("foedus_answers", "Messages answered", ["asked", "answer"], registry=own)
        self.problems = Counter("foedus_problems", "Requests that could not be served", ["code"], registry=own)
        self.refused = Counter("foedus_refused", "Updates left out", ["code"], registry=own)
        self.sessions = Counter("foedus_sessions", "Device sessions that ended, by shape", ["shape"], registry=own)
        self.steps = Counter("foedus_rounds", "Attempts of rounds", ["run", "how"], registry=own)
        self.bytes_in = Counter("foedus_received_bytes", "Bytes of uploads", registry=own)
        self.bytes_out = Counter("foedus_sent_bytes", "Bytes of blobs", registry=own)
        self.seconds = Histogram(
            "foedus_handling_seconds", "Time that a message takes", ["asked"], buckets=SECONDS, registry=own
        )
        self.waiting = Gauge("foedus_upload_bytes", "Memory of uploads under way", registry=own)
        self.round = Gauge("foedus_round", "The round under way", ["run"], registry=own)
        self.leading = Gauge("foedus_leading", "Whether this process leads", registry=own)
        self.doorbells = Gauge("foedus_doorbells", "Clients at the doorbell", registry=own)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)
