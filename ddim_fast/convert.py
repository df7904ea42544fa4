"""`ddim-fast convert`, and the options with which a command line says what a checkpoint file does not show."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from .checkpoints import Recognized

F = TypeVar("F", bound=Callable[..., Any])

# The entries of a `DDIMScheduler`'s config, listed so that --help needs no PyTorch.
SCHEDULER_ENTRIES: dict[str, Any] = {
    "num_train_timesteps": int,
    "beta_start": float,
    "beta_end": float,
    "beta_schedule": str,
    "trained_betas": str,
    "clip_sample": bool,
    "set_alpha_to_one": bool,
    "steps_offset": int,
    "prediction_type": str,
    "thresholding": bool,
    "dynamic_thresholding_ratio": float,
    "clip_sample_range": float,
    "sample_max_value": float,
    "timestep_spacing": str,
    "rescale_betas_zero_snr": bool,
    "previous_timestep": str,
    "use_clipped_model_output": bool,
}
TRAINING = ("config", "flags", "repository", "size", "out_channels", "null_label")
LOOKUP = ("subfolder", "variant")


def model_options(scheduler: bool = True) -> Callable[[F], F]:
    """Add --config, --flags, --size and the others to a command; `loading_options` reads them.

    Without `scheduler` the entries of its config, and what a conversion alone decides, have no options.
    """
    conversion = [
        click.option("--out-channels", type=int, help="Channels to keep of a model that learned its variance."),
        click.option("--null-label", type=int, help="The label that stands for no class, for guidance."),
    ]
    options = [
        click.option(
            "--config",
            metavar="NAME|FILE",
            help="Original DDIM: cifar10, celeba, bedroom, church or a config.yml; by default the one beside it.",
        ),
        click.option(
            "--flags",
            metavar="FLAGS",
            help="guided-diffusion, improved-diffusion: the flags of the training command, as one argument.",
        ),
        click.option(
            "--repository",
            type=click.Choice(["guided-diffusion", "improved-diffusion"]),
            help="Whose flags those are, where they mean two models.",
        ),
        click.option("--size", type=int, help="Height and width of the images, in place of what config or flags say."),
        click.option("--subfolder", help="The model is in this folder inside, such as unet_ema."),
        click.option("--variant", help="Take the weights of this variant, such as fp16."),
    ]
    if scheduler:
        options += conversion
        for name, kind in SCHEDULER_ENTRIES.items():
            dashed = name.replace("_", "-")
            flag = f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}"
            options.append(click.option(flag, name, type=kind, default=None, help=f"The scheduler's {name}."))

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def loading_options(values: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` is told by the options of `model_options`, taken out of `values`."""
    said = {name: values.pop(name, None) for name in (*TRAINING, *LOOKUP, *SCHEDULER_ENTRIES)}
    told = {name: value for name, value in said.items() if value is not None}
    if "trained_betas" in told:
        try:
            told["trained_betas"] = [float(beta) for beta in told["trained_betas"].split(",")]
        except ValueError:
            raise click.BadParameter(
                "must be numbers with commas between them", param_hint="--trained-betas"
            ) from None
    return told


def in_options(text: str, scheduler: bool = True) -> str:
    """An error of Python's arguments in the words of a command with `model_options`: `size=` is `--size`."""
    names = "|".join((*TRAINING, *LOOKUP, *(SCHEDULER_ENTRIES if scheduler else ())))
    spelt = re.sub(rf"(?<![\w-])({names})=(?=\S)", lambda m: f"--{m[1].replace('_', '-')} ", text)
    return re.sub(rf"(?<![\w-])({names})=", lambda m: f"--{m[1].replace('_', '-')}", spelt)


def recognized_file(weights: str, told: dict[str, Any]) -> Recognized | None:
    """What the file `weights` was recognized as; None for a folder, or a model on the Hub."""
    from .checkpoints import Training, is_single_file, recognize

    if not is_single_file(weights):
        return None
    return recognize(Path(weights).expanduser(), Training.taken_from(dict(told), SCHEDULER_ENTRIES))


def recognized_lines(recognized: Recognized) -> list[tuple[str, str]]:
    """What a file is, what was said about it and what was assumed, line by line."""
    given = [("given", f"{name} = {value}") for name, value in recognized.given.items()]
    assumed = [("assumed", in_options(guess)) for guess in recognized.assumed]
    return [
        ("recognized", recognized.title),
        *(given or [("given", "nothing")]),
        *(assumed or [("assumed", "nothing")]),
    ]


@click.command("convert")
@click.argument("weights")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write: new, or empty.")
@model_options()
def convert_command(weights: str, out: Path, **values: Any) -> None:
    """Write WEIGHTS as a folder that DDIMPipeline.from_pretrained, here and in diffusers, loads.

    WEIGHTS is a checkpoint file of the original DDIM repository, guided-diffusion or improved-diffusion, or a model
    that diffusers saved (with --subfolder unet_ema the moving average of its training script).

    \b
    ddim-fast convert ckpt.pth --out my-model
    ddim-fast convert ema_0.9999_250000.pt --out my-model \\
        --flags "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True"
    """
    told = loading_options(values)
    try:
        lines = convert(weights, out, told)
    except (ValueError, TypeError, OSError) as error:
        raise click.UsageError(in_options(str(error))) from error
    for name, value in lines:
        click.echo(f"{name:<12} {value}")


def convert(weights: str, out: Path, told: dict[str, Any]) -> list[tuple[str, str]]:
    """`ddim-fast convert` as a function: what it says, line by line.

    A model that learned its variance is written without it, unless `told["out_channels"]` asks for it. Raises
    `FileExistsError` if `out` holds something, and what `DDIMPipeline.from_pretrained` raises.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} is there and not an empty folder; give another, or empty it")
    recognized = recognized_file(weights, told)
    if recognized is not None and recognized.unet["out_channels"] > recognized.unet["in_channels"]:
        told = {"out_channels": recognized.unet["in_channels"], **told}

    from .checkpoints.card import CARD, loads_in_diffusers, model_card
    from .pipeline import DDIMPipeline

    pipe = DDIMPipeline.from_pretrained(weights, **told)
    pipe.save_pretrained(out)
    title, given, assumed = "a model as diffusers saves it", told, tuple[str, ...]()
    if recognized is not None:
        title, given, assumed = recognized.title, recognized.given, recognized.assumed
    card = model_card(weights, title, given, assumed, pipe.unet.config, pipe.scheduler.config)
    (out / CARD).write_text(card, encoding="utf-8")
    lines = [] if recognized is None else recognized_lines(recognized)
    loads = "" if loads_in_diffusers(pipe.unet.config) else " (diffusers cannot load it: several head widths)"
    return [*lines, ("written", f"{out}{loads}")]
