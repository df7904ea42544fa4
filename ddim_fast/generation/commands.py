"""The commands `ddim-fast generate` and `ddim-fast verify`."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ..convert import in_options, loading_options, model_options
from .formats import FORMATS
from .spoken import spoken

EXAMPLES = """
\b
Examples:
  # 64 digits and a contact sheet, with the model that ships with the package
  ddim-fast generate ddim-fast/digits --out samples
\b
  # an FID set: 50,000 images in the file guided-diffusion's evaluator reads
  ddim-fast generate google/ddpm-cifar10-32 --seeds 0-49999 --format npz --out fid
\b
  # only class 3; every class equally often
  ddim-fast generate MODEL --seeds 0-999 --class 3 --out threes
  ddim-fast generate MODEL --seeds 0-9999 --class uniform --out balanced
\b
  # one class per seed, from a file; a contact sheet of the first 64
  ddim-fast generate MODEL --seeds 0-2,10-19 --labels labels.txt --grid sheet.png --format npz --out chosen
\b
  # all GPUs of a machine; a Slurm step; a Ray cluster writing to S3
  torchrun --nproc-per-node 8 --no-python ddim-fast generate MODEL --seeds 0-999999 --out run
  srun --ntasks 16 --gpus-per-task 1 ddim-fast generate MODEL --seeds 0-999999 --out run
  ddim-fast generate MODEL --seeds 0-999999 --ray auto --out s3://bucket/run
\b
  # is every seed there once, and every file whole?
  ddim-fast verify run

A job that was cut off, by whatever, goes on when the same command is run again.
"""


class Terminated(BaseException):
    """SIGTERM arrived."""


@click.command("generate", epilog=EXAMPLES)
@click.argument("model")
@click.option(
    "--seeds", default="0-63", show_default=True, help="One image per seed: numbers and ranges, as 0-63,70,80."
)
@click.option("--out", required=True, help="Folder, or any fsspec path such as s3://bucket/run.")
@click.option("--steps", "num_inference_steps", default=50, show_default=True, help="Denoising steps.")
@click.option("--eta", default=0.0, show_default=True, help="Noise of the steps: 0 is DDIM, 1 is DDPM.")
@click.option(
    "--batch",
    "batch_size",
    default="auto",
    show_default=True,
    help="Images in a forward. auto: what fits, or what the job in OUT has.",
)
@click.option(
    "--class", "label", help="Class of every image, or uniform: a seed's class is then the seed modulo their number."
)
@click.option("--labels", help="File with one class per seed: .npy, or text with one per line.")
@click.option(
    "--format",
    type=click.Choice(list(FORMATS)),
    default="png",
    show_default=True,
    help="One file per image, one array (samples.npz), or one tar or parquet file per chunk.",
)
@model_options(scheduler=False)
@click.option("--subdirs", is_flag=True, help="Put PNGs into folders of 1,000.")
@click.option("--truncate", is_flag=True, help="Cut pixel values off instead of rounding, as guided-diffusion does.")
@click.option(
    "--grid",
    help="PNG for a contact sheet of the first 64; a bare name lies in OUT.  [default: grid.png up to 64 PNGs]",
)
@click.option("--no-grid", is_flag=True, help="Make no contact sheet.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@click.option("--engine", type=click.Choice(["auto", "plain", "fused", "graph"]), default="auto", show_default=True)
@click.option("--overwrite", is_flag=True, help="Start again; removes what an earlier job wrote to OUT, nothing else.")
@click.option("--on-bad", type=click.Choice(["stop", "skip"]), default="stop", show_default=True,
              help="At a NaN or infinite image: stop, or leave it out and record it.")  # fmt: skip
@click.option("--chunk-size", type=int, help="Images finished together, and in a tar or parquet file.")
@click.option("--shard", help="K/N: shard K of N, from 0.  [default: from torchrun's or Slurm's variables]")
@click.option("--ray", help="Run on Ray: local, auto, or a cluster's address.")
@click.option("--workers", type=int, help="With --ray: how many models at most.")
@click.option("--gpus-per-worker", type=float, help="With --ray: GPUs of each, a fraction is allowed.")
@click.option("--log-json", is_flag=True, help="Progress and report as JSON lines on stdout.")
@click.pass_context
def generate_command(ctx: click.Context, model: str, **options: Any) -> None:
    """Sample one image per seed from MODEL: a Hub name, a local folder, a checkpoint file, or ddim-fast/digits."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    from .errors import JobError

    log_json = options.pop("log_json")
    try:
        loading = loading_options(options)
        asked = _asked(options)
        from .run import run_job
        from .settings import JobSettings, shard_of

        settings = JobSettings(model, loading=loading or None, log=sys.stdout if log_json else None, **asked)
        index, count, source = shard_of(settings)
        if source and not log_json:
            click.echo(f"shard {index}/{count}, from {source}", err=True)
        with _stopping_on_sigterm():
            report = run_job(settings)
    except (ValueError, TypeError) as error:
        _fail(ctx, 2, in_options(str(error), scheduler=False))
    except JobError as error:
        _fail(ctx, 1, str(error))
    except KeyboardInterrupt:
        _fail(ctx, 130, "stopped; run the same command again to go on where it stopped")
    except Terminated:
        _fail(ctx, 143, "terminated; run the same command again to go on where it stopped")
    except Exception as error:
        _fail_unexpectedly(ctx, error)
    if not log_json:
        click.echo(report)


@click.command("verify")
@click.argument("out")
@click.option("--repair", is_flag=True, help="Drop damaged chunks, so that running the job again makes only those.")
@click.option("--hashes", type=click.File("w"), help="Write each file's SHA-256 here, as sha256sum -c reads it.")
@click.pass_context
def verify_command(ctx: click.Context, out: str, repair: bool, hashes: Any) -> None:
    """Check the job in OUT: every seed once, every file whole. Exits 1 if anything is missing or damaged."""
    from .errors import JobError
    from .verify import verify as run

    try:
        result = run(out, repair=repair, hashes=hashes, progress=sys.stderr.isatty())
    except (ValueError, OSError) as error:
        _fail(ctx, 2, str(error))
    except JobError as error:
        _fail(ctx, 1, str(error))
    except Exception as error:
        _fail_unexpectedly(ctx, error)
    click.echo(_in_options(ctx, str(result)))
    if repair and (result.damaged or result.files):
        dropped = f"{len(result.damaged)} damaged chunks" if result.damaged else ", ".join(result.files)
        click.echo(f"dropped {dropped}; run the same `ddim-fast generate` command again")
    ctx.exit(0 if result.ok else 1)


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    """The settings of a job that the command's options mean."""
    asked = dict(options)
    if asked.pop("no_grid"):
        if asked["grid"]:
            raise ValueError("--grid and --no-grid exclude each other")
        asked["grid"] = False
    asked["class_labels"] = _labels(asked.pop("label"), asked.pop("labels"))
    if asked["batch_size"] != "auto":
        asked["batch_size"] = _integer("--batch", asked["batch_size"])
    if asked["device"] == "auto":
        asked["device"] = None
    return asked


def _labels(label: str | None, file: str | None) -> Any:
    if label is not None and file is not None:
        raise ValueError("--class and --labels exclude each other")
    if file is not None:
        from .labels import read_labels

        try:
            return read_labels(file)
        except OSError as error:
            raise ValueError(f"--labels: {error}") from None
    return label if label in (None, "uniform") else _integer("--class", str(label))


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        other = "auto" if option == "--batch" else "uniform"
        raise ValueError(f"{option} must be a number or {other}, got {text!r}") from None


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    def stop(*_: Any) -> NoReturn:
        # A second signal ends the process at once: what is finished is on disk under its name.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(ctx: click.Context, code: int, message: str) -> NoReturn:
    click.echo(f"{ctx.command_path}: {_in_options(ctx, message)}", err=True)
    ctx.exit(code)


def _fail_unexpectedly(ctx: click.Context, error: Exception) -> NoReturn:
    """One line for what no job expects, such as a library that is broken; `ddim-fast -vv` shows where it was."""
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        raise error
    text = " ".join(str(error).split())
    _fail(ctx, 1, f"{type(error).__name__}: {text}; what is finished is safe, and ddim-fast -vv shows where it was")


def _in_options(ctx: click.Context, message: str) -> str:
    options = {param.name or "": param.opts[0] for param in ctx.command.params if isinstance(param, click.Option)}
    return spoken(message, {**options, "class_labels": "--class"})
