"""What a job costs beside the sampling: `python benchmarks/bench_generation.py [--model ddim-fast/digits]`.

1. Writers: a pipeline faked to return 20,000 32×32 images a second feeds each format; images a second, whole and
   durable, processor time an image, and the peak of the memory in each third of the job. Beside it how many files a
   second a plain loop creates in that folder at that moment: an ext4 without a journal that has just deleted many
   takes up to 30 times as long for each, for minutes, and then it is the disk that is measured.
2. Encoder: PNGs a second of processor time, of `write_png` and of Pillow.
3. Job: images a second of a job with PNG over those of the bare pipeline at the same batch. Each round runs bare,
   job, job, bare, so that a machine that slows down steadily slows both alike; the result is the median of the rounds'
   ratios. Beside it the share of the job's time in which it waits for no sampling, which no slow machine blurs.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddim_fast import DDIMPipeline
from ddim_fast.generation import generate
from ddim_fast.generation.formats.png import write_png

FAKED_RATE = 20_000


class FakedPipeline:
    """Returns smooth noisy pictures at `FAKED_RATE` images a second, without computing them."""

    device, dtype, engine = torch.device("cpu"), torch.float32, "plain"
    exact = False

    def __init__(self, pictures: np.ndarray):
        unet: Any = torch.nn.Linear(1, 1)
        unet.config = {
            "sample_size": pictures.shape[1],
            "out_channels": pictures.shape[3],
            "block_out_channels": (8,),
            "num_class_embeds": None,
            "class_embed_type": None,
        }
        self.unet = unet
        self.scheduler = SimpleNamespace(config={}, set_timesteps=lambda *_: None)
        self.pictures = pictures
        self.next = 0.0

    def sample_uint8(self, batch_size: int, seeds: list[int], **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        now = time.perf_counter()
        time.sleep(max(0.0, self.next - now))
        self.next = max(now, self.next) + batch_size / FAKED_RATE
        # By numpy: the threads of a torch operator would spin for a while and take the writers' processors.
        images = torch.from_numpy(self.pictures[np.asarray(seeds) % len(self.pictures)])
        return images, torch.zeros(batch_size, dtype=torch.bool)


def pictures(count: int = 512, size: int = 32) -> np.ndarray:
    """Smooth colour fields with a little noise, which compress about as photographs of that size do."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(128, 60, (count, 3, 5, 5))).float()
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").permute(0, 2, 3, 1).numpy()
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


class PeakMemory:
    """Samples this process's resident memory; `thirds()` gives the peak of each third of the time, in MiB."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.thread.join()

    def thirds(self) -> list[int]:
        parts = np.array_split(np.array(self.samples), 3)
        return [int(part.max()) for part in parts]

    def _watch(self) -> None:
        while not self.stop.wait(0.02):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append(pages * 4096 >> 20)


def files_per_second(folder: Path, count: int = 1000) -> int:
    """Files of a PNG's size that a plain loop creates in `folder` in a second, without a flush to disk."""
    folder.mkdir()
    start = time.perf_counter()
    for number in range(count):
        (folder / str(number)).write_bytes(bytes(2700))
    return round(count / (time.perf_counter() - start))


def bench_writers(folder: Path, images: dict[str, int], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Images a second and peak memory of each format behind the faked pipeline, in each of `rounds`."""
    results: dict[str, list[dict[str, Any]]] = {format: [] for format in images}
    for number in range(rounds):
        for format, count in images.items():
            # Nothing is deleted before the end: the next round would pay for it.
            out = folder / f"{format}-{number}"
            bare = files_per_second(folder / f"bare-{format}-{number}")
            pipe, busy = FakedPipeline(pictures()), time.process_time()
            with PeakMemory() as memory:
                report = generate(
                    pipe, f"0-{count - 1}", out, batch_size=64, format=format, progress=False, shard="0/1"
                )
            result = {
                "images": count,
                "images_per_second": round(report.images_per_second),
                "files_per_second_of_a_plain_loop": bare,
                "cpu_ms_per_image": round(1e3 * (time.process_time() - busy) / count, 4),
                "peak_mib_by_third": memory.thirds(),
                "time_in": {name: round(spent, 2) for name, spent in report.time_in.items()},
            }
            results[format].append(result)
    return results


def bench_encoder(count: int = 1000) -> dict[str, int]:
    """PNGs a second of processor time, and bytes of one."""
    many, text = list(pictures()) * (1 + count // 512), {"seed": b"12345", "settings": b"{}" * 100}

    def pillow(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    results = {}
    for name, encode in (("write_png", lambda image: write_png(image, text)), ("pillow_level_1", pillow)):
        busy = time.process_time()
        size = sum(len(encode(image)) for image in many[:count])
        results[f"{name}_per_cpu_second"] = round(count / (time.process_time() - busy))
        results[f"{name}_bytes"] = size // count
    return results


def bench_job(folder: Path, model: str, batch: int, batches: int, steps: int, rounds: int) -> dict[str, Any]:
    """A PNG job against the bare pipeline, in `rounds` of bare, job, job, bare."""
    pipe = DDIMPipeline.from_pretrained(model, device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    seeds = range(batch * batches)
    pipe(batch_size=batch, seeds=list(range(batch)), num_inference_steps=2, output_type="uint8")
    bare: list[float] = []
    job: list[float] = []
    beside: list[float] = []

    def run_bare() -> None:
        start = time.perf_counter()
        for first in range(0, len(seeds), batch):
            pipe(
                batch_size=batch,
                seeds=list(range(first, first + batch)),
                num_inference_steps=steps,
                output_type="uint8",
            )
        bare.append(time.perf_counter() - start)

    def run_job() -> None:
        out = folder / f"job-{len(job)}"
        report = generate(pipe, seeds, out, num_inference_steps=steps, batch_size=batch, progress=False, shard="0/1")
        job.append(report.seconds)
        beside.append(1 - report.time_in["sampling"] / report.seconds)

    for _ in range(rounds):
        for run in (run_bare, run_job, run_job, run_bare):
            run()
    ratios = np.array(bare).reshape(rounds, 2).sum(1) / np.array(job).reshape(rounds, 2).sum(1)
    return {
        "bare": [round(len(seeds) / seconds, 1) for seconds in bare],
        "job": [round(len(seeds) / seconds, 1) for seconds in job],
        "ratios": [round(ratio, 3) for ratio in ratios.tolist()],
        "median_ratio": round(float(np.median(ratios)), 3),
        "middle_half_of_ratios": [round(float(ratio), 3) for ratio in np.quantile(ratios, [0.25, 0.75])],
        "share_beside_sampling": round(float(np.median(beside)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="also measure a job with this model, such as ddim-fast/digits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9, help="of job and bare pipeline, twice each")
    parser.add_argument("--writer-rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=20_000, help="PNGs to write (the array gets five times as many)")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        counts = {"png": options.images, "npz": 5 * options.images}
        results: dict[str, Any] = {"encoder": bench_encoder()}
        if options.writer_rounds:
            results["writers"] = bench_writers(Path(folder), counts, options.writer_rounds)
        if options.model:
            results["job"] = bench_job(
                Path(folder), options.model, options.batch, options.batches, options.steps, options.rounds
            )
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
