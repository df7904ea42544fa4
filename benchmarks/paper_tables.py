"""The tables of the DDIM paper (Song et al. 2021, arXiv:2010.02502), measured again on the bundled digits model.

    python benchmarks/paper_tables.py --data mnist.npz                           # everything: hours on a CPU
    python benchmarks/paper_tables.py --data mnist.npz --tables distance --steps 10,20 --repeats 1

`mnist.npz` is Keras's file. Rows go to `paper_tables.json` as soon as they are measured, and what stands there is not
measured again: the tables can be made in pieces, in any order. Every run writes `paper_tables.md` and, where
matplotlib is installed, `paper_tables.png` from all rows so far. A row whose sampler this version of the package
does not offer is named as missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from digit_judge import Digits, Judge, frechet_distance, load_digits, stored_judge
from paper_report import write_chart, write_markdown
from paper_rows import Row, all_rows, missing
from torch import Tensor

from ddim_fast import DDIMPipeline, DDIMScheduler

BATCH = 100
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FOLDER = Path(__file__).parent


def take_schedule(pipe: DDIMPipeline, row: Row) -> None:
    """Give `pipe` the row's timesteps; x₀ is never clipped, as in the paper's equations."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=row.spacing, clip_sample=False)


def draw(pipe: DDIMPipeline, row: Row, count: int, first: int, clock: Callable[[], float]) -> tuple[Tensor, float]:
    """`count` samples of the seeds from `first` on, float32 (count, 1, 32, 32), and the seconds they took."""
    seeds = range(first, first + count)
    batches = [seeds[start : start + BATCH] for start in range(0, count, BATCH)]
    pipe(seeds=batches[0], batch_size=len(batches[0]), num_inference_steps=1, output_type="latent")
    begin = clock()
    samples = [
        pipe(
            seeds=batch,
            batch_size=len(batch),
            num_inference_steps=row.steps,
            output_type="latent",
            **row.arguments(),
        ).images.cpu()
        for batch in batches
    ]
    return torch.cat(samples), clock() - begin


def measure_distance(
    pipe: DDIMPipeline,
    row: Row,
    judge: Judge,
    real: Tensor,
    images: int,
    repeat: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    """One cell: `images` samples against the features of `real` digits."""
    take_schedule(pipe, row)
    samples, seconds = draw(pipe, row, images, repeat * images, clock)
    return {
        "distance": frechet_distance(judge.features(samples), real),
        "confident": judge.confident(samples),
        "seconds": seconds,
    }


def measure_reconstruction(pipe: DDIMPipeline, row: Row, held_out: Digits, images: int) -> dict[str, float]:
    """Digits to latents and back: the mean squared error of a pixel on the scale of [0, 1], as in the paper's Table 2.

    The error is that of the two integrations alone: the picture is not clipped either.
    """
    take_schedule(pipe, row)
    errors = []
    for real in held_out.images[:images].split(BATCH):
        latents = pipe.invert(real, num_inference_steps=row.steps).latents
        back = pipe(batch_size=len(real), latents=latents, num_inference_steps=row.steps, output_type="latent").images
        errors.append(((back.cpu() - real) / 2).square().flatten(1).mean(1))
    return {"error": torch.cat(errors).mean().item()}


class Results:
    """The rows measured so far, in a file; it belongs to one model, one judge and one number of images a cell."""

    def __init__(self, file: Path, settings: dict) -> None:
        self.file, self.settings, self.rows = file, settings, {}
        if file.exists():
            stored = json.loads(file.read_text())
            differing = [name for name, value in settings.items() if stored["settings"].get(name) != value]
            if differing:
                name = differing[0]
                raise SystemExit(
                    f"{file} holds rows for {name}={stored['settings'].get(name)!r}, this run has {settings[name]!r}: "
                    "give another --out, or remove the file"
                )
            self.rows = stored["rows"]

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, values: dict[str, float]) -> None:
        """Keep one row and write the file anew, whole or not at all."""
        self.rows[key] = values
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1) + "\n")
        temporary.replace(self.file)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    def numbers(text: str) -> list[int]:
        return [int(word) for word in words(text)]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz in Keras's layout")
    parser.add_argument("--model", default="ddim-fast/digits")
    parser.add_argument("--out", type=Path, default=FOLDER / "paper_tables", help="path without ending")
    parser.add_argument("--judge", type=Path, help="file that keeps the classifier (default: beside --out)")
    parser.add_argument("--images", type=int, default=1000, help="samples in every cell, and digits reconstructed")
    parser.add_argument("--repeats", type=int, default=3, help="how often each distance is measured, with other seeds")
    parser.add_argument(
        "--tables", type=words, default=["distance", "frontier", "reconstruction"], help="only these, by commas"
    )
    parser.add_argument("--steps", type=numbers, help="only rows of these numbers of steps")
    parser.add_argument("--samplers", type=words, help="only rows of these samplers, such as 'eta 0' or 'order 2'")
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: processor time, on a machine with other work to do",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.images < 2 or args.repeats < 1:
        parser.error(f"--images must be at least 2 and --repeats 1, got {args.images} and {args.repeats}")
    if args.clock == "cpu" and not args.device.startswith("cpu"):
        parser.error(f"--clock cpu tells nothing of --device {args.device}")
    known = {table for row in all_rows() for table in row.tables}
    if unknown := set(args.tables) - known:
        parser.error(f"--tables must be of {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}")
    samplers = {row.sampler for row in all_rows()}
    if unknown := set(args.samplers or ()) - samplers:
        parser.error(f"--samplers must be of {', '.join(sorted(samplers))}; got {', '.join(sorted(unknown))}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    train, held_out = load_digits(args.data)
    judge = stored_judge(args.judge or args.out.with_suffix(".judge.safetensors"), train)
    pipe = DDIMPipeline.from_pretrained(args.model, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    real = judge.features(held_out.images)
    settings = {
        "model": args.model,
        "weights": weights_sum(pipe),
        "images": args.images,
        "judge_right": judge.right(held_out.images, held_out.labels),
        "real_confident": judge.confident(held_out.images),
        "real_distance": frechet_distance(judge.features(train.images[: len(held_out)]), real),
        "device": torch.cuda.get_device_name() if pipe.device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "clock": args.clock,
    }
    results = Results(args.out.with_suffix(".json"), settings)
    wanted = [
        row
        for row in all_rows()
        if set(args.tables) & set(row.tables)
        and (args.steps is None or row.steps in args.steps)
        and (args.samplers is None or row.sampler in args.samplers)
    ]
    # All cells once before any a second time: a run that is cut short leaves a whole table.
    for repeat in range(args.repeats):
        for row in wanted:
            if row.is_reconstruction and repeat:
                continue
            key = row.key(repeat)
            if key in results:
                continue
            if reason := missing(row, DDIMPipeline):
                if not repeat:
                    print(f"{key}: missing: {reason}", flush=True)
                continue
            try:
                if row.is_reconstruction:
                    values = measure_reconstruction(pipe, row, held_out, args.images)
                else:
                    values = measure_distance(pipe, row, judge, real, args.images, repeat, CLOCKS[args.clock])
            except ValueError as error:
                # The call takes the argument, but not (yet) this value of it; it says so before it does anything.
                if not any(str(error).startswith(name) for name in row.arguments()):
                    raise
                print(f"{key}: missing: {error}", flush=True)
                continue
            results.add(key, values)
            print(f"{key}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
    report = args.out.with_suffix(".md")
    chart = write_chart(results.rows, args.out.with_suffix(".png"))
    write_markdown(results.settings, results.rows, report, chart)
    print(f"written: {report}" + (f", {chart}" if chart else "; no chart: pip install 'ddim_fast[plots]'"))


def weights_sum(pipe: DDIMPipeline) -> str:
    """What tells one set of weights from another: the sum of all magnitudes, in float64."""
    return f"{sum(value.double().abs().sum().item() for value in pipe.unet.state_dict().values()):.6f}"


if __name__ == "__main__":
    main()
