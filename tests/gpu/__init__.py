"""Tests that need a GPU. They are skipped without one; docs/explanation/validation.md has the results.

    pytest tests/gpu/test_counter.py        # one file at a time, and without -n: they want the GPU to themselves

Each file takes less than ten minutes on one H100. What was found is listed at the end of the run, and is in
``--junitxml``. Models of Llama's shapes are made on the spot, with random weights.
"""
