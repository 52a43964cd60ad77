"""Random traffic on the radix tree, compared with dictionaries after each step.

    python -m tests.campaigns.tree --seed 0 --steps 100000

Requests of every kind arrive, run in chunks, finish, are aborted and retracted; KV is evicted,
pinned and flushed, in pools that are too small. After each step every slot is free, in the tree or
owned by one request, no locked node is gone, and the tree holds what the model holds; each match is
as long as it can be and returns the slots of the row's own tokens. A failure is reduced to a
minimal example, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar, TypeVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sglang.srt.runtime_context import get_parallel
from tqdm import tqdm

from tests.campaigns.tree_model import ModelHost
from tests.support.oracle import one_thread
from tests.support.tree import CONTEXTS, PREFIXES, Parts, Request, ape, plain, scoring

EXAMPLES, STEPS = 40, 150  # of one run of hypothesis, and of one example
QUERIES = [[1], [1, 2], [1, 2, 3, 1]]
CHUNKS = [0, 1, 2, 3, 5, 8, 100, 100, 100]
MAX_CONTEXTS = 4
GO_ON, FINISH = "go on", "finish"
SAMPLED = 1  # a token that has no KV yet

T = TypeVar("T")
Rule = Callable[..., None]

prefixes = st.sampled_from(PREFIXES)
context_ids = st.sampled_from(CONTEXTS) | st.lists(st.integers(1, 4), min_size=1, max_size=6)
queries = st.sampled_from(QUERIES)
keys = st.sampled_from([None, None, None, "one", "two"])
chunks = st.sampled_from(CHUNKS)
fates = st.sampled_from([GO_ON, FINISH])
logprob_starts = st.sampled_from([-1, -1, -1, -1, 0, 1, 3, 6, 9, 14])
names = st.sampled_from(["a", "b", "c"])
places = st.integers(0, 9)


@dataclass
class Tally:
    """What a campaign has done."""

    rules: Counter[str] = field(default_factory=Counter)  # steps
    events: Counter[str] = field(default_factory=Counter)
    largest_tokens: int = 0
    largest_nodes: int = 0

    @property
    def steps(self) -> int:
        return self.rules.total()

    def report(self) -> str:
        lines = [f"{self.steps:>9} steps"]
        lines += [f"{n:>13} {name}" for name, n in sorted(self.rules.items())]
        lines += [f"{n:>9} {name}" for name, n in sorted(self.events.items())]
        lines.append(f"{self.largest_tokens:>9} tokens in the largest tree")
        lines.append(f"{self.largest_nodes:>9} nodes in the largest tree")
        return "\n".join(lines)


def step(method: Rule) -> Rule:
    """A rule that is counted, and unsettled until the tree was checked after it."""

    @functools.wraps(method)
    def counted(self: TreeMachine, **arguments: Any) -> None:
        self.tally.rules[method.__name__] += 1
        self.settled = False
        method(self, **arguments)

    return counted


class TreeMachine(RuleBasedStateMachine):
    """Requests, pins and evictions against the model."""

    tally: ClassVar[Tally] = Tally()

    def __init__(self) -> None:
        super().__init__()
        self.start(48)

    @initialize(pool=st.sampled_from([48, 24, 120]))
    def start(self, pool: int) -> None:
        self.host = ModelHost(pool, self.tally.events)
        self.waiting: list[Request] = []
        self.past: list[tuple[Parts, str | None]] = []
        self.settled = True

    def submit(self, req: Request, chunk: int, then: str, logprob_start: int = -1) -> None:
        """Start a request with its first chunk; it waits at chunk 0 or where no row is free."""
        if logprob_start >= 0:
            req.return_logprob, req.logprob_start_len = True, logprob_start
        if chunk == 0 or not self.host.rows.available_size():
            self.waiting.append(req)
            return
        self.host.admit(req)
        self.host.extend(req, chunk)
        if then == FINISH and self.host.prefilled(req):
            self.host.decode(req, 1)
            self.host.finish(req)

    def running(self) -> list[Request]:
        return [req for req in self.host.active if self.host.prefilled(req)]

    def unfinished(self) -> list[Request]:
        return [req for req in self.host.active if not self.host.prefilled(req)]

    # ------------------------------------------------------------ requests arrive

    @rule(
        prefix=prefixes,
        contexts=st.lists(context_ids, min_size=1, max_size=MAX_CONTEXTS),
        query=queries,
        temperature=st.sampled_from([0.9, 0.9, 1.0]),
        scale=st.sampled_from([0.9, 0.9, 0.5]),
        extra_key=keys,
        chunk=chunks,
        then=fates,
        logprob_start=logprob_starts,
    )
    @step
    def arrive(
        self,
        prefix: list[int],
        contexts: list[list[int]],
        query: list[int],
        temperature: float,
        scale: float,
        extra_key: str | None,
        chunk: int,
        then: str,
        logprob_start: int,
    ) -> None:
        req = ape(
            *contexts,
            prefix=prefix,
            query=query,
            temperature=temperature,
            scale=scale,
            extra_key=extra_key,
        )
        assert req.parts is not None
        self.past.append((req.parts, extra_key))
        self.submit(req, chunk, then, logprob_start)

    @rule(
        prefix=prefixes,
        contexts=st.lists(context_ids, min_size=1, max_size=MAX_CONTEXTS),
        query=queries,
        extra_key=keys,
        chunk=chunks,
        then=fates,
    )
    @step
    def arrive_to_score(
        self,
        prefix: list[int],
        contexts: list[list[int]],
        query: list[int],
        extra_key: str | None,
        chunk: int,
        then: str,
    ) -> None:
        """Asks how likely a query is; where it ends at once, behind an overlapped decode step."""
        req = scoring(*contexts, prefix=prefix, query=query, extra_key=extra_key)
        self.submit(req, chunk, then, req.logprob_start_len)

    @precondition(lambda self: self.past)
    @rule(
        place=places,
        order=st.permutations(range(MAX_CONTEXTS)),
        copies=st.integers(1, 3),
        chunk=chunks,
        then=fates,
        logprob_start=logprob_starts,
    )
    @step
    def arrive_again(
        self,
        place: int,
        order: list[int],
        copies: int,
        chunk: int,
        then: str,
        logprob_start: int,
    ) -> None:
        """An earlier request with its contexts in another order, also several times at once."""
        parts, extra_key = chosen(self.past, place)
        contexts = [parts.contexts[i] for i in order if i < len(parts.contexts)]
        for _ in range(copies):
            req = ape(
                *contexts,
                prefix=parts.prefix,
                query=parts.query,
                temperature=parts.temperature,
                scale=parts.scale,
                extra_key=extra_key,
            )
            self.submit(req, chunk, then, logprob_start)

    @rule(
        prefix=prefixes,
        context=context_ids,
        query=queries,
        extra_key=keys,
        chunk=chunks,
        then=fates,
        logprob_start=logprob_starts,
    )
    @step
    def arrive_plain(
        self,
        prefix: list[int],
        context: list[int],
        query: list[int],
        extra_key: str | None,
        chunk: int,
        then: str,
        logprob_start: int,
    ) -> None:
        self.submit(plain(prefix + context + query, extra_key), chunk, then, logprob_start)

    # ------------------------------------------------------------ requests wait

    @precondition(lambda self: self.waiting)
    @rule(place=places, chunk=chunks, then=fates)
    @step
    def look_at_the_queue(self, place: int, chunk: int, then: str) -> None:
        """A policy looks at all that wait; one of them may start, or have to wait on."""
        for req in self.waiting:
            self.host.peek(req)
        req = chosen(self.waiting, place)
        if chunk == 0:
            self.host.look_and_leave(req)
            return
        self.waiting.remove(req)
        self.submit(req, chunk, then)

    @precondition(lambda self: self.waiting)
    @rule(place=places, stub=st.booleans())
    @step
    def abort_in_the_queue(self, place: int, stub: bool) -> None:
        """It is dropped, or left as a stub of one token that SGLang runs as a plain request."""
        req = chosen(self.waiting, place)
        if not stub or req.is_retracted:  # only requests that never ran become stubs
            self.waiting.remove(req)
            return
        with get_parallel().override(tp_rank=1):  # rank 0 would log an error
            req.set_finish_with_abort("aborted")
        req.parts = None

    # ------------------------------------------------------------ requests run

    @precondition(lambda self: self.unfinished())
    @rule(
        chunk=st.sampled_from(CHUNKS[1:]),
        batch=st.integers(1, 4),
        then=st.sampled_from([GO_ON, GO_ON, FINISH]),
    )
    @step
    def extend(self, chunk: int, batch: int, then: str) -> None:
        """One batch: all are computed before the tree learns of the first.

        Where they are to finish, a whole prompt does with its first token; a part is aborted.
        """
        computed = [req for req in self.unfinished()[:batch] if self.host.compute(req, chunk)]
        for req in computed:
            if then == GO_ON:
                self.host.commit(req)
            elif self.host.prefilled(req):
                req.output_ids.append(SAMPLED)
                self.host.finish(req, grouped=False)
            else:
                self.host.abort(req)

    @precondition(lambda self: self.running())
    @rule(token=st.sampled_from([1, 1, 2]))
    @step
    def decode(self, token: int) -> None:
        for req in self.running():
            self.host.decode(req, token)

    @precondition(lambda self: self.running())
    @rule(answer=st.integers(0, 2), grouped=st.booleans(), sampled=st.booleans())
    @step
    def finish(self, answer: int, grouped: bool, sampled: bool) -> None:
        """A few greedy steps of the whole batch, then it ends."""
        done = [req for req in self.running() if self.host.decode(req, *[1] * answer)]
        if grouped:
            self.host.slots.free_group_begin()
        for req in done:
            req.output_ids.extend([SAMPLED] * sampled)
            self.host.finish(req, grouped=False)
        if grouped:
            self.host.slots.free_group_end()

    @precondition(lambda self: self.host.active)
    @rule(place=places, retract=st.booleans(), sampled=st.booleans())
    @step
    def interrupt(self, place: int, retract: bool, sampled: bool) -> None:
        req = chosen(self.host.active, place)
        if self.host.prefilled(req):
            req.output_ids.extend([SAMPLED] * sampled)
        if retract:
            self.host.retract(req)
            self.waiting.append(req)
        else:
            self.host.abort(req)

    # ------------------------------------------------------------ the cache

    @precondition(lambda self: self.host.model.cached)
    @rule(tokens=st.sampled_from([1, 2, 3, 5, 8, 13, 1000]))
    @step
    def evict(self, tokens: int) -> None:
        self.host.evict(tokens)

    @precondition(lambda self: self.host.model.cached and not self.host.active)
    @rule()
    @step
    def flush(self) -> None:
        self.host.flush()

    @rule(name=names, prefix=prefixes, context=context_ids, extra_key=keys)
    @step
    def pin(self, name: str, prefix: list[int], context: list[int], extra_key: str | None) -> None:
        self.host.pin(name, prefix + context, extra_key)

    @precondition(lambda self: self.past)
    @rule(name=names, place=places, which=st.integers(0, MAX_CONTEXTS - 1))
    @step
    def pin_a_context(self, name: str, place: int, which: int) -> None:
        """One that a request had."""
        parts, extra_key = chosen(self.past, place)
        self.host.pin(name, parts.prefix + chosen(parts.contexts, which), extra_key)

    @precondition(lambda self: self.host.model.pins)
    @rule(name=names)
    @step
    def unpin(self, name: str) -> None:
        self.host.unpin(name)

    @precondition(lambda self: self.host.model.cached)
    @rule(prefix=prefixes, context=context_ids, extra_key=keys, touch=st.booleans())
    @step
    def look_up(
        self, prefix: list[int], context: list[int], extra_key: str | None, touch: bool
    ) -> None:
        self.host.look_up(prefix + context, extra_key)
        if touch:
            self.host.touch(prefix + context, extra_key)

    # ------------------------------------------------------------ checks

    @invariant()
    def everything_adds_up(self) -> None:
        self.host.check()
        self.tally.largest_tokens = max(self.tally.largest_tokens, len(self.host.model.cached))
        self.tally.largest_nodes = max(self.tally.largest_nodes, len(self.host.nodes()))
        self.settled = True

    def teardown(self) -> None:
        """Nothing stays locked; not asked where a step has failed, whose error would be hidden."""
        if not self.settled:
            return
        for name in list(self.host.model.pins):
            self.host.unpin(name)
        for req in list(self.host.active):
            self.host.abort(req)
        self.host.check()
        self.host.assert_everything_can_be_evicted()


def chosen(given: Sequence[T], place: int) -> T:
    return given[place % len(given)]


@one_thread()
def run(
    first_seed: int,
    steps: int,
    examples: int = EXAMPLES,
    shrink: bool = True,
    on_progress: Callable[[int], object] = lambda steps: None,
) -> Tally:
    """Run examples until so many steps were made.

    Raises:
        AssertionError, or whatever the tree raises: with the minimal example in its notes.
    """
    TreeMachine.tally = Tally()
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    own = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        phases=phases,
        deadline=None,
        database=None,
        derandomize=False,  # as a hypothesis profile for CI would have it: the seed counts
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    for part in count():
        if TreeMachine.tally.steps >= steps:
            break
        run_state_machine_as_test(seed(f"{first_seed}/{part}")(TreeMachine), settings=own)
        on_progress(TreeMachine.tally.steps)
    return TreeMachine.tally


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.tree",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100_000)
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    with tqdm(total=given.steps, unit="step", mininterval=5) as bar:

        def show(steps: int) -> None:
            bar.update(min(steps, given.steps) - bar.n)

        try:
            tally = run(given.seed, given.steps, on_progress=show)
        except Exception:
            traceback.print_exc()
            print(f"FAILED with --seed {given.seed} after {TreeMachine.tally.steps} steps")
            return 1
    print(f"seed {given.seed}")
    print(tally.report())
    print(f"{time.monotonic() - begun:>9.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
