"""Weights that are made up, and of the size that weights have.

Source: ``DummyModelLoader`` in ``model_loader/loader.py`` of SGLang 0.5.17, which draws evenly from
-0.001 to 0.001. With these, norms included, a query attends to all tokens alike: every context gets
the same score, and ``soft`` has nothing to act on.
"""

from __future__ import annotations

import math
from typing import Any

from sglang.srt.model_loader.loader import DummyModelLoader
from torch import nn

DRAWN_TO = 1e-3


class MadeUpWeights(DummyModelLoader):
    """For ``sgl.Engine(load_format=MadeUpWeights)``: norms are 1, matrices keep variances."""

    def load_model(self, **given: Any) -> nn.Module:
        model = super().load_model(**given)
        for name, weight in model.named_parameters():
            if "norm" in name:
                nn.init.ones_(weight)
            else:
                weight.data.mul_(math.sqrt(3 / weight.shape[-1]) / DRAWN_TO)
        return model
