"""List the peak FLOP/s, memory bandwidth and cache sizes of accelerators, from their data sheets and white papers.

The FLOP/s are for dense matrices: data sheets of Ampere and newer often give those for 2:4 sparsity, which are
twice as high. fp32 is without TF32, and fp16 with fp32 accumulation, as PyTorch multiplies. If two data sheets
differ, the higher value is used, so that no roofline time is too long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Peaks:
    """Peaks of a device.

    Attributes:
        flops: FLOP/s by precision (``bf16``, ``fp16``, ``fp32``), without those that it does not support.
        bandwidth: Memory bandwidth, in bytes/s.
        cache_bytes: Size of the last-level cache, in bytes.
    """

    flops: Mapping[str, float]
    bandwidth: float
    cache_bytes: int

    def __mul__(self, number: int) -> Peaks:
        """Return the peaks of *number* equal devices together, as if they did not have to communicate."""
        flops = {precision: number * peak for precision, peak in self.flops.items()}
        return Peaks(flops, number * self.bandwidth, number * self.cache_bytes)


def _peaks(half: float, fp32: float, gb_per_s: float, cache_mib: int, *, bf16: bool = True) -> Peaks:
    """Return the peaks of a GPU; *half* (fp16, and bf16 if it has that) and *fp32* in TFLOP/s."""
    flops = {"fp16": half * 1e12, "fp32": fp32 * 1e12} | ({"bf16": half * 1e12} if bf16 else {})
    return Peaks(flops, gb_per_s * 1e9, cache_mib * MIB)


#: Peaks by the name in CUDA and NVML, without the vendor, which drivers before 470 leave out.
_PEAKS = {
    # "NVIDIA HGX B200" data sheet (36 PFLOP/s sparse of 8 GPUs), GB200 NVL72's for fp32. L2 as CUDA reports it.
    "B200": _peaks(2250, 80, 8000, 126),
    # "NVIDIA H200 Tensor Core GPU" data sheet: SXM and NVL. L2: the H100's, which has the same chip (GH100).
    "H200": _peaks(989.5, 67, 4800, 50),
    "H200 NVL": _peaks(835.5, 60, 4800, 50),
    # "NVIDIA H100 Tensor Core GPU" data sheet: SXM (1,979 sparse), PCIe (1,513 sparse) and NVL (1,671 sparse, the
    # sheet that gives one board, not a pair). L2: "NVIDIA H100 Tensor Core GPU Architecture" white paper.
    "H100 80GB HBM3": _peaks(989.5, 67, 3350, 50),
    "H100 PCIe": _peaks(756.5, 51.2, 2039, 50),
    "H100 NVL": _peaks(835.5, 60, 3938, 50),
    # "NVIDIA A100 Tensor Core GPU" data sheet. L2: "NVIDIA A100 Tensor Core GPU Architecture" white paper.
    "A100-SXM4-40GB": _peaks(312, 19.5, 1555, 40),
    "A100-SXM4-80GB": _peaks(312, 19.5, 2039, 40),
    "A100-PCIE-40GB": _peaks(312, 19.5, 1555, 40),
    "A100 80GB PCIe": _peaks(312, 19.5, 1935, 40),
    # "NVIDIA L4" data sheet (242 sparse). L2: "NVIDIA Ada GPU Architecture" white paper, AD104.
    "L4": _peaks(121, 30.3, 300, 48),
    # "NVIDIA L40S" data sheet (362.05 dense). L2: the same white paper, AD102.
    "L40S": _peaks(362.05, 91.6, 864, 96),
    # "NVIDIA A10 Tensor Core GPU" data sheet. L2: "NVIDIA Ampere GA102 GPU Architecture" white paper.
    "A10": _peaks(125, 31.2, 600, 6),
    # "NVIDIA T4" data sheet and product brief (320 GB/s). L2: "NVIDIA Turing GPU Architecture" white paper, TU104.
    "Tesla T4": _peaks(65, 8.1, 320, 4, bf16=False),
    # "NVIDIA V100" data sheet: 125 and 112 TFLOP/s. L2: "NVIDIA Tesla V100 GPU Architecture" white paper.
    "Tesla V100-SXM2-16GB": _peaks(125, 15.7, 900, 6, bf16=False),
    "Tesla V100-SXM2-32GB": _peaks(125, 15.7, 900, 6, bf16=False),
    "Tesla V100-PCIE-16GB": _peaks(112, 14, 900, 6, bf16=False),
    "Tesla V100-PCIE-32GB": _peaks(112, 14, 900, 6, bf16=False),
    # "NVIDIA Ampere GA102 GPU Architecture" white paper, fp16 with fp32 accumulate.
    "GeForce RTX 3090": _peaks(71, 35.6, 936, 6),
    # "NVIDIA Ada GPU Architecture" white paper, likewise.
    "GeForce RTX 4090": _peaks(165.2, 82.6, 1008, 72),
}


def peaks_of(device: str) -> Peaks | None:
    """Return the peaks of a device by its name in CUDA; None if they are not known.

    A MIG instance has a name of its own, and its peaks are not known.
    """
    return _PEAKS.get(device.removeprefix("NVIDIA "))
