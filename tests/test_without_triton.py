"""Where Triton cannot be imported everything but the kernels themselves works, and what needs them says so."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ddim_fast
from ddim_fast.engine.cpu import native

ROOT = Path(ddim_fast.__file__).parent.parent

HIDDEN = """
import sys
from importlib.abc import MetaPathFinder

class NoTriton(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
"""


@pytest.fixture(scope="module")
def without_triton(tmp_path_factory):
    """Run Python code, or a command of `python -m`, in an own process and folder where Triton cannot be imported."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "sitecustomize.py").write_text(HIDDEN)

    def run(*arguments, env=None, code=0, hidden=True):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}" if hidden else str(ROOT), **(env or {})}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def test_triton_is_hidden(without_triton):
    done = without_triton("-c", "import triton", code=1)
    assert "No module named 'triton'" in done.stderr


ALL_CALLS = """
import itertools, torch
from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel

unet = UNet2DModel(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)
pipe = DDIMPipeline(unet, DDIMScheduler())
pipe.set_progress_bar_config(disable=True)
calls = 0
for engine, output_type, seeds in itertools.product(
    ("auto", "plain", "fused", "graph"), ("pil", "np", "pt", "uint8", "latent"), (None, [3, 4])
):
    pipe.engine = engine
    images = pipe(
        2, num_inference_steps=2, eta=1.0, seeds=seeds, output_type=output_type
    ).images
    assert len(images) == 2
    calls += 1
print(calls)
"""


def test_every_engine_gives_every_output_with_and_without_seeds(without_triton):
    assert without_triton("-c", ALL_CALLS).stdout.split()[-1] == "40"


FOUND = """
import hashlib, sys
from ddim_fast import DDIMPipeline

pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
images = pipe(2, num_inference_steps=2, eta=0.5, seeds=[1, 2], output_type="np").images
print("triton" in sys.modules, hashlib.sha256(images.tobytes()).hexdigest())
"""


def test_the_pictures_are_those_that_stand_beside_triton(without_triton):
    hidden = without_triton("-c", FOUND).stdout.split()
    beside = without_triton("-c", FOUND, hidden=False).stdout.split()
    assert hidden[1] == beside[1]
    assert (hidden[0], beside[0]) == ("False", "True")


def readme_snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def test_the_first_snippet_of_the_readme_runs(without_triton):
    """On the CPU, and with the bundled model: the snippet's own is a download, and its device may not be there."""
    snippet = readme_snippets("python")[0]
    assert "DDIMPipeline.from_pretrained(" in snippet
    snippet = snippet.replace('"google/ddpm-cifar10-32"', '"ddim-fast/digits"').replace('"cuda"', '"cpu"')
    snippet = snippet.replace("batch_size=64, num_inference_steps=50", "2, num_inference_steps=2")
    assert without_triton("-c", snippet + "print(len(images))").stdout.split()[-1] == "2"


def test_the_first_example_of_the_command_line_runs(without_triton, tmp_path):
    example = re.search(r"ddim-fast (generate .*)$", readme_snippets("bash")[0], re.M).group(1).split()
    example[example.index("--out") + 1] = str(tmp_path / "samples")
    without_triton("-m", "ddim_fast.cli", *example, "--steps", "2", "--seeds", "0-3")
    assert (tmp_path / "samples" / "000003.png").exists()


def test_a_job_runs_and_is_verified(without_triton, tmp_path):
    options = ["--seeds", "0-9", "--batch", "4", "--steps", "2", "--eta", "1", "--format", "npz"]
    without_triton("-m", "ddim_fast.cli", "generate", "ddim-fast/digits", *options, "--out", str(tmp_path))
    verified = without_triton("-m", "ddim_fast.cli", "verify", str(tmp_path))
    assert "10" in verified.stdout


def test_info_says_what_is_missing(without_triton):
    said = without_triton("-m", "ddim_fast.cli", "info").stdout
    assert re.search(
        r"^triton +none, so CUDA devices run the plain modules: .*No module named 'triton'", said, re.M
    ), said


def test_a_kernel_that_is_launched_all_the_same_names_cause_and_remedy(without_triton):
    code = """
import torch
from ddim_fast.kernels import to_uint8
to_uint8._launch_to_uint8(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(1).int())
"""
    error = without_triton("-c", code, code=1).stderr.splitlines()[-1]
    assert "No module named 'triton'" in error and "pip install 'ddim_fast[cuda]'" in error


def test_asking_for_the_interpreter_is_answered(without_triton):
    done = without_triton("-c", FOUND, env={"TRITON_INTERPRET": "1"})
    assert "TRITON_INTERPRET=1 has no effect" in done.stderr


ON_CUDA = """
import json, torch
from torch._subclasses import FakeTensorMode
from ddim_fast import DDIMPipeline
from ddim_fast.kernels.launch import use_triton

pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
card = torch.device("cuda")
with FakeTensorMode():
    kernels = use_triton(torch.empty(1, device="cuda"))
print(json.dumps([*pipe.runner.choose(card), pipe.runner.packed_unet(card) is None, kernels]))
"""


def test_on_cuda_the_plain_modules_are_captured_and_it_is_said(without_triton):
    name, reason, plain, kernels = json.loads(without_triton("-c", ON_CUDA).stdout.splitlines()[-1])
    assert name == "graph" and "Triton" in reason and "the plain modules are captured" in reason
    assert plain and not kernels


def test_info_says_what_is_there(without_triton):
    said = without_triton("-m", "ddim_fast.cli", "info", hidden=False).stdout
    assert re.search(r"^triton +\d+\.\d+", said, re.M), said
    kernels = re.search(r"^CPU kernels +(.*)$", said, re.M).group(1)
    assert kernels == native.state()
    assert (native.library() is None) == (kernels not in ("AVX-512", "AVX2", "the processor's basic vectors"))
    compiler = re.search(r"^C compiler +(.*)$", said, re.M).group(1)
    assert Path(compiler).exists() or compiler.startswith("none")
