"""Plain parallel encoding computed another way: one dense forward pass of transformers in fp32.

The mask lets a context see P and itself, and the query see everything before it; the positions
start again behind P for every context. At T = S = 1 that is all there is to parallel encoding: one
softmax over all keys. Neither a server, nor a cache, nor a merge of parts takes part.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common.prompts import Ids, Prompt


class Reference:
    """A model of transformers on the CPU, in fp32.

    Args:
        model: path or name of the model.

    Raises:
        OSError: its weights are not there, as with ``--load-format dummy``.
    """

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def logprobs(self, prompt: Prompt, answer: Ids, parallel: bool) -> list[float]:
        """Log-probability of each token of an answer, given what stands before it.

        Args:
            prompt: the question.
            answer: tokens that follow it.
            parallel: contexts apart; otherwise the prompt is one ordinary sequence.
        """
        import torch

        ids = [*prompt.sequence, *answer]
        positions, mask = layout(prompt, len(ids), parallel)
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.tensor([ids]),
                position_ids=positions[None],
                attention_mask=bias[None, None],
                use_cache=False,
            ).logits[0]
        rows = logits[-len(answer) - 1 : -1].log_softmax(-1)
        return rows.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


def layout(prompt: Prompt, length: int, parallel: bool) -> tuple[Any, Any]:
    """Positions (length,) and who sees whom (length, length), True where a row sees a column."""
    import torch

    positions = torch.arange(length)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    if not parallel:
        return positions, mask
    start = after_prefix = len(prompt.prefix)
    for context in prompt.contexts:
        stop = start + len(context)
        positions[start:stop] = torch.arange(after_prefix, after_prefix + len(context))
        mask[start:stop, after_prefix:start] = False
        start = stop
    longest = max(map(len, prompt.contexts))
    positions[start:] = torch.arange(length - start) + after_prefix + longest
    return positions, mask
