"""A whole pipeline call in which every fused operation runs as its Triton kernel."""

import sys
from collections import Counter

import torch

from ddim_fast import DDIMPipeline
from ddim_fast.kernels import launch

OPERATIONS = {"ddim_step", "philox_normal", "group_norm", "add_residual", "attention", "interleave", "to_uint8"}


def count_launches(monkeypatch):
    """Which kernel files start kernels, and how often."""
    launched = Counter()
    for name, module in list(sys.modules.items()):
        package, _, operation = name.rpartition(".")
        if package == "ddim_fast.kernels" and operation in OPERATIONS:

            def counting(*args, operation=operation, original=module.launch, **kwargs):
                launched[operation] += 1
                return original(*args, **kwargs)

            monkeypatch.setattr(module, "launch", counting)
    return launched


def test_the_digits_model_runs_on_the_kernels(device, monkeypatch):
    """Batch 2, 2 steps, eta 0.5: the fused engine on the kernels against the plain modules on PyTorch."""
    pipe = DDIMPipeline.from_pretrained("ddim-fast/digits", device=device)
    pipe.set_progress_bar_config(disable=True)
    arguments = dict(batch_size=2, num_inference_steps=2, eta=0.5, seeds=[3, 4])
    launched = count_launches(monkeypatch)
    pipe.engine = "fused"
    # On a card TF32 would round the two engines' different convolutions differently.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fused = pipe(**arguments, output_type="uint8").images.astype(int)
    assert launched.keys() == OPERATIONS
    assert launched["ddim_step"] == 2 and launched["to_uint8"] == 1
    pipe.engine = "plain"
    with launch.interpret_cpu(False):
        plain = pipe(**arguments, output_type="uint8").images.astype(int)
    assert abs(fused - plain).max() <= 1
    assert (fused != plain).mean() <= 0.005
