import runpy
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

# A checkout without symbolic links (Windows without developer mode, some archives) has a text file in its place.
if not Path("ddim_fast/kernels").is_dir():
    raise SystemExit(
        "ddim_fast/kernels is no folder but should be a symbolic link to ../kernels: this checkout was made without "
        "symbolic links. Clone again with `git clone -c core.symlinks=true`, or install a wheel or an sdist, which "
        "need none."
    )

# CUDA builds of PyTorch for Linux bring the one that fits.
cuda = ["triton>=3.2; platform_system == 'Linux'"]
peers = ["diffusers>=0.30", "accelerate"]
webdataset = ["webdataset"]
parquet = ["pyarrow"]
plots = ["matplotlib"]
ray = ["ray[data]"]
s3 = ["s3fs"]
test = [
    *(
        "pytest",
        "pytest-benchmark",
        "pytest-xdist",
        "hypothesis",
        "scipy",
        "ruff",
        "mypy",
        "types-PyYAML",
        "import-linter",
        "clang-format",
    ),
    *(*cuda, *peers, *webdataset, *parquet, *plots, *ray, *s3, "datasets", "moto[server]"),
]

cpu = Path("ddim_fast/engine/cpu")
constants = runpy.run_path(str(cpu / "constants.py"))
# Without a C compiler the installation goes on, and PyTorch's operators take the place of these kernels.
cpu_kernels = Extension(
    "ddim_fast.engine.cpu._kernels",
    sorted(str(path) for path in cpu.glob("*.c")),
    # The variants include other C files.
    depends=[*sorted(str(path) for path in cpu.glob("*.[ch]")), str(cpu / "constants.py")],
    define_macros=[(name, str(value)) for name, value in constants.items() if name.isupper()],
    extra_compile_args=[]
    if sys.platform == "win32"
    else ["-O3", "-ffp-contract=fast", "-Wno-psabi", "-Wpointer-arith"],
    libraries=[] if sys.platform == "win32" else ["m"],
    optional=True,
)

setup(
    name="ddim_fast",
    version="0.1.0",
    description="A drop-in DDIMPipeline, rebuilt for speed: Triton kernels, CUDA graphs, high-volume generation",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # `ddim_fast/kernels` is a link to `kernels/`: an ordinary package for setuptools and type checkers. The explicit
    # root makes an editable install a path in site-packages, which they can follow, instead of an import hook.
    packages=find_packages(include=["ddim_fast", "ddim_fast.*"]),
    package_dir={"": "."},
    package_data={"ddim_fast": ["py.typed", "bundled/*/*", "bundled/*/*/*"]},
    ext_modules=[cpu_kernels],
    install_requires=[
        "torch>=2.6",
        "numpy",
        "pillow",
        "safetensors",
        "huggingface_hub",
        "filelock",
        "msgspec",
        "fsspec",
        "tqdm",
        "click",
        "pyyaml",
    ],
    extras_require={
        "cuda": cuda,
        "ray": ray,
        "webdataset": webdataset,
        "parquet": parquet,
        "plots": plots,
        "s3": s3,
        "test": test,
        "bench": [*peers, "pytest-benchmark", *plots, "onnx", "onnxscript", "onnxruntime", "openvino"],
    },
    entry_points={"console_scripts": ["ddim-fast = ddim_fast.cli:main"]},
)
