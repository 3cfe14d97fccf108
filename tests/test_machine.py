"""The machine of a run: what it knows of a GPU, and what it sets there."""

import pytest
import torch

from run.machine import Machine, set_matmul_precision
from run.settings import read


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GH200 144G HBM3e", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        # slower or faster than those whose names they begin with
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_the_peak_is_that_of_the_devices_model(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    cuda = torch.device("cuda", 0)
    assert Machine(cuda, torch.bfloat16, compile=False).peak_flops() == peak
    assert Machine(cuda, torch.float32, compile=False).peak_flops() is None


def test_float32_products_are_rounded_on_cuda_and_nowhere_else():
    assert torch.get_float32_matmul_precision() == "highest"
    try:
        for device, options, expected in (
            ("cpu", [], "highest"),
            ("cuda", [], "high"),
            ("cuda", ["--float32_matmul_precision=highest"], "highest"),
        ):
            set_matmul_precision(read(options), torch.device(device))
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")
