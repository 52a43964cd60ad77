"""What is measured on a running engine.

Everywhere, L counts the tokens of all contexts, to which the prefix of 64 tokens comes; APE takes
them as contexts of 1K, a stock engine as one sequence P + contexts. Times include all that the
client's process does for the request. Cached and cold prompts are checked by the engine's own
count of cached tokens, and a surprise becomes a warning in the record.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence

from benchmarks.gpu_speed.client import NO_RUNG, Client, Rung
from benchmarks.gpu_speed.record import Record
from benchmarks.gpu_speed.scale import Overlap, Scale
from benchmarks.gpu_speed.texts import Documents, Prompt, Texts
from benchmarks.gpu_speed.timing import (
    all_intervals,
    common_decode_intervals,
    span,
    summarise,
)
from sglang_ape.scoring.probe import NULL_TEXT, null_query

TTFT_WARM_UP = 2  # dropped repeats
PLAIN_WARM_UP = 2
ENOUGH_STEPS = 0.25  # of the decode steps must fall where the whole batch decodes


class Sections:
    """The sections of one run; every one can be run by itself and in any order."""

    def __init__(
        self,
        client: Client,
        record: Record,
        scale: Scale,
        seed: int,
        skip_largest_batch: bool,
        by_attention: bool = False,
    ) -> None:
        self._client = client
        self._record = record
        self._scale = scale
        self._texts = Texts(scale.shape.vocab, seed)
        self._skip_largest_batch = skip_largest_batch
        self._by_attention = by_attention  # contexts are scored
        self._documents: dict[int, Documents] = {}  # by length; the ones that stay cached
        self._cached: set[int] = set()

    def warm_up(self) -> None:
        """Prompts of both kinds, so that no start-up work counts as theirs; nothing is recorded."""
        documents = self._fresh(self._scale.warm_up)
        self._client.first_token(self._ask(documents))
        self._client.first_token(self._texts.plain(self._scale.warm_up))
        prompts = [self._ask(documents), self._texts.plain(self._scale.query)]
        self._client.stream(prompts, [8] * len(prompts))

    def plain(self) -> None:
        """Ordinary prompts, which an APE engine must serve as fast as a stock one.

        Cold prefill (one token asked for), decode steps of a batch, and a mixed load: total time,
        time to the first token of each request and the time between tokens.
        """
        for length, repeats in self._scale.plain_prefill.items():
            self._flush()
            for repeat in range(PLAIN_WARM_UP + repeats):
                answer = self._client.first_token(self._texts.plain(length))
                if repeat >= PLAIN_WARM_UP:
                    self._record.add(f"plain/prefill/{length}", [answer.seconds])
            self._say(f"plain/prefill/{length}")
        for batch in self._scale.plain_batches:
            self._flush()
            for _ in range(self._scale.decode_repeats):
                prompts = [self._texts.plain(self._scale.plain_decode_prompt) for _ in range(batch)]
                self._decode(f"plain/decode/{batch}", prompts)
        for _ in range(self._scale.mixed.repeats):
            self._flush()
            self._mixed_load()

    def cold(self) -> None:
        """Time to the first token of contexts and query with an empty cache.

        The last repeat of each length is the one that fills the cache for later sections.
        """
        for length, repeats in self._scale.cold.items():
            for _ in range(repeats - 1):
                self._flush()
                self._prefill_cold(length, self._fresh(length))
        self._flush()
        for length in self._scale.cold:
            self._ensure_cached(length)

    def ttft(self) -> None:
        """Time to the first token with all but a fresh query cached.

        APE: the contexts in a new random order each time. Stock: the same sequence each time, an
        exact hit.
        """
        for length, repeats in self._scale.ttft.items():
            documents = self._ensure_cached(length)
            for repeat in range(TTFT_WARM_UP + repeats):
                answer = self._client.first_token(self._ask(documents))
                self._check_hit(f"ttft/{length}", answer.cached_tokens, documents)
                if repeat >= TTFT_WARM_UP:
                    self._record.add(f"ttft/{length}", [answer.seconds])
            self._say(f"ttft/{length}")

    def decode(self) -> None:
        """The time between tokens while a whole batch decodes, all but its queries cached.

        The requests of a batch have the same documents (APE: each in an order of its own) and a
        query each.
        """
        for length, batch in self._scale.decode:
            documents = self._ensure_cached(length)
            for _ in range(self._scale.decode_repeats):
                prompts = [self._ask(documents) for _ in range(batch)]
                self._decode(f"decode/{length}x{batch}", prompts, documents)

    def overlap(self) -> None:
        """The time between tokens of batches whose requests have some of a set of contexts.

        APE only: to a stock engine, each choice and order of contexts is a prompt of its own.
        """
        if not self._client.parallel:
            return
        for case in self._scale.overlap:
            documents = self._ensure_cached(case.contexts * self._scale.context)
            for _ in range(self._scale.decode_repeats):
                prompts = [self._some(documents, case, i) for i in range(case.batch)]
                self._decode(case.name, prompts, self._some(documents, case, 0).documents)

    def ladder(self) -> None:
        """What soft and refine cost over cached contexts; APE only.

        Time to the first token of a fresh query, so that no score is known: without a rung, with
        soft and with refine, in turn. Beside it a plain prompt that prefills as many tokens as the
        refined contexts have, behind the cached P. Then the time between tokens with and without
        soft; there the queries' scores are known before, so that a batch decodes together.
        """
        if not self._client.parallel:
            return
        ladder = self._scale.ladder
        documents = self._ensure_cached(ladder.contexts * self._scale.context)
        rungs: dict[str, Rung] = {
            "warm": NO_RUNG,
            "soft": {"soft": ladder.soft},
            "refine": {"refine": ladder.refine},
        }
        for repeat in range(TTFT_WARM_UP + ladder.repeats):
            for name, rung in rungs.items():
                self._rung(f"ladder/ttft/{name}", rung, documents, repeat >= TTFT_WARM_UP)
            more = self._texts.ids(ladder.refine * self._scale.context + ladder.query)
            plain = Prompt(Documents([], []), [*documents.prefix, *more])
            answer = self._client.first_token(plain)
            if repeat >= TTFT_WARM_UP:
                self._check_miss("ladder/prefill", answer.cached_tokens, len(documents.prefix))
                self._record.add("ladder/prefill", [answer.seconds])
        for figure in (*(f"ladder/ttft/{name}" for name in rungs), "ladder/prefill"):
            if figure in self._record.content["samples"]:
                self._say(figure)
        for batch in ladder.batches:
            for _ in range(self._scale.decode_repeats):
                self._decode_ladder(batch, documents)

    def _rung(self, figure: str, rung: Rung, documents: Documents, is_timed: bool) -> None:
        ladder = self._scale.ladder
        answer = self._client.first_token(self._ask(documents, ladder.query), rung)
        expected = self._scored_tokens() if rung else 0
        if answer.scored_tokens != expected:
            self._record.warn(f"{figure}: {answer.scored_tokens} tokens scored, not {expected}")
        if rung and len(set(answer.scores)) < 2:
            self._record.warn(f"{figure}: all contexts have one score, there is nothing to bias")
        if "refine" not in rung:
            self._check_hit(figure, answer.cached_tokens, documents)
        elif not 0 < answer.refined_tokens <= ladder.refine * self._scale.context:
            self._record.warn(f"{figure}: {answer.refined_tokens} tokens of contexts computed")
            return  # the same contexts were chosen in the same order before: a hit is no sample
        if is_timed:
            self._record.add(figure, [answer.seconds])

    def _scored_tokens(self) -> int:
        ladder = self._scale.ladder
        if self._by_attention:  # the tokenizer knows bytes alone
            query = array("q", range(ladder.query))
            return len(query) + len(null_query(array("q", map(ord, NULL_TEXT)), query))
        # A copy of the query begins with the last token of its context.
        return ladder.contexts * (ladder.query + 1)

    def _decode_ladder(self, batch: int, documents: Documents) -> None:
        soft: Rung = {"soft": self._scale.ladder.soft}
        prompts = [self._ask(documents, self._scale.ladder.query) for _ in range(batch)]
        for prompt in prompts:
            self._client.first_token(prompt, soft)
        for name, rung in (("warm", NO_RUNG), ("soft", soft)):
            self._decode(f"ladder/decode/{batch}/{name}", prompts, documents, rung)

    def e2e(self) -> None:
        """A short question and a long answer, from sending to the last token of the batch.

        APE: the contexts were encoded ahead (recorded as ``encoding``, in no total); each request
        has its own order. Stock: nothing cached, each request has the contexts in its own order.
        """
        largest = max(self._scale.e2e_batches)
        for batch, repeats in self._scale.e2e_batches.items():
            if batch == largest and self._skip_largest_batch:
                continue
            for _ in range(repeats if self._client.parallel else 1):
                self._end_to_end(batch)
            self._say(f"e2e/{batch}")

    def _end_to_end(self, batch: int) -> None:
        length = self._scale.e2e_length
        if self._client.parallel:
            documents = self._cached_for_e2e(length)
        else:
            self._flush()
            documents = self._fresh(length)
        prompts = [
            Prompt(order, self._texts.ids(self._scale.e2e_query))
            for order in self._texts.different_orders(documents, batch)
        ]
        streams = self._client.stream(prompts, [self._scale.e2e_tokens] * batch)
        for stream in streams:
            if self._client.parallel:
                self._check_hit(f"e2e/{batch}", stream.cached_tokens, documents)
            else:
                self._check_miss(f"e2e/{batch}", stream.cached_tokens, self._scale.prefix)
        self._record.add(f"e2e/{batch}", [span(streams)])
        self._record.add(f"e2e/{batch}/ttft", [stream.first - stream.sent for stream in streams])

    def _cached_for_e2e(self, length: int) -> Documents:
        if "encoding" not in self._record.content["samples"]:
            self._flush()
            documents = self._ensure_cached(length)
            cold = self._record.content["samples"][f"cold/{length}"]
            self._record.add("encoding", cold[-1:])
            return documents
        return self._ensure_cached(length)

    def _mixed_load(self) -> None:
        mixed, draw = self._scale.mixed, self._texts.random
        prompts = [self._texts.plain(draw.randint(*mixed.prompt)) for _ in range(mixed.requests)]
        outputs = [draw.randint(*mixed.output) for _ in range(mixed.requests)]
        gaps = [draw.expovariate(mixed.rate) for _ in range(mixed.requests)]
        streams = self._client.stream(prompts, outputs, list(itertools.accumulate(gaps)))
        self._record.add("plain/mixed/total", [span(streams)])
        self._record.add("plain/mixed/ttft", [stream.first - stream.sent for stream in streams])
        self._record.add("plain/mixed/interval", all_intervals(streams))
        self._say("plain/mixed/total")

    def _decode(
        self,
        figure: str,
        prompts: Sequence[Prompt],
        cached: Documents | None = None,
        rung: Rung = NO_RUNG,
    ) -> None:
        """One batch; again with answers twice as long if they hardly overlapped."""
        for tokens in (self._scale.decode_tokens, 2 * self._scale.decode_tokens):
            streams = self._client.stream(prompts, [tokens] * len(prompts), rung=rung)
            intervals = common_decode_intervals(streams)
            if len(intervals) >= ENOUGH_STEPS * tokens * len(prompts):
                break
        if cached is not None:
            for stream in streams:
                self._check_hit(figure, stream.cached_tokens, cached)
        if not intervals:
            self._record.warn(f"{figure}: at no time did the whole batch decode")
            return
        self._record.add(figure, intervals)
        self._say(figure)

    def _fresh(self, length: int) -> Documents:
        context = self._scale.context
        return self._texts.documents(self._scale.prefix, length // context, context)

    def _ask(self, documents: Documents, query: int | None = None) -> Prompt:
        """A fresh query over documents; APE gets them in a new order."""
        order = self._texts.shuffled(documents) if self._client.parallel else documents
        return Prompt(order, self._texts.ids(query or self._scale.query))

    def _some(self, documents: Documents, case: Overlap, request: int) -> Prompt:
        """A fresh query over some of the documents."""
        taken = self._texts.shuffled(documents).contexts[: case.taken]
        if case.disjoint:
            taken = documents.contexts[request * case.taken : (request + 1) * case.taken]
        return self._ask(documents._replace(contexts=taken))

    def _ensure_cached(self, length: int) -> Documents:
        """The documents of this length that stay; the prefill that caches them is a cold one."""
        documents = self._documents.get(length) or self._fresh(length)
        self._documents[length] = documents
        if length not in self._cached:
            self._prefill_cold(length, documents)
            self._cached.add(length)
        return documents

    def _prefill_cold(self, length: int, documents: Documents) -> None:
        answer = self._client.first_token(self._ask(documents))
        self._check_miss(f"cold/{length}", answer.cached_tokens, 0)
        self._record.add(f"cold/{length}", [answer.seconds])
        self._say(f"cold/{length}")

    def _flush(self) -> None:
        self._client.flush()
        self._cached.clear()

    def _check_hit(self, figure: str, cached: int, documents: Documents) -> None:
        if cached < documents.tokens:
            self._record.warn(f"{figure}: {cached} of {documents.tokens} tokens were cached")

    def _check_miss(self, figure: str, cached: int, allowed: int) -> None:
        if cached > allowed + 1:  # one more token may be equal by chance
            self._record.warn(f"{figure}: {cached} tokens were cached, not {allowed}")

    def _say(self, figure: str) -> None:
        found = summarise(self._record.content["samples"][figure])
        shown = (f"{1e3 * value:.2f}" for value in found[:3])
        self._record.say("{}: {} ms ({} to {}) of {}".format(figure, *shown, found.samples))
