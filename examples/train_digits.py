"""Train the bundled digits model: a small DDPM on MNIST at 32x32.

    python examples/train_digits.py --data mnist.npz --out digits/

`mnist.npz` is Keras's file (x_train: uint8 (N, 28, 28)). The run writes a checkpoint every
`--save-every` steps and goes on from it when it is started again.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel


def digits_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=8,
    )


def load_images(path: Path) -> torch.Tensor:
    """All digits as float32 (N, 1, 32, 32) in [-1, 1], padded from 28x28 with black."""
    images = torch.from_numpy(np.load(path)["x_train"]).float() / 127.5 - 1
    return torch.nn.functional.pad(images[:, None], (2, 2, 2, 2), value=-1.0)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def loss_weights(scheduler: DDIMScheduler, balance: bool) -> torch.Tensor:
    """The weight of every timestep's squared error of the noise: 1, or (min(SNR, 5) + 1) / SNR, at most 200.

    An error e of the noise is an error e / sqrt(SNR) of the image. Unweighted, the steps that decide which digit it
    will be (SNR far below 1) hardly count; those that polish the grain (SNR above 5, Hang et al. 2023) count most.
    """
    if not balance:
        return torch.ones_like(scheduler.alphas_cumprod)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    return ((snr.clamp(max=5.0) + 1) / snr).clamp(max=200.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz in Keras's layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline, the log and the grid")
    parser.add_argument(
        "--start", help="a pipeline to begin from, such as ddim-fast/digits, instead of random weights"
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights that are saved")
    parser.add_argument(
        "--balance", action="store_true", help="weigh steps by what they are worth to the image, not to the noise"
    )
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    images = load_images(args.data)
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    weights = loss_weights(scheduler, args.balance).to(device)
    unet = digits_unet() if args.start is None else DDIMPipeline.from_pretrained(args.start).unet
    unet = unet.to(device)
    ema = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, weight_decay=1e-4)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file, log_file = args.out / "training.pt", args.out / "loss.jsonl"

    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        unet.load_state_dict(state["unet"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        print(f"going on from step {start}")

    losses: list[float] = []
    clock = time.perf_counter()
    unet.train()
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        clean = images[torch.randint(len(images), (args.batch,))].to(device)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(1000, (args.batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
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

        done = step + 1
        if done % 50 == 0:
            record = {"step": done, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - clock}
            print(json.dumps(record), flush=True)
            with log_file.open("a") as log:
                log.write(json.dumps(record) + "\n")
            losses.clear()
        if done % args.save_every == 0 or done == args.steps:
            state = {"step": done, "unet": unet.state_dict(), "ema": ema.state_dict()}
            temporary = state_file.with_suffix(".tmp")
            torch.save(state | {"optimizer": optimizer.state_dict()}, temporary)
            temporary.replace(state_file)

    pipe = DDIMPipeline(copy.deepcopy(ema).to(torch.float16), scheduler)
    pipe.save_pretrained(args.out)
    pipe = DDIMPipeline(ema, scheduler)
    pictures = pipe(64, num_inference_steps=50, generator=torch.Generator().manual_seed(0), output_type="np").images
    rows = pictures.reshape(8, 8, 32, 32).transpose(0, 2, 1, 3).reshape(256, 256)
    DDIMPipeline.numpy_to_pil(rows[None, :, :, None])[0].save(args.out / "grid.png")
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
