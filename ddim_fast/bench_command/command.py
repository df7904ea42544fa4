"""The command `ddim-fast bench`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

EXAMPLES = """
\b
Examples:
  ddim-fast bench                                          the bundled model on this machine
  ddim-fast bench random:cifar10 --dtype float16 --json results.json --plot results.png
  ddim-fast bench ./my-model --engines fused --peers diffusers --batch 8

All contenders load the same weights, start from the same noise and hand over float32 images on the host. Their images
must agree with the plain engine in float32 before they are timed. Peer `compile` is diffusers with
torch.compile. Exit code 1: an engine failed, or images disagreed.
"""


@click.command("bench", epilog=EXAMPLES)
@click.argument("model", default="ddim-fast/digits")
@click.option("--engines", default="plain,fused,graph", show_default=True, help="Ours; '' for none.")
@click.option("--peers", default="diffusers,compile", show_default=True, help="Others; '' for none.")
@click.option("--batch", default="1,8,64", show_default=True, help="Batch sizes.")
@click.option("--steps", default=50, show_default=True, help="Denoising steps.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--repeats", default=5, show_default=True, help="Timed calls of each, in turns.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything measured to this file.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Write a bar chart, .png, .svg or .pdf.")
@click.pass_context
def bench(
    ctx: click.Context,
    model: str,
    engines: str,
    peers: str,
    batch: str,
    steps: int,
    dtype: str,
    device: str,
    repeats: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Time the engines on MODEL beside diffusers and torch.compile.

    MODEL is a local folder, a name on the Hub, ddim-fast/digits (the default), or random:cifar10 or random:lsun: the
    architectures of google/ddpm-cifar10-32 and of the LSUN models with random weights, which need no download.

    Prints images a second and milliseconds a step (medians), half the distance between their quartiles, peak memory,
    what a step launches, and the seconds to the first image in a cold process.
    """
    import torch

    from ..devices import pick_device
    from .contenders import ENGINES, PEERS
    from .measuring import measure
    from .models import write_model
    from .plotting import check_plot, plot
    from .report import as_dict, machine, render

    names = [*names_in("--engines", engines, ENGINES), *names_in("--peers", peers, PEERS)]
    if not names:
        raise ValueError("nothing to time: --engines and --peers are both empty; name one of each")
    batches = [at_least_one("--batch", value) for value in dict.fromkeys(listed(batch))]
    if not batches:
        raise ValueError("--batch is empty; give batch sizes such as 1,8,64")
    for option, value in (("--steps", steps), ("--repeats", repeats)):
        at_least_one(option, value)
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        check_folder(option, file)
    if plot_file is not None:
        check_plot(plot_file)
    try:
        target = pick_device(device)
    except click.BadParameter as error:
        raise ValueError(f"--device {error.message}") from None

    settings: dict[str, Any] = {"model": model, "device": str(target), "dtype": dtype}
    settings |= {"steps": steps, "repeats": repeats}
    title = f"{model}, {dtype}, {steps} steps on {machine(target)}"
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, Path(folder))
        click.echo(title)
        results = measure(
            names, Path(folder), target, getattr(torch, dtype), batches, steps, repeats,
            lambda line: click.echo(line, err=True),
        )  # fmt: skip
    click.echo(f"\n{render(results)}")
    if json_file is not None:
        json_file.write_text(json.dumps(as_dict(results, settings, target), indent=2) + "\n", encoding="utf-8")
    if plot_file is not None and results.timings:
        plot(results, title, plot_file)
    if any(entry.wrong for entry in results.not_run) or not results.timings:
        ctx.exit(1)


def listed(text: str) -> list[str]:
    """The entries between commas."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def names_in(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """The names that a list option gives, each once."""
    names = list(dict.fromkeys(listed(text)))
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name!r} is unknown; choose from {', '.join(known)}")
    return names


def at_least_one(option: str, value: str | int) -> int:
    """`value` as a count."""
    try:
        count = int(value)
    except ValueError:
        raise ValueError(f"{option} {value!r} is no whole number; give one from 1") from None
    if count < 1:
        raise ValueError(f"{option} must be at least 1, got {count}")
    return count


def check_folder(option: str, file: Path | None) -> None:
    """Raise, before anything is measured, if `file` could not be written for want of a folder."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"{option} {str(file)!r}: the folder {str(file.parent)!r} does not exist; make it first")
