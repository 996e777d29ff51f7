"""The conformance suite for engines: tests that an engine's author runs with pytest.

Example:
    # test_bigram.py
    from pytest_llem.testing import EngineConformance

    class TestBigram(EngineConformance):
        experiment = {
            "model": "none",
            "backend": "my_engine:BigramEngine",
            "precision": "fp32",
            "decoder": {"do_sample": False},
        }
"""

from pytest_llem.testing.conformance import EngineConformance

__all__ = ["EngineConformance"]
