"""What the scheduler refuses: requests that pins keep out, a bias that no kernel serves."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ape.attention.batch import set_serves_bias
from sglang_ape.limits import around_get_new_batch_prefill_raw, around_validate_input_length
from sglang_ape.spec import ApeSpec


class Running(SimpleNamespace):
    def is_empty(self) -> bool:
        return not self.reqs


def make_scheduler(held: bool, sent: list[Any]) -> SimpleNamespace:
    waiting = [SimpleNamespace(rid="large"), SimpleNamespace(rid="small")]
    tree = SimpleNamespace(pins=SimpleNamespace(any_held=held, any_put_off=False))
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


class PutOff:
    """Pins for which there is room at the second look."""

    looks = 0

    @property
    def any_put_off(self) -> bool:
        return self.looks < 2

    def lock_put_off(self) -> None:
        self.looks += 1


@pytest.mark.parametrize("in_chunks", [True, False])
def test_while_pins_are_put_off_a_prompt_in_chunks_is_the_only_one(in_chunks: bool) -> None:
    scheduler = make_scheduler(True, [])
    scheduler.tree_cache.pins = PutOff()
    scheduler.chunked_req = "long" if in_chunks else None
    waiting = list(scheduler.waiting_queue)
    seen: list[list[Any]] = []

    def schedule(scheduler: Any) -> tuple[str, Running]:
        seen.append(list(scheduler.waiting_queue))
        scheduler.waiting_queue = [*scheduler.waiting_queue, "preempted"]
        return "batch", Running(reqs=["one"], batch_is_full=False)

    around_get_new_batch_prefill_raw(schedule, scheduler)
    assert scheduler.waiting_queue == [*waiting, "preempted"]
    around_get_new_batch_prefill_raw(schedule, scheduler)
    assert seen == [[] if in_chunks else waiting, [*waiting, "preempted"]]


@pytest.fixture
def without_bias() -> Iterator[None]:
    set_serves_bias(False)
    yield
    set_serves_bias(True)


def validate(bias: tuple[float, ...]) -> str | None:
    spec = ApeSpec(1, (2, 2), 0.9, 0.9, "set", bias)
    req = SimpleNamespace(ape_spec=spec, origin_input_ids=[0] * 7)
    return around_validate_input_length(lambda *_: None, req, 100, False)


def test_a_bias_that_no_kernel_serves_is_refused(without_bias: None) -> None:
    refused = validate((0.0, -1.0))
    assert refused is not None and refused.startswith("ape.soft")
    assert validate(()) is None


def test_a_bias_is_served_otherwise() -> None:
    assert validate((0.0, -1.0)) is None
