"""The fairness benchmark's own parts: what is asked, and which short requests met a long one."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.common.client import Body, Client, Timed
from benchmarks.common.controls import ControlError
from benchmarks.common.fresh import FreshIds
from benchmarks.common.pairs import Kind
from benchmarks.fairness import ALONE, BESIDE, ask, long_prompt, measure_server, parse, rows_of

VOCAB = 4000
SMALL = ["--contexts", "3", "--context-tokens", "5", "--prefix", "2", "--short", "4"]


def timed(sent: float, first: float, last: float) -> Timed:
    return Timed(first, last, {"cached_tokens": 0}, sent)


class Server(Client):
    """Answers one request a second of its own time, none beside another."""

    def __init__(self, cached: int = 0) -> None:
        self.bodies: list[Body] = []
        self._cached = cached
        self._clock = 0.0
        self._lock = threading.Lock()

    def stream(self, bodies: Sequence[Body], *_: Any, **__: Any) -> list[Timed]:
        (body,) = bodies
        with self._lock:
            self.bodies.append(body)
            sent = self._clock
            self._clock += 1.0
        time.sleep(0.01)
        return [Timed(0.5, 0.9, {"cached_tokens": self._cached}, sent)]


def test_short_requests_are_told_apart_by_whether_they_met_a_long_one() -> None:
    longs = [timed(10, 5, 5), timed(30, 7, 7)]
    shorts = [
        timed(8, 0.5, 1.5),  # ends before
        timed(9.5, 0.2, 1),  # reaches into the first
        timed(11, 4.0, 4.5),
        timed(15.1, 0.25, 0.5),  # begins after its end
        timed(29, 8, 9),  # around the whole second
    ]
    alone, beside = rows_of(Kind.APE, shorts, longs)
    assert (alone["phase"], alone["requests"]) == (ALONE, 2)
    assert (beside["phase"], beside["requests"]) == (BESIDE, 3)
    assert alone["last_token_all"] == [1.5, 0.5]
    assert (beside["first_token"], beside["first_token_longest"]) == (4.0, 8)
    assert (beside["last_token"], beside["last_token_longest"]) == (4.5, 9)
    assert beside["long_first_token"] == 6
    assert "long_first_token" not in alone


@pytest.mark.parametrize("sent", [0.0, 10.5])
def test_one_sort_of_short_requests_alone_says_nothing(sent: float) -> None:
    with pytest.raises(ControlError, match="of 1 short requests"):
        rows_of(Kind.STOCK, [timed(sent, 0.1, 0.2)], [timed(10, 1, 1)])


def test_a_request_of_which_something_was_cached_ends_the_benchmark() -> None:
    args, _ = parse(SMALL)
    with pytest.raises(ControlError, match="7 tokens"):
        ask(Server(cached=7), Kind.APE, long_prompt(FreshIds(VOCAB, 0), args, 3), 1)


def test_both_servers_are_asked_the_same_tokens() -> None:
    args, _ = parse([*SMALL, "--repeats", "2", "--seconds-alone", "1"])
    longs = {}
    for kind in Kind:
        server = Server()
        with pytest.raises(ControlError):
            measure_server(kind, server, VOCAB, args)
        longs[kind] = [body for body in server.bodies if body["sampling_params"] == LONG]
        shorts = [body for body in server.bodies if body["sampling_params"] != LONG]
        assert {len(body["input_ids"]) for body in shorts} == {args.short}
        assert len({body["input_ids"][0] for body in shorts}) == len(shorts)
    assert [len(bodies) for bodies in longs.values()] == [3, 3]
    for stock, ape in zip(longs[Kind.STOCK], longs[Kind.APE], strict=True):
        contexts = [token for context in ape["contexts"] for token in context["input_ids"]]
        assert stock["input_ids"] == ape["prefix_ids"] + contexts + ape["input_ids"]


LONG = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}


def test_the_usual_long_request_has_128k_tokens_of_contexts() -> None:
    args, _ = parse([])
    assert args.contexts * args.context_tokens == 131072


@pytest.mark.parametrize("flag", ["--contexts", "--repeats", "--short"])
def test_numbers_that_are_not_positive_are_refused(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([flag, "0"])
    assert "positive" in capsys.readouterr().err
