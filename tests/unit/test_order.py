"""Which contexts a row starts with."""

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ape.cache.order import cached_first

fast = settings(deadline=None, max_examples=100)
# (cached tokens, tokens, age) of each context
hits = st.lists(
    st.integers(1, 4).flatmap(
        lambda n: st.tuples(st.integers(0, n), st.just(n), st.integers(0, 9))
    ),
    min_size=1,
    max_size=5,
)
Contexts = list[tuple[int, int, int]]


def order_of(contexts: Contexts) -> list[int]:
    cached, lens, ages = zip(*contexts, strict=True)
    return cached_first(cached, lens, ages)


def reusable_run(contexts: Contexts, order: tuple[int, ...]) -> int:
    """Cached tokens at the head of the row before the first token that is not."""
    total = 0
    for i in order:
        cached, length, _ = contexts[i]
        total += cached
        if cached < length:
            break
    return total


@fast
@given(contexts=hits)
def test_the_order_is_a_permutation(contexts: Contexts) -> None:
    assert sorted(order_of(contexts)) == list(range(len(contexts)))


@fast
@given(contexts=hits)
def test_no_order_reuses_more(contexts: Contexts) -> None:
    best = max(reusable_run(contexts, order) for order in permutations(range(len(contexts))))
    assert reusable_run(contexts, tuple(order_of(contexts))) == best


@fast
@given(contexts=hits)
def test_cached_contexts_stand_by_age_and_others_as_given(contexts: Contexts) -> None:
    order = order_of(contexts)
    whole = [i for i in order if contexts[i][0] == contexts[i][1]]
    rest = [i for i in order if i not in whole]
    assert order == whole + rest
    assert whole == sorted(whole, key=lambda i: (contexts[i][2], i))
    assert rest[1:] == sorted(rest[1:])


@fast
@given(contexts=hits)
def test_the_first_of_equally_long_parts_follows_the_cached_ones(
    contexts: Contexts,
) -> None:
    partial = [i for i, (cached, length, _) in enumerate(contexts) if cached < length]
    if partial:
        longest = max(contexts[i][0] for i in partial)
        first = next(i for i in partial if contexts[i][0] == longest)
        assert order_of(contexts)[len(contexts) - len(partial)] == first


@fast
@given(contexts=hits)
def test_the_given_order_of_cached_contexts_does_not_matter(contexts: Contexts) -> None:
    def row(given: Contexts) -> Contexts:
        return [given[i] for i in order_of(given) if given[i][0] == given[i][1]]

    distinct = [(cached, length, age) for age, (cached, length, _) in enumerate(contexts)]
    assert row(distinct) == row(distinct[::-1])


@fast
@given(lens=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_with_nothing_cached_the_order_stays(lens: list[int]) -> None:
    assert cached_first([0] * len(lens), lens, [0] * len(lens)) == list(range(len(lens)))
