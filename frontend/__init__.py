"""``sgl.parallel_contexts`` in SGLang's frontend language; installed as sglang_ape.frontend.

What of ``sglang.lang`` is touched stands in :mod:`sglang_ape.frontend.patches`.
"""
