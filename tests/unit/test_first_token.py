"""The first-token benchmark's own parts: bodies, checks of answers, passages, the table."""

from typing import Any

import pytest

from benchmarks.first_token import (
    FORMS,
    IDS,
    SEQUENCE,
    STORE,
    TEXT,
    Answer,
    Contexts,
    Texts,
    body_of,
    check_cached,
    check_same,
    parse,
    passage,
    rows_of,
    server_flags,
    shown,
    verdicts,
)


class Words:
    """A tokenizer with an id a character, which reads "ab" as one token."""

    all_special_ids = (0,)
    vocab_size = 200

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [0] * add_special_tokens + list(map(ord, text.replace("ab", "\x01")))

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        return "".join(map(chr, ids)).replace("\x01", "ab")


CONTEXTS = Contexts([9], ["one", "two"], [[1, 2], [3]], ["ctx-1", "ctx-2"])
QUERY = [7, 8]


def test_every_form_names_the_same_tokens() -> None:
    text, ids, store, plain = (body_of(form, CONTEXTS, QUERY) for form in (*FORMS, SEQUENCE))
    assert text["contexts"] == ["one", "two"]
    assert ids["contexts"] == [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    assert store["contexts"] == [{"id": "ctx-1"}, {"id": "ctx-2"}]
    assert text["prefix_ids"] == ids["prefix_ids"] == [9]
    assert "prefix_ids" not in store
    assert text["input_ids"] == ids["input_ids"] == store["input_ids"] == QUERY
    assert plain["input_ids"] == [9, 1, 2, 3, 7, 8]
    assert "contexts" not in plain
    for body in (text, ids, store, plain):
        assert body["stream"] and body["sampling_params"]["max_new_tokens"] == 1


def test_an_order_applies_to_all_forms_of_a_context() -> None:
    swapped = CONTEXTS.ordered([1, 0])
    assert swapped == Contexts([9], ["two", "one"], [[3], [1, 2]], ["ctx-2", "ctx-1"])
    assert swapped.tokens == 3 and swapped.cached == 4


def test_a_passage_is_cut_to_its_tokens_and_goes_on_at_the_start() -> None:
    assert passage(Words(), "xyzab", start=2, tokens=3) == ("zabx", [122, 1, 120])


def test_ids_of_a_passage_are_those_of_its_text() -> None:
    class Merging(Words):
        """Reads "yz" as one token only at the end of a text."""

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            ids = super().encode(text, add_special_tokens)
            return [*ids[:-2], 2] if text.endswith("yz") else ids

    text, ids = passage(Merging(), "xyz. More of it.", start=0, tokens=3)
    assert (text, ids) == ("xyz", [120, 2])


def test_no_two_queries_begin_alike_or_with_a_special_token() -> None:
    texts = Texts(Words(), seed=1)
    heads = [texts.query()[0] for _ in range(Words.vocab_size - 1)]
    assert sorted(heads) == list(range(1, Words.vocab_size))


def test_a_seed_gives_the_same_contexts() -> None:
    first, second = (Texts(Words(), seed=1).contexts(3, 20) for _ in range(2))
    assert first == second
    assert [len(ids) for ids in first.ids] == [20] * 3


def _answer(output: int = 5, ape: dict[str, int] | None = None, **meta: int) -> Answer:
    usage = {"contexts": 2, "context_tokens": 3, "cached_context_tokens": 3} | (ape or {})
    found = {"cached_tokens": 4, "completion_tokens": 1, "prompt_tokens": 6, "ape": usage}
    return Answer(1.0, 1.0, 1.0, [output], found | meta)


def test_an_answer_with_all_contexts_cached_passes() -> None:
    check_cached(STORE, CONTEXTS, _answer())
    plain = _answer()
    del plain.meta["ape"]
    check_cached(SEQUENCE, CONTEXTS, plain)


@pytest.mark.parametrize(
    "answer",
    [
        _answer(ape={"cached_context_tokens": 2}),
        _answer(ape={"contexts": 1}),
        _answer(cached_tokens=5),  # a token of the query
        _answer(completion_tokens=2),
    ],
    ids=["context computed", "context missing", "query cached", "two tokens"],
)
def test_any_other_answer_is_refused(answer: Answer) -> None:
    with pytest.raises(RuntimeError, match="contexts by text"):
        check_cached(TEXT, CONTEXTS, answer)


def test_forms_that_answer_alike_from_the_same_row_pass() -> None:
    check_same({form: _answer(cached_tokens=5) for form in FORMS})


def test_another_output_is_refused() -> None:
    answers = {form: _answer(cached_tokens=5) for form in FORMS}
    with pytest.raises(RuntimeError, match="different tokens"):
        check_same(answers | {IDS: _answer(6, cached_tokens=5)})


def test_a_form_that_means_other_contexts_is_refused() -> None:
    answers = {form: _answer(cached_tokens=5) for form in FORMS}
    with pytest.raises(RuntimeError, match="contexts by input_ids: 4 of 6"):
        check_same(answers | {IDS: _answer(cached_tokens=4)})


def test_the_pool_holds_the_contexts_twice_and_every_query() -> None:
    flags = server_flags(CONTEXTS, queries=10)
    assert int(flags[flags.index("--max-total-tokens") + 1]) > 2 * CONTEXTS.cached + 10 * 64
    assert int(flags[flags.index("--ape-max-context-tokens") + 1]) == CONTEXTS.tokens


def test_cells_show_the_median_and_the_spread() -> None:
    assert shown([float(i) for i in range(101)]) == "50.0\n10.0-90.0"
    assert shown([1.0, 2.0, 3.456]) == "2.00\n1.00-3.46"
    assert shown([1234.4]) == "1,234\n1,234-1,234"


def _result(before: dict[str, float]) -> dict[str, Any]:
    samples = {
        form: [
            {
                "body_bytes": 1200,
                "serialise": 0.5,
                "door": 1.0,
                "before_scheduler": milliseconds,
                "first_token": 99.0,
            }
        ]
        for form, milliseconds in before.items()
    }
    return {"samples": samples, "aim_ms": 10.0}


def test_a_row_has_the_name_the_size_and_the_figures() -> None:
    (row,) = rows_of(_result({TEXT: 12.0}))
    assert row[:2] == [TEXT, "1,200"]
    assert [cell.splitlines()[0] for cell in row[2:]] == ["0.50", "12.0", "1.00", "99.0"]


def test_the_aim_is_met_up_to_and_with_its_limit() -> None:
    by_ids, by_store = verdicts(_result({TEXT: 50.0, IDS: 10.1, STORE: 10.0}))
    assert "input_ids: 10.1 ms, over" in by_ids
    assert "store id: 10.0 ms, within" in by_store


def test_what_stands_behind_the_dashes_goes_to_the_server() -> None:
    given = parse(["--model", "m", "--rounds", "3", "--", "--device", "cpu"])
    assert (given.model, given.rounds, given.server) == ("m", 3, ["--device", "cpu"])
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--contexts", "0"])
