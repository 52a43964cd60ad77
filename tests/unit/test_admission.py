"""An idle engine whose only waiting request has no room beside the pins does not stop for good."""

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ape.limits import around_get_new_batch_prefill_raw


class Running(SimpleNamespace):
    def is_empty(self) -> bool:
        return not self.reqs


def make_scheduler(held: bool, sent: list[Any]) -> SimpleNamespace:
    waiting = [SimpleNamespace(rid="large"), SimpleNamespace(rid="small")]
    tree = SimpleNamespace(pins=SimpleNamespace(any_held=held))
    output = SimpleNamespace(send_output=lambda refused, req: sent.append((refused, req)))
    channels = SimpleNamespace(send_to_tokenizer=output)
    return SimpleNamespace(tree_cache=tree, waiting_queue=waiting, ipc_channels=channels)


def look(scheduler: Any, running: Running) -> None:
    def no_room(_: Any, running_batch: Running) -> tuple[None, Running]:
        running_batch.batch_is_full = True
        return None, running_batch

    found = around_get_new_batch_prefill_raw(no_room, scheduler, running_batch=running)
    assert found == (None, running)


def test_a_request_without_room_is_refused_at_the_second_look() -> None:
    sent: list[Any] = []
    scheduler, running = make_scheduler(True, sent), Running(reqs=[], batch_is_full=False)
    look(scheduler, running)
    assert not running.batch_is_full and not sent and len(scheduler.waiting_queue) == 2
    look(scheduler, running)
    ((refused, req),) = sent
    assert req.rid == refused.rid == "large"
    assert refused.finished_reason["status_code"] == 400
    assert [one.rid for one in scheduler.waiting_queue] == ["small"]


def test_without_pins_it_only_waits_for_another_look() -> None:
    sent: list[Any] = []
    scheduler, running = make_scheduler(False, sent), Running(reqs=[], batch_is_full=False)
    for _ in range(3):
        look(scheduler, running)
    assert not running.batch_is_full and not sent


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_batch_that_runs_and_another_tree_are_left_alone(is_ours: bool) -> None:
    scheduler = make_scheduler(True, [])
    running = Running(reqs=["one"] if is_ours else [], batch_is_full=False)
    if not is_ours:
        del scheduler.tree_cache.pins
    look(scheduler, running)
    assert running.batch_is_full
