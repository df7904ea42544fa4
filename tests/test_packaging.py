"""What an installation brings: every module and file, and types that a checker in another folder resolves."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import ddim_fast

ROOT = Path(ddim_fast.__file__).parent.parent
IGNORED = shutil.ignore_patterns(
    *(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "*.so", ".*_cache", "samples", ".hypothesis")
)

USER = """
import numpy as np
import torch
from PIL import Image
from typing_extensions import assert_type

from ddim_fast import DDIMPipeline, DDIMScheduler, UNet2DModel, generate
from ddim_fast.kernels.attention import attention

pipe = DDIMPipeline.from_pretrained("ddim-fast/digits", torch_dtype=torch.float32)
assert_type(pipe, DDIMPipeline)
assert_type(attention(torch.zeros(1, 4, 24), 1), torch.Tensor)
assert_type(UNet2DModel.from_pretrained("ddim-fast/digits", subfolder="unet"), UNet2DModel)
assert_type(DDIMScheduler.from_pretrained("ddim-fast/digits"), DDIMScheduler)
assert_type(pipe(2).images, list[Image.Image])
assert_type(pipe(2, None, 0.0, 10, output_type="pil", seeds=[1, 2]).images, list[Image.Image])
assert_type(pipe(output_type="np", seeds=[1, 2]).images, np.ndarray)
assert_type(pipe(output_type="uint8", return_dict=False), tuple[np.ndarray])
assert_type(pipe(output_type="pt", return_dict=True).images, torch.Tensor)
assert_type(pipe(output_type="latent", latents=torch.zeros(1, 1, 32, 32)).images, torch.Tensor)
assert_type(pipe(return_dict=False)[0], list[Image.Image])
report = generate("ddim-fast/digits", seeds=range(4), out="samples", num_inference_steps=10)
assert_type(report.made, int)
"""

WRONG = """
from ddim_fast import DDIMPipeline, generate

pipe = DDIMPipeline.from_pretrained("ddim-fast/digits")
pipe("two")  # wrong
pipe(2, seed=3)  # wrong
pipe(2).images.mean()  # wrong
DDIMPipeline.from_pretrained("ddim-fast/digits", torch_dtype="half")  # wrong
generate("ddim-fast/digits", seeds=range(4), out=3)  # wrong
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project, in which building leaves its files. No C compiler: building the kernels has tests."""
    copy = tmp_path_factory.mktemp("packaging") / "ddim_fast"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=IGNORED)
    return copy


def run(command, cwd, code=0):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, "CC": "false", "CXX": "false"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tree):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "-w", "dist", "."], tree)
    return next((tree / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tree):
    run([sys.executable, "setup.py", "-q", "sdist", "--formats=gztar"], tree)
    return next((tree / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(tree, wheel, sdist, tmp_path_factory):
    """An environment for each way of installing: its interpreter. What ddim_fast needs comes from this one's."""

    def install(how):
        environment = tmp_path_factory.mktemp(how)
        run([sys.executable, "-m", "venv", "--without-pip", environment], environment)
        python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], environment).strip())
        (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        what = {"wheel": [wheel], "sdist": [sdist], "editable": ["-e", tree]}[how]
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
        run([*pip, "--no-build-isolation", *what], environment)
        return python

    return {how: install(how) for how in ("wheel", "sdist", "editable")}


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Run mypy over a user's program in a folder of its own, with one cache for all."""
    cache = tmp_path_factory.mktemp("mypy_cache")

    def check(python, program, folder, code=0):
        (folder / "user.py").write_text(program)
        command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache, "--python-executable", python]
        return run([*command, "user.py"], folder, code)

    return check


def modules_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")} | {
        str(path.relative_to(folder)) for path in (folder / "kernels").glob("*.py")
    }


def test_wheel_and_sdist_hold_every_module_and_the_bundled_files(tree, wheel, sdist):
    wanted = {f"ddim_fast/{name}" for name in modules_of(tree / "ddim_fast")}
    assert "ddim_fast/kernels/attention.py" in wanted
    wanted |= {"ddim_fast/py.typed", "ddim_fast/bundled/digits/model_index.json"}
    with zipfile.ZipFile(wheel) as archive:
        assert wanted <= set(archive.namelist())
        assert not [name for name in archive.namelist() if name.startswith("kernels")]
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        sources = {str(path.relative_to(tree)) for path in (tree / "ddim_fast/engine/cpu").glob("*.[ch]")}
        assert wanted | sources | {"setup.py", "pyproject.toml", "README.md"} <= set(names)
        # Real files: an sdist may be unpacked where there are no links.
        assert names["ddim_fast/kernels/attention.py"].isfile()
        assert not [name for name, member in names.items() if member.issym()]


def test_triton_is_asked_for_by_no_plain_install(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
        lines = [line for line in archive.read(metadata).decode().splitlines() if "triton" in line.lower()]
    needed = [line for line in lines if line.startswith("Requires-Dist")]
    assert {re.search(r"extra == .(\w+)", line).group(1) for line in needed} == {"cuda", "test"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "sdist", "editable"])
def test_an_installation_imports_from_its_own_place(installed, how, tmp_path):
    code = "import ddim_fast.kernels.attention as module; print(module.__file__)"
    place = Path(run([installed[how], "-c", code], tmp_path).split()[-1])
    assert place.parts[-3:] == ("ddim_fast", "kernels", "attention.py")
    assert place.is_relative_to(installed[how].parents[1]) == (how != "editable")
    assert not place.is_relative_to(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wheel", "sdist", "editable"])
def test_mypy_resolves_the_types_in_another_folder(installed, mypy, how, tmp_path):
    assert "Success" in mypy(installed[how], USER, tmp_path)


@pytest.mark.slow
def test_mypy_finds_every_wrong_use(installed, mypy, tmp_path):
    said = mypy(installed["wheel"], WRONG, tmp_path, code=1)
    wrong = [number for number, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")]
    assert sorted({int(number) for number in re.findall(r"user.py:(\d+): error", said)}) == wrong


# What the README's snippets take from their reader.
READER = """
from typing import Any

from torch import nn

their_unet: nn.Module
their_scheduler_class: Any
their_scheduler: object
"""


@pytest.mark.slow
def test_the_snippets_of_the_readme_are_typed(installed, mypy, tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert snippets
    assert "Success" in mypy(installed["wheel"], READER + "\n".join(snippets), tmp_path)


def test_a_checkout_without_symbolic_links_says_so(tree, tmp_path):
    copy = tmp_path / "checkout"
    shutil.copytree(tree, copy, symlinks=True, ignore=IGNORED)
    (copy / "ddim_fast/kernels").unlink()
    (copy / "ddim_fast/kernels").write_text("../kernels")
    said = run([sys.executable, "setup.py", "--version"], copy, code=1)
    assert "ddim_fast/kernels" in said and "core.symlinks=true" in said
