"""What importing the package costs, and what it must not disturb."""

import os
import subprocess
import sys
from pathlib import Path

import ddim_fast

ROOT = Path(ddim_fast.__file__).parent.parent


def run(code, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_neither_triton_nor_diffusers(tmp_path):
    code = "import sys, ddim_fast; print([name for name in ('triton', 'diffusers', 'click') if name in sys.modules])"
    assert run(code, tmp_path) == "[]"


def test_the_folder_kernels_is_empty_to_who_looks_for_the_package_of_that_name():
    """In the root of a clone `import kernels` finds our folder; it must not register the operators once more."""
    code = "import kernels, sys; print(hasattr(kernels, 'group_norm'), 'kernels.group_norm' in sys.modules)"
    assert run(code, ROOT) == "False False"
