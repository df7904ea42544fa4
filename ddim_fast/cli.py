"""The `ddim-fast` command: pictures from a model, and what this machine can do."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import click

from . import __version__
from .convert import in_options, loading_options, model_options, recognized_file, recognized_lines

# Each command imports what it needs when it is asked for, so that --help answers at once.
COMMANDS = {
    "generate": "ddim_fast.generation.commands:generate_command",
    "verify": "ddim_fast.generation.commands:verify_command",
    "convert": "ddim_fast.convert:convert_command",
    "info": "ddim_fast.cli:info",
    "bench": "ddim_fast.bench_command.command:bench",
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ddim-fast")
@click.option("-v", "--verbose", count=True, help="Say what is decided (-v), and everything (-vv).")
def group(verbose: int) -> None:
    """Sample pixel diffusion models with DDIM, fast.

    \b
    ddim-fast generate ddim-fast/digits --out samples     the bundled model, 64 digits
    ddim-fast generate ./my-model --seeds 0-49999 --out fid --format npz
    ddim-fast info ./my-model                             which engine would run, and why
    ddim-fast convert ckpt.pth --out my-model             a checkpoint of another repository
    """
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


@click.command()
@click.argument("model", required=False)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    show_default=True,
    help="auto is float32.",
)
@model_options()
def info(model: str | None, device: str, dtype: str, **values: Any) -> None:
    """Versions, compilers and devices; with MODEL also its size, which engine would run, and why.

    MODEL is a local folder, a name on the Hub such as google/ddpm-cifar10-32, ddim-fast/digits, or a checkpoint file
    of the original DDIM repository, guided-diffusion or improved-diffusion: what it was recognized as, what was given
    and what had to be assumed is said, too.
    """
    told = loading_options(values)
    if model is None and told:
        raise click.UsageError(f"--{next(iter(told)).replace('_', '-')} is about a MODEL; name one")
    for name, value in [*version_lines(), *compiled_lines(), *device_lines()]:
        click.echo(f"{name:<12} {value}")
    if model is None:
        click.echo(f"{'engines':<12} graph and fused on CUDA, fused on the CPU, plain anywhere")
        return
    try:
        recognized = recognized_file(model, told)
        lines = [] if recognized is None else recognized_lines(recognized)
        lines += model_lines(model, device, dtype, told)
    except (ValueError, TypeError, OSError) as error:
        raise click.UsageError(in_options(str(error))) from error
    for name, value in lines:
        click.echo(f"{name:<12} {value}")


def version_lines() -> list[tuple[str, str]]:
    """The versions that a bug report needs."""
    import torch

    from .kernels.optional_triton import missing, triton

    return [
        ("ddim_fast", __version__),
        ("python", platform.python_version()),
        ("torch", str(torch.__version__)),
        (
            "triton",
            triton.__version__ if missing is None else f"none, so CUDA devices run the plain modules: {missing}",
        ),
    ]


def compiled_lines() -> list[tuple[str, str]]:
    """What compiles kernels here, and which are compiled already."""
    from .engine.cpu import native

    # Triton looks for one in this order, when it builds what launches a kernel.
    compilers = [os.environ.get("CC"), *map(shutil.which, ("gcc", "clang", "cl" if os.name == "nt" else "cc"))]
    compiler = next((found for found in compilers if found), None)
    return [
        ("C compiler", compiler or "none, so neither Triton's launchers nor the CPU kernels can be built"),
        ("CPU kernels", native.state()),
    ]


def device_lines() -> list[tuple[str, str]]:
    """The processor and every CUDA device."""
    import torch

    lines = [("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        return [*lines, ("cuda", "no device")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        lines.append(
            (f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}")
        )
    return lines


def model_lines(model: str, device: str, dtype: str, told: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    """What a model is, and how it would run."""
    import torch

    from .devices import pick_device
    from .pipeline import DDIMPipeline
    from .request import image_size

    target = pick_device(device)
    options: dict[str, Any] = dict(told or {}) | ({} if dtype == "auto" else {"torch_dtype": getattr(torch, dtype)})
    pipe = DDIMPipeline.from_pretrained(model, device=target, **options)
    config = pipe.unet.config
    height, width = image_size(config)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in pipe.unet.parameters())
    name, reason = pipe.runner.choose()
    classes = config.num_class_embeds
    return [
        ("model", model),
        (
            "images",
            f"{height}x{width}, {config.in_channels} channels, " + (f"{classes} classes" if classes else "no classes"),
        ),
        ("parameters", f"{pipe.unet.num_parameters() / 1e6:.1f} million, {weights / 2**20:.1f} MiB in {pipe.dtype}"),
        ("blocks", ", ".join([*config.down_block_types, *config.up_block_types])),
        ("scheduler", f"{config_schedule(pipe)}"),
        ("device", str(pipe.device)),
        ("engine", f"{name}: {reason}"),
    ]


def config_schedule(pipe: Any) -> str:
    """The noise schedule in a few words."""
    config = pipe.scheduler.config
    return f"{config.beta_schedule}, {config.num_train_timesteps} training steps, predicts {config.prediction_type}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: mistakes end with exit code 2 and one line, never with a traceback."""
    try:
        code = group.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        click.echo(f"ddim-fast: {error}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
