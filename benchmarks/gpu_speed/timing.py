"""Statistics of samples, and decode steps out of token arrivals."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

MANY = 10  # from as many samples on, the spread is shown as 10th to 90th percentile


class Summary(NamedTuple):
    """The median of samples and their spread: extremes of a few, 10th-90th percentile of many."""

    median: float
    low: float
    high: float
    samples: int


def summarise(samples: Sequence[float]) -> Summary:
    """Raises statistics.StatisticsError without samples."""
    median = statistics.median(samples)
    if len(samples) < MANY:
        return Summary(median, min(samples), max(samples), len(samples))
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Summary(median, deciles[0], deciles[-1], len(samples))


class Stream(NamedTuple):
    """When the tokens of one streamed request arrived."""

    sent: float
    arrivals: list[tuple[float, int]]  # (time, tokens so far), one a chunk
    cached_tokens: int

    @property
    def first(self) -> float:
        return self.arrivals[0][0]

    @property
    def last(self) -> float:
        return self.arrivals[-1][0]


def token_intervals(stream: Stream, start: float, stop: float) -> list[float]:
    """Seconds a token between successive arrivals within [start, stop].

    A chunk of n tokens, which the client sees when it was busy, counts as n equal intervals.
    """
    inside = [arrival for arrival in stream.arrivals if start <= arrival[0] <= stop]
    intervals = []
    for (before, had), (after, has) in itertools.pairwise(inside):
        intervals += [(after - before) / (has - had)] * (has - had)
    return intervals


def common_decode_intervals(streams: Sequence[Stream]) -> list[float]:
    """The intervals of all requests while every one of them was decoding.

    That is from the last request's first token to the first request's last; empty if one had
    finished before another began.
    """
    start = max(stream.first for stream in streams)
    stop = min(stream.last for stream in streams)
    return [interval for stream in streams for interval in token_intervals(stream, start, stop)]


def all_intervals(streams: Sequence[Stream]) -> list[float]:
    """The intervals of every request over its whole life."""
    return [
        interval
        for stream in streams
        for interval in token_intervals(stream, stream.first, stream.last)
    ]


def span(streams: Sequence[Stream]) -> float:
    """Seconds from the first request sent to the last token."""
    return max(stream.last for stream in streams) - min(stream.sent for stream in streams)
