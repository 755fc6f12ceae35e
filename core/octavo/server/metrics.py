"""Prometheus metrics: vLLM's names and meanings under the prefix ``octavo:``, in a registry of the app's own."""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from octavo.messages import StepStats
from octavo.outputs import CompletionDelta, RequestSummary

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LABEL = ("model_name",)


class Metrics:
    """Everything that ``/metrics`` shows. Updated from the client's thread; prometheus_client locks each value."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._name = model_name
        self._num_drafts = self._num_accepted = 0

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"octavo:{name}", text, LABEL, registry=self.registry).labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"octavo:{name}", text, LABEL, registry=self.registry).labels(model_name)

        def histogram(name: str, text: str, buckets: Iterable[float] = SECONDS) -> Histogram:
            made = Histogram(f"octavo:{name}", text, LABEL, registry=self.registry, buckets=tuple(buckets))
            return made.labels(model_name)

        self.num_running = gauge("num_requests_running", "Sequences that are computed.")
        self.num_waiting = gauge("num_requests_waiting", "Sequences that wait to be computed.")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.")
        self.startup = Gauge(
            "octavo:startup_seconds", "Where the time of the start-up went.", ("part",), registry=self.registry
        )
        self.num_preemptions = counter("num_preemptions", "Sequences that gave way.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens found there.")
        self.cached_tokens = counter(
            "prompt_tokens_cached", "Prompt tokens of requests that were not computed for them."
        )
        self.num_drafts = counter("spec_decode_num_drafts", "Times that a sequence had drafts verified.")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Draft tokens verified.")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self.accepted_per_position = Counter(
            "octavo:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by their place in the draft.",
            (*LABEL, "position"),
            registry=self.registry,
        )
        self.acceptance_length = gauge(
            "spec_decode_acceptance_length", "Tokens that a sequence with drafts gets a step."
        )
        # not a counter: what drafts have cost is taken off
        self.seconds_saved = gauge("spec_decode_seconds_saved", "Seconds that drafts have saved, less those they cost.")
        self.success = Counter(
            "octavo:request_success",
            "Requests that ended, by reason.",
            (*LABEL, "finished_reason"),
            registry=self.registry,
        )
        self.step_tokens = histogram("iteration_tokens_total", "Tokens computed in a step.", STEP_TOKENS)
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token = _Histogram(
            "octavo:inter_token_latency_seconds", "Between one token and the next.", dict.fromkeys(LABEL, model_name)
        )
        self.registry.register(self.inter_token)
        self.end_to_end = histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self.queue_time = histogram("request_queue_time_seconds", "From arrival to the first step.")
        self.prefill_time = histogram("request_prefill_time_seconds", "From the first step to the first token.")
        self.decode_time = histogram("request_decode_time_seconds", "From the first token to the end.")
        self.request_prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.request_generation = histogram("request_generation_tokens", "Tokens generated for a request.", TOKENS)

    def started(self, seconds: Mapping[str, float]) -> None:
        """The server answers: the parts of its start-up and how long each took."""
        for part, spent in seconds.items():
            self.startup.labels(part).set(spent)

    def step(self, stats: StepStats) -> None:
        """After every step."""
        self.num_running.set(stats.num_running)
        self.num_waiting.set(stats.num_waiting)
        self.kv_usage.set(1.0 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0)
        self.num_preemptions.inc(stats.num_preemptions)
        self.prompt_tokens.inc(stats.num_prompt_tokens)
        self.generation_tokens.inc(stats.num_output_tokens)
        self.prefix_queries.inc(stats.num_prefix_queries)
        self.prefix_hits.inc(stats.num_prefix_hits)
        self.num_drafts.inc(stats.num_drafts)
        self.draft_tokens.inc(stats.num_draft_tokens)
        self.accepted_tokens.inc(stats.num_accepted_tokens)
        for position, accepted in enumerate(stats.accepted_per_position):
            self.accepted_per_position.labels(self._name, position).inc(accepted)
        self.seconds_saved.inc(stats.seconds_saved)
        self._num_drafts += stats.num_drafts
        self._num_accepted += stats.num_accepted_tokens
        if stats.num_drafts:
            self.acceptance_length.set(1.0 + self._num_accepted / self._num_drafts)
        if stats.num_prompt_tokens or stats.num_output_tokens:
            self.step_tokens.observe(stats.num_prompt_tokens + stats.num_output_tokens)

    def finished(self, summary: RequestSummary) -> None:
        """Once per request."""
        self.success.labels(self._name, str(summary.finish_reason)).inc()
        self.cached_tokens.inc(summary.num_cached_tokens)
        self.request_prompt.observe(summary.num_prompt_tokens)
        self.request_generation.observe(summary.num_output_tokens)
        timing = summary.timing
        if timing is None:
            return
        self.end_to_end.observe(timing.finished - timing.arrival)
        if timing.scheduled:
            self.queue_time.observe(timing.scheduled - timing.arrival)
        if timing.first_token:
            self.prefill_time.observe(timing.first_token - timing.scheduled)
            self.decode_time.observe(timing.finished - timing.first_token)

    def watch(self, arrival: float, sink: Callable[[CompletionDelta], None]) -> Callable[[CompletionDelta], None]:
        """The sink, with the times between its tokens observed: one observation for every token after the first."""
        last: dict[int, float] = {}

        def watched(delta: CompletionDelta) -> None:
            count = len(delta.token_ids)
            if count:
                now = time.monotonic()
                before = last.get(delta.index)
                if before is not None:
                    self.inter_token.observe((now - before) / count, count)
                else:
                    if not last:
                        self.first_token.observe(now - arrival)
                    self.inter_token.observe(0.0, count - 1)
                last[delta.index] = now
            sink(delta)

        return watched

    def add(self, collectors: Iterable[Collector]) -> None:
        """Collectors of plugins."""
        for collector in collectors:
            self.registry.register(collector)

    def watch_hooks(self, seconds: Mapping[tuple[str, str], float]) -> None:
        """Show the time that plugins' hooks have taken."""
        self.registry.register(_HookSeconds(seconds))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Histogram(Collector):
    """A histogram for what happens with every token: the client library's own, which any thread may use, costs more
    than turning the token into text. All calls come from one thread."""

    def __init__(self, name: str, text: str, labels: Mapping[str, str], buckets: Sequence[float] = SECONDS) -> None:
        self._family = (name, text, labels)
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int) -> None:
        """The value, as often as ``count`` says."""
        self._counts[bisect.bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[HistogramMetricFamily]:
        name, text, labels = self._family
        family = HistogramMetricFamily(name, text, labels=tuple(labels))
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        family.add_metric(
            tuple(labels.values()), list(zip(bounds, itertools.accumulate(self._counts), strict=True)), self._sum
        )
        yield family


class _HookSeconds(Collector):
    def __init__(self, seconds: Mapping[tuple[str, str], float]) -> None:
        self._seconds = seconds

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily(
            "octavo:plugin_hook_seconds", "Time spent in plugins' hooks.", labels=("plugin", "hook")
        )
        for (plugin, hook), seconds in list(self._seconds.items()):
            family.add_metric((plugin, hook), seconds)
        yield family
