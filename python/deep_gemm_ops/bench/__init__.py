"""``python -m deep_gemm_ops.bench``: every speed this package claims, measured beside its references in one run.

``suites`` measures and needs a GPU, ``report`` turns the JSON of a run into figures, tables and verdicts, ``plot``
draws it. Method: :mod:`deep_gemm_ops.testing.bench`.
"""
