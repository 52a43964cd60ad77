"""Public data sets by name, from the Hugging Face hub.

Each repository of the table holds data files, which ``datasets`` reads in every version; loading
scripts, which it no longer runs from version 4, take no part.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.common.data import Row, Unavailable


class Source(NamedTuple):
    """Where a data set is and which of its columns hold what.

    Attributes:
        repository: on the hub.
        text: the column with the text to classify, or the problem.
        answer: the column with the label, or the solution.
        questions: the split to ask from; None for a tenth of the pool's rows.
        configuration: of the repository, if it has several.
        revision: the branch, if it is not the default one.
        left_out: a label whose rows are left out.
    """

    repository: str
    text: str
    answer: str
    questions: str | None = "test"
    configuration: str | None = None
    revision: str | None = None
    left_out: str | None = None


POOL = "train"
SOURCES = {
    "banking77": Source("legacy-datasets/banking77", "text", "label"),
    "clinc150": Source("clinc/clinc_oos", "text", "intent", configuration="plus", left_out="oos"),
    "trec": Source("SetFit/TREC-QC", "text", "label_coarse_text"),
    "trec-fine": Source("SetFit/TREC-QC", "text", "label_text"),
    "nlu": Source(
        "xingkunliuxtracta/nlu_evaluation_data",
        "text",
        "label",
        questions=None,
        revision="refs/convert/parquet",
    ),
    "gsm8k": Source("openai/gsm8k", "question", "answer", configuration="main"),
}


def load(source: Source, split: str) -> list[Row]:
    """Rows of a split, with the columns ``text`` and ``answer``; labels by their names.

    Raises:
        Unavailable: the hub, the repository or ``datasets`` cannot be had.
    """
    print(f"loading {source.repository} ({split}) from the Hugging Face hub", flush=True)
    try:
        from datasets import load_dataset

        data = load_dataset(
            source.repository, source.configuration, split=split, revision=source.revision
        )
    except Exception as error:  # of many unrelated types: no network, no repository, no package
        reason = " ".join(str(error).split())
        raise Unavailable(f"{source.repository} cannot be loaded: {reason:.200}") from error
    names = getattr(data.features[source.answer], "names", None)
    rows = []
    for i, values in enumerate(data):
        answer = values[source.answer]
        answer = names[answer] if names else answer
        if answer != source.left_out:
            where = f"{source.repository}, {split} row {i}"
            rows.append(Row(where, {"text": values[source.text], "answer": answer}))
    return rows
