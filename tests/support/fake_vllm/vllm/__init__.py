"""A small imitation of vLLM's Python API, for tests without vLLM.

Names and signatures are those of vLLM 0.20.2 and 0.32.0. A process of its own schedules the requests, as in vLLM.

``hf_overrides`` have what a test wants of it: ``fake_max_num_seqs``, the most sequences that it runs at a time;
``fake_fault``, one of ``load`` (a worker fails to start), and ``die``, ``hang`` and ``abort`` (a request) at the
third step; and ``fake_notes``, a file to which its processes write their ids.
"""

from __future__ import annotations

import logging

from vllm.sampling_params import SamplingParams

logging.getLogger("vllm").setLevel(logging.INFO)

__all__ = ["SamplingParams", "__version__"]

__version__ = "0.20.2"
