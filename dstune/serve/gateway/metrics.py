"""The metrics at `/metrics`. Labels are names that the server knows, never text from clients."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dstune.serve.fleet import Fleet

SECONDS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("dstune_requests", "Requests", ["route", "model", "status"], **options)
        self.seconds = Histogram(
            "dstune_request_seconds", "Until the last byte", ["route", "model"], buckets=SECONDS, **options
        )
        self.first_byte = Histogram(
            "dstune_first_byte_seconds", "Until the first byte", ["route", "model"], buckets=SECONDS, **options
        )
        self.tokens = Counter("dstune_tokens", "Tokens of prompts and answers, as engines count", ["model"], **options)
        self.active = Gauge("dstune_active_requests", "Requests that engines work on", **options)
        self.queued = Gauge("dstune_queued_requests", "Requests that wait for a place", **options)
        self.guarded = Counter("dstune_guard_decisions", "What the guard decided", ["what", "decision"], **options)
        self._proven = Gauge(
            "dstune_model_proven", "1: held against its training; 0: not, see status", ["model", "status"], **options
        )
        self._difference = Gauge(
            "dstune_model_difference", "Largest difference from the reference", ["model"], **options
        )
        self._ready = Gauge("dstune_model_ready", "1: its engine runs", ["model"], **options)
        self._restarts = Gauge("dstune_engine_restarts", "Since the start", ["model"], **options)

    def add_collector(self, collector: Any) -> None:
        """Also export the metrics of a `prometheus_client` collector."""
        self._registry.register(collector)

    def text(self, fleet: Fleet) -> bytes:
        for gauge in (self._proven, self._difference, self._ready, self._restarts):
            gauge.clear()
        for name, model in fleet.models.items():
            proof = model.proof
            self._proven.labels(name, proof.status).set(proof.status == "proven")
            self._ready.labels(name).set(model.ready)
            if proof.difference is not None:
                self._difference.labels(name).set(proof.difference)
        for base, count in fleet.restarts().items():
            self._restarts.labels(base).set(count)
        return generate_latest(self._registry)
