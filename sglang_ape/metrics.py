"""Prometheus metrics, in the registry that SGLang serves at ``/metrics``.

The client is imported late: SGLang sets the folder that processes share their values in first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_CONTEXTS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Usage(NamedTuple):
    """What one request or registration had of contexts."""

    contexts: int
    tokens: int  # of the contexts
    cached_tokens: int  # those of them that were not computed
    scored_tokens: int = 0  # of copies of the query, computed to score contexts
    refined_tokens: int = 0  # of refined contexts, computed in sequence

    def to_dict(self) -> dict[str, int]:
        """As it stands in answers."""
        return {
            "contexts": self.contexts,
            "context_tokens": self.tokens,
            "cached_context_tokens": self.cached_tokens,
            "scored_tokens": self.scored_tokens,
            "refined_tokens": self.refined_tokens,
        }


class RequestUsage(NamedTuple):
    """What one request had, of its contexts and in all."""

    contexts: Usage
    cached_tokens: int  # of the whole row
    scores: tuple[dict[str, Any], ...] = ()  # "id" and "score" of each context, if they were scored


class EntryMetrics:
    """What the main process counts.

    Args:
        labels: names and values on every metric, as on SGLang's own.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        names = list(labels)

        def gauge(name: str, help: str) -> Any:
            return Gauge(name, help, names, multiprocess_mode="mostrecent").labels(**labels)

        self._requests = Counter(
            "sglang:ape_requests_total", "Requests with contexts that were answered.", names
        ).labels(**labels)
        self._contexts = Histogram(
            "sglang:ape_contexts_per_request",
            "Contexts of one request.",
            names,
            buckets=_CONTEXTS_BUCKETS,
        ).labels(**labels)
        tokens = Counter(
            "sglang:ape_context_tokens_total",
            "Context tokens of requests and registrations, by whether they were computed.",
            [*names, "by", "source"],
        )
        self._tokens = {
            (by, source): tokens.labels(**labels, by=by, source=source)
            for by in ("request", "registration")
            for source in ("cache", "computed")
        }
        spent = Counter(
            "sglang:ape_ladder_tokens_total",
            "Tokens computed beyond contexts and query, to score contexts and to refine them.",
            [*names, "rung"],
        )
        self._spent = {rung: spent.labels(**labels, rung=rung) for rung in ("score", "refine")}
        self._store_contexts = gauge("sglang:ape_store_contexts", "Contexts known by id.")
        self._store_tokens = gauge("sglang:ape_store_tokens", "Tokens that the store knows.")
        self._pinned_tokens = gauge("sglang:ape_pinned_tokens", "Tokens reserved by pins.")

    def observe_request(self, usage: Usage) -> None:
        self._requests.inc()
        self._contexts.observe(usage.contexts)
        self._count("request", usage)
        self._spent["score"].inc(usage.scored_tokens)
        self._spent["refine"].inc(usage.refined_tokens)

    def observe_registration(self, usage: Usage) -> None:
        self._count("registration", usage)

    def observe_store(self, contexts: int, tokens: int, pinned_tokens: int) -> None:
        self._store_contexts.set(contexts)
        self._store_tokens.set(tokens)
        self._pinned_tokens.set(pinned_tokens)

    def _count(self, by: str, usage: Usage) -> None:
        self._tokens[by, "cache"].inc(usage.cached_tokens)
        self._tokens[by, "computed"].inc(usage.tokens - usage.cached_tokens)


def entry_metrics(manager: Any) -> EntryMetrics | None:
    """The metrics of a ``TokenizerManager``, None where SGLang's own are off."""
    if not manager.enable_metrics:
        return None
    return EntryMetrics(_labels(manager.server_args))


def context_evictions(ctx: Any) -> Any:
    """The counter of contexts that were evicted, for a scheduler's tree.

    Args:
        ctx: ``TreeCacheBuildContext`` (``mem_cache/registry.py``).
    """
    from prometheus_client import Counter

    labels = _labels(ctx.server_args)
    counter = Counter(
        "sglang:ape_evicted_contexts_total",
        "Contexts that lost their KV, or its end, to make room for others.",
        list(labels),
    )
    return counter.labels(**labels)


def decode_steps(args: Any) -> dict[str, Any]:
    """Counters of decode steps of batches with contexts, by how these were read.

    Args:
        args: SGLang's ``ServerArgs``.
    """
    from prometheus_client import Counter

    labels = _labels(args)
    counter = Counter(
        "sglang:ape_decode_steps_total",
        "Decode steps of batches with contexts, by whether requests shared their reading.",
        [*labels, "reads"],
    )
    return {reads: counter.labels(**labels, reads=reads) for reads in ("apart", "shared")}


def _labels(args: Any) -> dict[str, str]:
    return {"model_name": args.served_model_name, **(args.extra_metric_labels or {})}
