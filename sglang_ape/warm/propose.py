"""Asking the model for items, trying again in the place of those that are no good."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from sglang_ape.calibrate.backend import Backend
from sglang_ape.errors import ApeRequestError
from sglang_ape.warm.check import copied, lengths_like, named, off_length
from sglang_ape.warm.prompt import form_of, prompt_ids, stops

_TOP_P = 0.95
_SPARE_TOKENS = 16  # of an answer, so that one of the greatest length can end


class WarmFailure(Exception):
    """The model gave too few good items, or the corpus cannot be shown to it."""


class Settings(NamedTuple):
    """How to ask."""

    items: int  # wanted
    shown: int  # contexts in one prompt
    tries: int  # for each item
    temperature: float  # of sampling
    seed: int  # which contexts are shown; the model's own sampling has none


class Rejected(NamedTuple):
    """A proposal that was no good."""

    attempt: int  # from 1
    item: str
    reason: str


class Proposer:
    """Proposes items in the format of a corpus.

    Args:
        backend: the model.
        corpus: texts of contexts, at least one; equal ones count once.
        settings: how to ask.
    """

    def __init__(self, backend: Backend, corpus: Sequence[str], settings: Settings) -> None:
        self.rejected: list[Rejected] = []
        self._backend = backend
        self._corpus = list(dict.fromkeys(corpus))
        self._settings = settings
        self._form = form_of(self._corpus)
        self._lengths = lengths_like(self._corpus)
        facts = backend.facts
        self._with_template = (
            facts.chat_template is None and getattr(facts.tokenizer, "chat_template", None)
        ) is not None

    def run(self) -> list[str]:
        """As many items as are wanted.

        Raises:
            WarmFailure: the tries did not give so many, or no context fits the model's window.
            ApeRequestError: the engine refused a prompt.
            requests.RequestException: it did not answer.
        """
        wanted, items = self._settings.items, list[str]()
        with tqdm(total=wanted, unit=" items", disable=None) as bar:
            for attempt in range(1, self._settings.tries + 1):
                items += self._one_round(attempt, wanted - len(items), items)
                bar.update(len(items) - bar.n)
                if len(items) == wanted:
                    return items
        raise WarmFailure(
            f"{len(items)} good items of {wanted} after {self._settings.tries} tries each; raise "
            "--tries, or write them by hand"
        )

    def _one_round(self, attempt: int, missing: int, kept: Sequence[str]) -> list[str]:
        """Ask once for each missing item; those that are good."""
        prompts = [self._prompt(f"{self._settings.seed} {attempt} {i}") for i in range(missing)]
        answers = self._ask(prompts)
        items = [self._form.item(answer["text"]) for answer in answers]
        copies = copied([*kept, *items], self._corpus)[len(kept) :]
        names = named(items, self._corpus)
        good = []
        for item, answer, copy, name in zip(items, answers, copies, names, strict=True):
            reason = self._wrong(item, answer, copy, name)
            if reason is None:
                good.append(item)
                continue
            self.rejected.append(Rejected(attempt, item, reason))
            tqdm.write(f"try {attempt}: rejected, {reason}", file=sys.stderr)
        return good

    def _wrong(
        self, item: str, answer: Mapping[str, Any], copy: str | None, name: str | None
    ) -> str | None:
        """Why an item is no good, its kind first; None for a good one."""
        if item and answer["meta_info"]["finish_reason"]["type"] == "length":
            return f"too long: no end after {answer['meta_info']['completion_tokens']} tokens"
        reason = off_length(item, self._lengths)
        if reason is None and copy is not None:
            return f"copied: {copy!r}"
        if reason is None and name is not None:
            return f"a name of the corpus: {name!r}"
        return reason

    def _prompt(self, seed: str) -> tuple[list[int], int]:
        """A prompt that fits the window with its answer, and the answer's most tokens."""
        facts = self._backend.facts
        room = min(facts.limits.window, facts.limits.usable_pool_tokens, facts.longest_prompt)
        count = min(self._settings.shown, len(self._corpus))
        shown = random.Random(seed).sample(self._corpus, count)
        while shown:
            ids = prompt_ids(facts.tokenizer, shown, self._form, self._with_template)
            longest = max(map(self._tokens, shown))
            new_tokens = 2 * longest + _SPARE_TOKENS
            if len(ids) + new_tokens < room:
                return ids, new_tokens
            shown.pop()
        raise WarmFailure(
            f"a context of {longest} tokens and an item of up to {new_tokens} do not fit the "
            f"{room} tokens that a request may have"
        )

    def _tokens(self, text: str) -> int:
        return len(self._backend.facts.tokenizer.encode(text, add_special_tokens=False))

    def _ask(self, prompts: Sequence[tuple[list[int], int]]) -> list[dict[str, Any]]:
        sampling = {
            "temperature": self._settings.temperature,
            "top_p": _TOP_P,
            "stop": stops(self._form, self._with_template),
        }
        body = {
            "input_ids": [ids for ids, _ in prompts],
            "sampling_params": [{**sampling, "max_new_tokens": new} for _, new in prompts],
        }
        answers = self._backend.ask(body)
        for answer in answers:
            reason = answer["meta_info"]["finish_reason"]
            if reason["type"] == "abort":
                raise ApeRequestError(reason.get("message", "the engine gave up"), None)
        return answers
