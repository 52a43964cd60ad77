"""Which contexts a row starts with."""

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ape.cache.order import cached_first

fast = settings(deadline=None, max_examples=100)
# (cached tokens, tokens) of each context
hits = st.lists(
    st.integers(1, 4).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    min_size=1,
    max_size=5,
)


def order_of(contexts: list[tuple[int, int]]) -> list[int]:
    cached, lens = zip(*contexts, strict=True)
    return cached_first(cached, lens)


def reusable_run(contexts: list[tuple[int, int]], order: tuple[int, ...]) -> int:
    """Cached tokens at the head of the row before the first token that is not."""
    total = 0
    for i in order:
        cached, length = contexts[i]
        total += cached
        if cached < length:
            break
    return total


@fast
@given(contexts=hits)
def test_the_order_is_a_permutation(contexts: list[tuple[int, int]]) -> None:
    assert sorted(order_of(contexts)) == list(range(len(contexts)))


@fast
@given(contexts=hits)
def test_no_order_reuses_more(contexts: list[tuple[int, int]]) -> None:
    best = max(reusable_run(contexts, order) for order in permutations(range(len(contexts))))
    assert reusable_run(contexts, tuple(order_of(contexts))) == best


@fast
@given(contexts=hits)
def test_contexts_of_one_kind_keep_their_order(contexts: list[tuple[int, int]]) -> None:
    order = order_of(contexts)
    whole = [i for i in order if contexts[i][0] == contexts[i][1]]
    rest = [i for i in order if i not in whole]
    assert order == whole + rest
    assert whole == sorted(whole)
    assert rest[1:] == sorted(rest[1:])


@fast
@given(contexts=hits)
def test_the_first_of_equally_long_parts_follows_the_cached_ones(
    contexts: list[tuple[int, int]],
) -> None:
    partial = [i for i, (cached, length) in enumerate(contexts) if cached < length]
    if partial:
        longest = max(contexts[i][0] for i in partial)
        first = next(i for i in partial if contexts[i][0] == longest)
        assert order_of(contexts)[len(contexts) - len(partial)] == first


@fast
@given(lens=st.lists(st.integers(1, 5), min_size=1, max_size=6), cached=st.booleans())
def test_all_or_nothing_cached_keeps_the_given_order(lens: list[int], cached: bool) -> None:
    assert cached_first(lens if cached else [0] * len(lens), lens) == list(range(len(lens)))
