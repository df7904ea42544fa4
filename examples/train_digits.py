"""Train the bundled digits models: small DDPMs on MNIST at 32x32, without classes or with ten and a null class.

    python examples/train_digits.py --data mnist.npz --out digits/
    python examples/train_digits.py --data mnist.npz --out digits-by-class/ --classes --start ddim-fast/digits

`mnist.npz` is Keras's file (x_train: uint8 (N, 28, 28), y_train: (N,)). The run writes its state every
`--save-every` steps and goes on from it when it is started again. Elsewhere it goes on from what the repository
holds, the averaged weights (a pipeline) and the current ones; only the optimizer then begins anew, with a warm-up:

    python examples/train_digits.py --data mnist.npz --out more/ --classes --start ddim-fast/digits-by-class \\
        --current examples/training/digits-by-class.safetensors --balance --expected --lr 4e-4 --batch 16 --steps 6000
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel

DIGITS = 10
NULL = DIGITS
"""The label that stands for no class: what guidance compares a class with."""


def digits_unet(labels: int | None = None) -> UNet2DModel:
    unet = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=8,
        num_class_embeds=labels,
    )
    if unet.class_embedding is not None:
        torch.nn.init.zeros_(unet.class_embedding.weight)
        unet.register_to_config(null_label=NULL)
    return unet


def load_digits(path: Path, held_out: int) -> tuple[Tensor, Tensor]:
    """All digits but the last `held_out`: float32 (N, 1, 32, 32) in [-1, 1], padded from 28x28 with black, and labels.

    Labels are (N,) int64.
    """
    with np.load(path) as data:
        count = len(data["x_train"]) - held_out
        images = torch.from_numpy(data["x_train"][:count]).float() / 127.5 - 1
        labels = torch.from_numpy(data["y_train"][:count]).long()
    return torch.nn.functional.pad(images[:, None], (2, 2, 2, 2), value=-1.0), labels


def starting_unet(start: str | None, classes: bool) -> UNet2DModel:
    """The pipeline's network; with `classes` and a network that has none, its weights and an empty class table."""
    if start is None:
        return digits_unet(DIGITS + 1 if classes else None)
    unet = DDIMPipeline.from_pretrained(start).unet.float()
    if classes == (unet.class_embedding is not None):
        return unet
    if not classes:
        raise SystemExit(f"--start {start} is class-conditional: add --classes")
    conditional = digits_unet(DIGITS + 1)
    conditional.load_state_dict(unet.state_dict() | {"class_embedding.weight": conditional.class_embedding.weight})
    return conditional


def learning_rate(step: int, begin: int, steps: int, peak: float, decay: int, warmup: int = 100) -> float:
    """Linear warm-up from `begin`, the peak, then a cosine down to a hundredth of it over the last `decay` steps."""
    rate = peak * min(1.0, (step - begin + 1) / warmup)
    left = steps - step
    if left >= decay:
        return rate
    return rate * (0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * left / decay)))


def loss_weights(scheduler: DDIMScheduler, balance: bool) -> Tensor:
    """The weight of every timestep's squared error of the noise: 1, or (min(SNR, 5) + 1) / SNR, at most 200.

    An error e of the noise is an error e / sqrt(SNR) of the image. Unweighted, the steps that decide which digit it
    will be (SNR far below 1) hardly count; those that polish the grain (SNR above 5, Hang et al. 2023) count most.
    """
    if not balance:
        return torch.ones_like(scheduler.alphas_cumprod)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    return ((snr.clamp(max=5.0) + 1) / snr).clamp(max=200.0)


def spread_timesteps(count: int, least: int, timesteps: int) -> Tensor:
    """(count,) timesteps, uniform over `least` and above, one in each of `count` equal parts: losses vary less."""
    parts = (torch.arange(count) + torch.rand(count)) / count
    return (least + parts * (timesteps - least)).long().clamp(max=timesteps - 1)


def expected_noise(noisy: Tensor, prods: Tensor, images: Tensor, allowed: Tensor | None) -> Tensor:
    """The mean of the noise in `noisy` (B, 1, H, W) over all `images` (N, 1, H, W) that it may have been made of.

    What the squared error's minimum is for these images, so that a target no longer varies with the one image that
    was drawn (the stable target field, Xu, Tong and Jaakkola 2023, over the whole set). `prods` are the timesteps' ᾱ,
    (B,); `allowed` (B, N) says which images have the sample's label, None all.
    """
    flat, known, prods = noisy.flatten(1), images.flatten(1), prods[:, None]
    # log p(noisy | image), less what all images share.
    scores = (prods.sqrt() * (flat @ known.T) - prods * known.square().sum(1) / 2) / (1 - prods)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(1) @ known
    return ((flat - prods.sqrt() * expected) / (1 - prods).sqrt()).view_as(noisy)


def save_grid(pipe: DDIMPipeline, path: Path) -> None:
    """64 samples, 50 steps; with classes the labels 0 to 9 six times over, then four samples of the null class."""
    labels = {}
    if pipe.unet.class_embedding is not None:
        labels = {"class_labels": [*range(DIGITS)] * 6 + [NULL] * 4}
    pictures = pipe(64, num_inference_steps=50, seeds=range(64), output_type="np", **labels).images
    rows = pictures.reshape(8, 8, 32, 32).transpose(0, 2, 1, 3).reshape(256, 256)
    DDIMPipeline.numpy_to_pil(rows[None, :, :, None])[0].save(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz in Keras's layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline, the log and the grid")
    parser.add_argument(
        "--start", help="a pipeline to begin from, such as ddim-fast/digits, instead of random weights"
    )
    parser.add_argument(
        "--current", type=Path, help="current weights and step of an earlier run, whose averaged ones are --start's"
    )
    parser.add_argument("--classes", action="store_true", help="condition on the digit; label 10 is the null class")
    parser.add_argument("--label-dropout", type=float, default=0.1, help="share of labels replaced by the null class")
    parser.add_argument("--held-out", type=int, default=1000, help="how many of the last digits to leave out")
    parser.add_argument("--steps", type=int, default=5000, help="the step to stop at")
    parser.add_argument("--decay", type=int, help="length of the cosine at the end (default: all steps)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights that are saved")
    parser.add_argument(
        "--balance", action="store_true", help="weigh steps by what they are worth to the image, not to the noise"
    )
    parser.add_argument(
        "--expected", action="store_true", help="predict the mean of the noise over all images that fit, not one draw"
    )
    parser.add_argument("--least-timestep", type=int, default=0, help="leave out the timesteps below")
    parser.add_argument(
        "--bfloat16", action="store_true", help="autocast: faster on a GPU, and on a CPU with bfloat16 instructions"
    )
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    images, digits = (part.to(device) for part in load_digits(args.data, args.held_out))
    # Clipping x_0 at each step would draw pictures of few and of many steps apart.
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    weights, prods = loss_weights(scheduler, args.balance).to(device), scheduler.alphas_cumprod.to(device)
    torch.manual_seed(args.seed)
    unet = starting_unet(args.start, args.classes).to(device)
    ema = copy.deepcopy(unet).requires_grad_(False)
    # A class's row of the table learns only from that class's images: it gets a tenfold rate.
    slow = [value for name, value in unet.named_parameters() if not name.startswith("class_embedding")]
    groups = [{"params": slow, "scale": 1.0}]
    if unet.class_embedding is not None:
        groups.append({"params": list(unet.class_embedding.parameters()), "scale": 10.0})
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=1e-4)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file, log_file = args.out / "training.pt", args.out / "loss.jsonl"

    start = begin = seen = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        unet.load_state_dict(state["unet"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, begin, seen = state["step"], state["begin"], state["images"]
    elif args.current is not None:
        unet.load_state_dict({name: value.float() for name, value in load_file(args.current).items()})
        with safe_open(args.current, "pt") as stored:
            start = begin = int(stored.metadata()["step"])
            seen = int(stored.metadata()["images"])
    if start:
        print(f"going on from step {start}")
        torch.manual_seed(args.seed + start)

    losses: list[float] = []
    clock = time.perf_counter()
    unet.train()
    for step in range(start, args.steps):
        rate = learning_rate(step, begin, args.steps, args.lr, args.decay or args.steps - begin)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        chosen = torch.randint(len(images), (args.batch,), device=device)
        clean, labels = images[chosen], None
        if args.classes:
            dropped = torch.rand(args.batch, device=device) < args.label_dropout
            labels = digits[chosen].masked_fill(dropped, NULL)
        noise = torch.randn_like(clean)
        timesteps = spread_timesteps(args.batch, args.least_timestep, 1000).to(device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        if args.expected:
            allowed = None if labels is None else (labels[:, None] == digits) | (labels[:, None] == NULL)
            noise = expected_noise(noisy, prods[timesteps], images, allowed)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16):
            predicted = unet(noisy, timesteps, labels).sample
        errors = (predicted.float() - noise).square().mean((1, 2, 3))
        loss = (errors * weights[timesteps]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for averaged, current in zip(ema.parameters(), unet.parameters(), strict=True):
                averaged.lerp_(current, 1 - decay)
        losses.append(errors.mean().item())
        seen += args.batch

        done = step + 1
        if done % 50 == 0:
            record = {"step": done, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - clock}
            print(json.dumps(record), flush=True)
            with log_file.open("a") as log:
                log.write(json.dumps(record) + "\n")
            losses.clear()
        if done % args.save_every == 0 or done == args.steps:
            state = {"step": done, "begin": begin, "images": seen}
            temporary = state_file.with_suffix(".tmp")
            modules = {"unet": unet, "ema": ema, "optimizer": optimizer}
            torch.save(state | {name: module.state_dict() for name, module in modules.items()}, temporary)
            temporary.replace(state_file)

    current = {name: value.to("cpu", torch.float16) for name, value in unet.state_dict().items()}
    save_file(current, args.out / "current.safetensors", {"step": str(args.steps), "images": str(seen)})
    DDIMPipeline(copy.deepcopy(ema).to(torch.float16), scheduler).save_pretrained(args.out)
    save_grid(DDIMPipeline(ema.eval(), scheduler), args.out / "grid.png")
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
