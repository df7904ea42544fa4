"""A prediction, not a measurement: the time of a step from its launches' bytes and FLOPs and three data sheets.

    device = sum over launches of max(bytes / bandwidth, FLOPs / rate) + launches * gap
    step   = max(device, launches * host)          run eagerly: the host may be slower than the device
    step   = device, with the gap of a graph       in a CUDA graph

Every launch is taken to reach the peak, which none does: real times are longer, those of small launches several times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from counting import Row


@dataclass(frozen=True)
class Card:
    """Peak rates: memory in byte/s; FLOP/s of dense products in half precision (summed in float32), TF32, float32."""

    name: str
    bandwidth: float
    half: float
    tf32: float
    single: float
    source: str


CARDS = (
    Card("H100 SXM", 3.35e12, 989.4e12, 494.7e12, 66.9e12, "NVIDIA H100 data sheet; sparse rates halved"),
    Card("A100 80GB SXM", 2.039e12, 312e12, 156e12, 19.5e12, "NVIDIA A100 data sheet"),
    Card("RTX 4090", 1.008e12, 165.2e12, 82.6e12, 82.6e12, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
)

# Seconds a launch. NVIDIA's "Getting Started with CUDA Graphs" (a V100): a kernel of 2.9 µs takes 3.8 µs launched
# ahead and 3.4 µs in a graph.
GAP_EAGER = 0.9e-6
GAP_GRAPH = 0.5e-6
# Assumed: the low end of the 5 to 25 µs that Python, dispatcher and driver take for an operator of PyTorch.
HOST = 5e-6


@dataclass(frozen=True)
class Prediction:
    """Seconds a step; `bound` is what most of the device's time goes to, or "host"."""

    card: str
    seconds: float
    bound: str


def rate(card: Card, row: Row) -> float:
    """The peak of the units that the row's products run on, with PyTorch's defaults: TF32 in convolutions alone."""
    if row.dtype in (torch.float16, torch.bfloat16):
        return card.half
    return card.tf32 if row.kind == "conv" else card.single


def predict(card: Card, rows: Sequence[Row], *, graph: bool) -> Prediction:
    """The time of these launches on `card`."""
    memory = product = 0.0
    for row in rows:
        moving, computing = row.bytes / card.bandwidth, row.flops / rate(card, row)
        if moving >= computing:
            memory += moving
        else:
            product += computing
    gaps = len(rows) * (GAP_GRAPH if graph else GAP_EAGER)
    host = 0.0 if graph else len(rows) * HOST
    device = memory + product + gaps
    if host > device:
        return Prediction(card.name, host, "host")
    parts = {"memory": memory, "products": product, "launches": gaps}
    return Prediction(card.name, device, max(parts, key=lambda part: parts[part]))
