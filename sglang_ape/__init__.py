"""Adaptive Parallel Encoding (APE) served by SGLang.

The paper: Yang, Chen, Chen, "APE: Faster and Longer Context-Augmented Generation via Adaptive
Parallel Encoding", ICLR 2025. Importing this package imports neither torch nor SGLang.
"""

__version__ = "0.1.0"
