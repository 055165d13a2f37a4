"""Spans to an OpenTelemetry collector, over OTLP/HTTP in protobuf: the SDK's exporter in a thread of its own.

Imported only where `--otlp-endpoint` is set. A collector that is away, slow or wrong costs spans, which are
counted, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from penstock.common.identity import Identity
from penstock.common.tracing import Span, Spans

log = logging.getLogger(__name__)

TRACES_PATH = "/v1/traces"
BATCH_SPANS = 512
EXPORT_EVERY_S = 1.0
# One batch, tries again included.
EXPORT_TIMEOUT_S = 3.0
_KINDS = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}
_FLAGS = TraceFlags(TraceFlags.SAMPLED)


class OtlpExport:
    """Sends what `spans` holds, once a second."""

    def __init__(self, endpoint: str, identity: Identity, version: str, spans: Spans) -> None:
        """`endpoint`: the collector's base address; the path of traces is put behind it."""
        # It logs every try; this says once that the collector is away, and once that it is back.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._spans, self._endpoint = spans, endpoint
        self._exporter = OTLPSpanExporter(endpoint.rstrip("/") + TRACES_PATH, timeout=EXPORT_TIMEOUT_S)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="otlp")
        self._resource = Resource.create(
            {
                "service.name": f"penstock-{identity.service}",
                "service.instance.id": identity.id,
                "service.version": version,
            }
        )
        self._scope = InstrumentationScope("penstock", version)
        self._exported, self._failed = (spans.counted.labels(result) for result in ("exported", "failed"))
        self._away = False

    async def run(self) -> None:
        """Send, for ever: a loop of the service."""
        while True:
            await asyncio.sleep(EXPORT_EVERY_S)
            await self.flush()

    async def flush(self) -> None:
        """Send what waits now."""
        while batch := self._spans.take(BATCH_SPANS):
            loop = asyncio.get_running_loop()
            try:
                taken = await loop.run_in_executor(self._thread, self._export, batch)
            except asyncio.CancelledError:
                self._failed.value += len(batch)
                raise
            (self._exported if taken else self._failed).value += len(batch)
            self._tell(taken)

    async def close(self, flush_s: float) -> None:
        """Send what waits, in a given time, and end."""
        try:
            async with asyncio.timeout(flush_s):
                await self.flush()
        except TimeoutError:
            log.debug("spans are left behind")
        # A try that is waiting to be made again ends at once.
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the library's
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _export(self, batch: Sequence[Span]) -> bool:
        try:
            result = self._exporter.export([self._readable(span) for span in batch])
        except Exception as exc:  # noqa: BLE001  # whatever the library meets costs this batch only
            log.debug("export of spans: %r", exc)
            return False
        return result is SpanExportResult.SUCCESS

    def _tell(self, taken: bool) -> None:
        if taken is not self._away:
            return
        self._away = not taken
        text = "traces are exported again" if taken else "traces cannot be exported, spans are dropped"
        log.warning("%s: %s", text, self._endpoint.rpartition("@")[2])

    def _readable(self, span: Span) -> ReadableSpan:
        trace_id = int.from_bytes(span.trace_id, "big")
        parent = SpanContext(trace_id, span.parent_id, is_remote=True, trace_flags=_FLAGS)
        return ReadableSpan(
            span.name,
            context=SpanContext(trace_id, span.span_id, is_remote=False, trace_flags=_FLAGS),
            parent=parent if span.parent_id else None,
            resource=self._resource,
            attributes=span.attributes,
            events=[Event(event.name, event.attributes, event.at_ns) for event in span.events],
            kind=_KINDS[span.kind],
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
            start_time=span.start_ns,
            end_time=max(span.start_ns, span.end_ns),
            instrumentation_scope=self._scope,
        )
