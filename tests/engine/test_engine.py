"""The offline Engine, with APE and without, and what must not change for plain requests."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sglang

from sglang_ape import ContextStore
from tests.support.oracle import Oracle

SAMPLING = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def _engine(model: Path, **kwargs: Any) -> sglang.Engine:
    return sglang.Engine(
        model_path=str(model),
        device="cpu",
        dtype="float32",
        random_seed=1,
        max_total_tokens=4096,
        log_level="warning",
        **kwargs,
    )


def _plain_prompts() -> list[list[int]]:
    rng = random.Random(3)
    shared = [rng.randrange(4, 512) for _ in range(40)]
    return [shared + [rng.randrange(4, 512) for _ in range(n)] for n in (1, 30, 7, 200, 3)]


def _plain_answers(engine: sglang.Engine) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of plain requests, one by one and as a batch."""
    prompts = _plain_prompts()
    answers = [
        engine.generate(input_ids=ids, sampling_params=SAMPLING, return_logprob=True)
        for ids in prompts
    ]
    answers += engine.generate(input_ids=prompts, sampling_params=SAMPLING, return_logprob=True)
    return [
        (answer["output_ids"], [row[0] for row in answer["meta_info"]["output_token_logprobs"]])
        for answer in answers
    ]


class Choice(NamedTuple):
    """A request that takes three of four documents, in an order of its own."""

    contexts: list[list[int]]
    query: list[int]


CHOICE_PREFIX = list(range(20, 32))


def _choices() -> list[Choice]:
    rng = random.Random(4)
    documents = [[rng.randrange(4, 512) for _ in range(n)] for n in (60, 45, 80, 52)]
    return [
        Choice(rng.sample(documents, 3), [rng.randrange(4, 512) for _ in range(9)])
        for _ in range(16)
    ]


def _cached_share(engine: sglang.Engine, apes: bool) -> float:
    """Share of context tokens from the cache, once every document has been seen."""
    cached = total = 0
    seen: set[tuple[int, ...]] = set()
    for contexts, query in _choices():
        size = sum(map(len, contexts))
        if apes:
            parts: dict[str, Any] = {
                "input_ids": query,
                "prefix_ids": CHOICE_PREFIX,
                "contexts": [{"input_ids": ids} for ids in contexts],
            }
        else:
            parts = {"input_ids": [*CHOICE_PREFIX, *(i for ids in contexts for i in ids), *query]}
        meta = engine.generate(**parts, sampling_params=SAMPLING)["meta_info"]
        if seen.issuperset(map(tuple, contexts)):
            cached += min(max(meta["cached_tokens"] - len(CHOICE_PREFIX), 0), size)
            total += size
        seen.update(map(tuple, contexts))
    return cached / total


class Stock(NamedTuple):
    """What an engine without APE does."""

    answers: list[tuple[list[int], list[float]]]
    cached_share: float


@pytest.fixture(scope="module")
def stock(tiny_llama: Path) -> Stock:
    """Ask an engine without APE, which must refuse contexts."""
    engine = _engine(tiny_llama)
    try:
        with pytest.raises(ValueError, match="enable_ape=True"):
            engine.generate(prompt="q", contexts=["a", "b"])
        return Stock(_plain_answers(engine), _cached_share(engine, apes=False))
    finally:
        engine.shutdown()


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, stock: Stock) -> Iterator[sglang.Engine]:
    engine = _engine(tiny_llama, enable_ape=True, ape_temperature=0.7, ape_scale=0.8)
    yield engine
    engine.shutdown()


def test_plain_requests_get_exactly_what_stock_sglang_answers(
    engine: sglang.Engine, stock: Stock
) -> None:
    assert _plain_answers(engine) == stock.answers


def test_any_choice_of_seen_documents_in_any_order_is_cached(
    engine: sglang.Engine, stock: Stock, capsys: pytest.CaptureFixture[str]
) -> None:
    share = _cached_share(engine, apes=True)
    with capsys.disabled():
        print(
            f"\ncontext tokens from the cache, 3 of 4 documents in random order: "
            f"APE {share:.1%}, stock SGLang {stock.cached_share:.1%}"
        )
    assert share == 1.0
    assert stock.cached_share < 1.0


def test_generate_takes_contexts_by_ids(engine: sglang.Engine, tiny_llama: Path) -> None:
    prefix, contexts, query = [9, 8, 7], [[5, 6, 7, 8], [40, 41], [77] * 9], [11, 12]
    answer = engine.generate(
        input_ids=query,
        prefix_ids=prefix,
        contexts=[{"input_ids": ids} for ids in contexts],
        sampling_params=SAMPLING,
    )
    expected = Oracle(tiny_llama).generate(prefix, contexts, query, 8, 0.7, 0.8)
    assert answer["output_ids"] == expected.token_ids


def test_async_generate_and_streams_give_the_same_answer(engine: sglang.Engine) -> None:
    call: dict[str, Any] = dict(
        prompt="Who?",
        prefix="Documents: ",
        contexts=["The baker.", "The gardener planted beans."],
        ape={"temperature": 0.9, "scale": 0.9},
        sampling_params=SAMPLING,
    )
    whole = engine.generate(**call)["text"]
    assert list(engine.generate(**call, stream=True))[-1]["text"] == whole

    async def ask() -> tuple[str, str]:
        answer = await engine.async_generate(**call)
        streamed = ""
        async for chunk in await engine.async_generate(**call, stream=True):
            streamed = chunk["text"]
        return answer["text"], streamed

    assert engine.loop.run_until_complete(ask()) == (whole, whole)


def test_two_calls_at_once_keep_their_own_contexts(engine: sglang.Engine) -> None:
    def call(context: str) -> dict[str, Any]:
        return dict(prompt="Who?", contexts=[context, "Snow."], sampling_params=SAMPLING)

    async def both() -> list[Any]:
        calls = [engine.async_generate(**call(text)) for text in ("The baker.", "A train.")]
        plain = engine.async_generate(prompt="Who?", sampling_params=SAMPLING)
        return await asyncio.gather(*calls, plain)

    together = [answer["text"] for answer in engine.loop.run_until_complete(both())]
    alone = [engine.generate(**call(text))["text"] for text in ("The baker.", "A train.")]
    alone.append(engine.generate(prompt="Who?", sampling_params=SAMPLING)["text"])
    assert together == alone


def test_contexts_registered_in_the_process_stand_for_their_texts(engine: sglang.Engine) -> None:
    texts = ["The harbour is closed.", "The gardener planted lettuce."]
    call: dict[str, Any] = dict(prompt="Who?", sampling_params=SAMPLING)
    store = ContextStore(engine)
    found = store.register(texts, prefix="Documents: ")
    ids = [{"id": context["id"]} for context in found]
    assert [{"id": context["id"]} for context in store.contexts()] == ids
    by_id = engine.generate(**call, contexts=ids)
    by_text = engine.generate(**call, contexts=texts, prefix="Documents: ")
    assert by_id["output_ids"] == by_text["output_ids"]
    tokens = sum(context["tokens"] for context in found)
    assert by_id["meta_info"]["ape"]["cached_context_tokens"] == tokens
    for context in found:
        store.forget(context["id"])
    assert list(store.contexts()) == []
    with pytest.raises(ValueError, match=r"contexts\[0\].id: no context is known"):
        engine.generate(**call, contexts=ids)


def test_errors_name_the_field(engine: sglang.Engine) -> None:
    with pytest.raises(ValueError, match=r"contexts\[1\] must not be empty"):
        engine.generate(prompt="q", contexts=["a", ""])
    with pytest.raises(ValueError, match="prompt must not be empty"):
        engine.generate(prompt="", contexts=["a"])


def test_nothing_is_left_locked(engine: sglang.Engine) -> None:
    loads = engine.loop.run_until_complete(engine.tokenizer_manager.get_loads())
    assert loads[0].num_used_tokens == 0
