"""Fit the figures by which the CPU engine chooses between Winograd and the direct conv.

    python benchmarks/fit_conv_cost.py [--rounds 9] [--threads 2] [--operators]

Times both on the layers of the CIFAR-10 and LSUN models and shapes between them, one after the other, with the caches
swept before each call as the rest of a network would. Prints the coefficients for `ddim_fast/engine/cpu/conv.py`, and
how the choice they make compares with the best one.
"""

import argparse
import statistics
import time

import torch

from ddim_fast.engine.cpu import conv as cpu_conv
from ddim_fast.engine.cpu import native
from ddim_fast.engine.cpu.winograd import WinogradWeight, winograd_conv3x3

# batch, side of the input, channels in and out, behind an upsampling
SHAPES = [
    (batch, side, cin, cout, False)
    for batch in (1, 2, 8)
    for side, cin, cout in (
        (4, 256, 256),
        (8, 256, 256),
        (8, 512, 256),
        (16, 256, 256),
        (16, 512, 256),
        (16, 128, 256),
        (32, 128, 128),
        (32, 256, 128),
        (28, 64, 64),
        (32, 32, 32),
        (8, 512, 512),
        (32, 3, 128),
        (32, 128, 3),
        (28, 32, 1),
        (14, 96, 64),
        (7, 96, 96),
    )
] + [
    (1, 16, 512, 512, False),
    (1, 32, 256, 256, False),
    (1, 64, 256, 256, False),
    (1, 128, 128, 128, False),
    *((batch, side, 256, 256, True) for batch in (1, 8) for side in (4, 8, 16)),
    (1, 64, 128, 128, True),
    (1, 32, 256, 256, True),
]


def measure(shape: tuple[int, int, int, int, bool], rounds: int, sweep: torch.Tensor) -> tuple[float, float]:
    """Median seconds of the direct conv and of Winograd, called by turns."""
    batch, side, cin, cout, upsample = shape
    x, weight, bias = torch.randn(batch, side, side, cin), torch.randn(cout, cin, 3, 3), torch.randn(cout)
    out = torch.empty(batch, side << upsample, side << upsample, cout)
    packed, transformed = cpu_conv.PackedConv(weight, upsample), WinogradWeight(weight, upsample)
    calls = (
        lambda: cpu_conv.conv3x3(x, packed, bias=bias, exact=True),
        lambda: winograd_conv3x3(x, transformed, bias=bias, out=out),
    )
    # One thread's own time is blind to what else runs on the machine.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, taken in zip(calls, seconds, strict=True):
            sweep.mul_(1.0)
            start = clock()
            call()
            taken.append(clock() - start)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def fit(terms: list[tuple[float, ...]], seconds: list[float]) -> list[float]:
    """Coefficients of least relative error, none negative: the most negative one is left out until none is."""
    columns = torch.tensor(terms, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    scale = columns.norm(dim=0)
    kept = list(range(columns.shape[1]))
    while True:
        solution = torch.linalg.lstsq((columns / scale)[:, kept], torch.ones(len(columns), 1, dtype=torch.float64))
        values = solution.solution[:, 0]
        if (values >= 0).all():
            break
        kept.pop(int(values.argmin()))
    result = torch.zeros(columns.shape[1], dtype=torch.float64)
    result[kept] = values
    return (result / scale).tolist()


def main() -> None:
    """Measure, fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--operators", action="store_true", help="PyTorch's operators in place of the C kernels")
    options = parser.parse_args()
    if options.operators:
        native.library = lambda: None
    torch.set_num_threads(options.threads)
    sweep = torch.randn(12 << 20)
    with torch.no_grad():
        seconds = [measure(shape, options.rounds, sweep) for shape in SHAPES]
    terms = [
        tuple(
            part(cpu_conv.Site(s[0], s[1], s[1], *s[2:], threads=options.threads))
            for part in (cpu_conv.direct_terms, cpu_conv.winograd_terms)
        )
        for s in SHAPES
    ]
    costs = [fit([t[k] for t in terms], [s[k] for s in seconds]) for k in range(2)]
    best = chosen = direct = 0.0
    print(f"{'batch side cin cout up':26} {'direct':>9} {'winograd':>9} ratio  predicted")
    for shape, taken, term in zip(SHAPES, seconds, terms, strict=True):
        guess = [sum(a * b for a, b in zip(t, c, strict=True)) for t, c in zip(term, costs, strict=True)]
        best += 1.0
        chosen += taken[guess[1] < guess[0]] / min(taken)
        direct += taken[0] / min(taken)
        ratio, predicted = taken[0] / taken[1], guess[0] / guess[1]
        wrong = "  wrong" if (ratio > 1) != (predicted > 1) else ""
        print(f"{shape!s:26} {taken[0] * 1e3:7.2f}ms {taken[1] * 1e3:7.2f}ms {ratio:5.2f}  {predicted:5.2f}{wrong}")
    for name, cost in zip(
        ("DIRECT_COST", "OPERATORS_COST" if options.operators else "WINOGRAD_COST"), costs, strict=True
    ):
        print(f"{name} = ({', '.join(f'{value:.2g}' for value in cost)})")
    print(f"mean time over the best choice: {chosen / best:.3f} (always direct: {direct / best:.3f})")


if __name__ == "__main__":
    main()
