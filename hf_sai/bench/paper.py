"""The profiling tables of the paper (arXiv 2412.11768). They are from other machines and are always marked as such."""

from typing import NamedTuple


class Reported(NamedTuple):
    """A row of Table 1 or 3: float32, one A100 80GB."""

    state_gb: float
    step_ms: float | None  # None: out of memory
    spread_ms: float


# Tables 1 (GPT-2, Llama-2) and 3 (ViT). The authors' "Adam" and "AdamW" are torch's from 2024, of an unstated variant.
A100 = "A100 80GB, paper"
TABLES_1_AND_3: dict[tuple[str, str], Reported] = {
    ("gpt2-xl", "SGDM"): Reported(5.93, 41.0, 12.0),
    ("gpt2-xl", "AdamW"): Reported(11.86, 138.0, 6.0),
    ("gpt2-xl", "Adam"): Reported(11.86, 145.0, 7.0),
    ("gpt2-xl", "Prodigy"): Reported(23.72, 360.0, 45.0),
    ("gpt2-xl", "Adam-Mini"): Reported(6.52, 223.0, 2.0),
    ("gpt2-xl", "SGD-SaI"): Reported(5.93, 68.0, 21.0),
    ("llama-2-7b", "SGDM"): Reported(25.15, 100.0, 20.0),
    ("llama-2-7b", "AdamW"): Reported(49.48, None, 0.0),
    ("llama-2-7b", "Adam"): Reported(49.48, None, 0.0),
    ("llama-2-7b", "Prodigy"): Reported(98.96, None, 0.0),
    ("llama-2-7b", "Adam-Mini"): Reported(27.21, 421.0, 22.0),
    ("llama-2-7b", "SGD-SaI"): Reported(25.15, 180.0, 30.0),
    ("vit-s-16", "SGDM"): Reported(0.08, 7.9, 0.3),
    ("vit-s-16", "AdamW"): Reported(0.17, 45.0, 8.0),
    ("vit-s-16", "Adam"): Reported(0.17, 50.0, 1.5),
    ("vit-s-16", "Prodigy"): Reported(0.33, 78.0, 0.0),
    ("vit-s-16", "Adam-Mini"): Reported(0.08, 84.0, 5.0),
    ("vit-s-16", "SGD-SaI"): Reported(0.08, 12.4, 0.2),
    ("vit-h-14", "SGDM"): Reported(2.42, 40.0, 1.0),
    ("vit-h-14", "AdamW"): Reported(4.86, 124.0, 4.0),
    ("vit-h-14", "Adam"): Reported(4.86, 127.0, 2.0),
    ("vit-h-14", "Prodigy"): Reported(9.70, 260.0, 3.0),
    ("vit-h-14", "Adam-Mini"): Reported(2.54, 220.0, 20.0),
    ("vit-h-14", "SGD-SaI"): Reported(2.42, 54.0, 13.0),
}


class Profiled(NamedTuple):
    """A row of Table 5 (RTX 3090) or 6 (A100 PCIe 40GB): an ordinary step, and the calibration (0 for SGD)."""

    machine: str
    step_ms: float
    calibration_ms: float


TABLES_5_AND_6: dict[tuple[str, str], list[Profiled]] = {
    ("vit-s-16", "SGDM"): [Profiled("RTX 3090", 12.2, 0.0), Profiled("A100 PCIe 40GB", 7.1, 0.0)],
    ("vit-s-16", "SGD-SaI"): [Profiled("RTX 3090", 13.7, 14.5), Profiled("A100 PCIe 40GB", 13.0, 13.7)],
    ("vit-h-14", "SGDM"): [Profiled("RTX 3090", 48.6, 0.0), Profiled("A100 PCIe 40GB", 51.9, 0.0)],
    ("vit-h-14", "SGD-SaI"): [Profiled("RTX 3090", 65.5, 43.3), Profiled("A100 PCIe 40GB", 63.1, 106.0)],
    ("gpt2-xl", "SGDM"): [Profiled("RTX 3090", 287.4, 0.0), Profiled("A100 PCIe 40GB", 353.2, 0.0)],
    ("gpt2-xl", "SGD-SaI"): [Profiled("RTX 3090", 340.1, 267.6), Profiled("A100 PCIe 40GB", 392.8, 353.8)],
}
