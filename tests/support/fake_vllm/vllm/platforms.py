from __future__ import annotations

import os


class Platform:
    """The platform of this machine: CUDA with the GPUs of FAKE_VLLM_GPUS, or else a CPU."""

    def is_cuda(self) -> bool:
        return bool(_gpus())

    def get_device_uuid(self, device_id: int = 0) -> str:
        return _gpus()[device_id]

    def get_device_name(self, device_id: int = 0) -> str:
        return f"Fake GPU {device_id}"


def _gpus() -> list[str]:
    return os.environ.get("FAKE_VLLM_GPUS", "").split()


current_platform = Platform()
