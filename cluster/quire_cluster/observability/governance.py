"""Governance at a gateway, as Prometheus asks for it."""

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quire_cluster.governance.governor import Governor


class GovernanceCollector(Collector):
    """Read at each scrape."""

    def __init__(self, governor: Governor) -> None:
        self._governor = governor

    def collect(self) -> Iterator[Metric]:
        """The series."""
        governor = self._governor
        for name, text, value in (
            ("database_silence_seconds", "Seconds since the database last answered", governor.directory.silence),
            ("journal_pending_records", "Records that are not in the database yet", governor.writer.pending),
            ("journal_healthy", "1: all records are on disk; 0: some wait in memory", governor.journal.healthy),
            ("limits_alone", "1: no controller leases limits, this gateway has its share", governor.limiter.alone),
        ):
            yield GaugeMetricFamily(f"quire:governance_{name}", text, value=float(value))
