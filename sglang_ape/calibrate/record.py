"""From what a calibration found out to the profile that is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sglang_ape.calibrate.profile import Profile, model_name
from sglang_ape.calibrate.run import Figure, Outcome, Plan, Result, Step

_DIGITS = 6


def profile_of(outcome: Outcome, plan: Plan, model: str, inputs: dict[str, Any]) -> Profile:
    """The profile; it holds nothing that changes when the same command runs again.

    Args:
        outcome: of the calibration.
        plan: what was searched.
        model: path or name of the model.
        inputs: what else the figures depend on.
    """
    point, prefix, rung = outcome.chosen
    return Profile(
        model=model_name(model),
        temperature=point.temperature,
        scale=point.scale,
        prefix=prefix,
        soft=rung.soft,
        refine=rung.refine,
        warm=list(plan.warm) if rung.warm else [],
        report={
            "objective": plan.objective,
            "search": plan.search,
            "metric": plan.metric,
            **inputs,
            "notes": outcome.notes,
            "validation": _results(outcome.validation),
            "held_out": _results(outcome.held_out),
            **_ladder(outcome, plan),
            "cells": [
                {
                    **cell.setting.point._asdict(),
                    "prefix": cell.setting.prefix,
                    "score": round(cell.score, _DIGITS),
                }
                for cell in outcome.cells
            ],
        },
    )


def _ladder(outcome: Outcome, plan: Plan) -> dict[str, Any]:
    """What the ladder found, where one was to be tried."""
    if not outcome.ladder:
        return {}
    parts = {"validation": outcome.ladder, "held_out": outcome.held_out_ladder}
    steps = {name: [_step(step) for step in own] for name, own in parts.items()}
    budget = plan.budget if math.isfinite(plan.budget) else None
    return {"ladder": {"budget": budget, "warm": list(plan.warm), **steps}}


def _step(step: Step) -> dict[str, Any]:
    tokens = round(step.tokens, _DIGITS)
    return {**step.rung._asdict(), "accuracy": _figure(step.accuracy), "extra_tokens": tokens}


def _results(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [
        {
            "setting": result.name,
            "divergence": _figure(result.divergence),
            "accuracy": _figure(result.accuracy),
        }
        for result in results
    ]


def _figure(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    error = None if figure.error is None else round(figure.error, _DIGITS)
    return {"mean": round(figure.mean, _DIGITS), "standard_error": error, "rows": figure.rows}
