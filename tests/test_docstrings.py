"""Examples in public docstrings run as they stand, and what a user calls has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import ddim_fast
import ddim_fast.kernels

# What a user of the package calls by name, beside the kernels' operators.
CALLED = {
    "ddim_fast.DDIMPipeline": ("__call__", "from_pretrained", "save_pretrained", "from_pipe", "to", "compile"),
    "ddim_fast.DDIMScheduler": ("set_timesteps", "step", "add_noise", "from_config", "from_pretrained"),
    "ddim_fast.UNet2DModel": ("forward", "from_pretrained"),
    "ddim_fast.generate": (),
}


def public_objects():
    """(name, object) of every public class, method and function above, and of every kernel's public operator."""
    for name, methods in CALLED.items():
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        yield name, found
        for method in methods:
            yield f"{name}.{method}", inspect.getattr_static(found, method)
    for info in pkgutil.iter_modules(ddim_fast.kernels.__path__):
        module = importlib.import_module(f"ddim_fast.kernels.{info.name}")
        operator = getattr(module, info.name, None)
        # `launch` starts kernels for the others.
        if inspect.isfunction(operator) and info.name != "launch":
            yield f"ddim_fast.kernels.{info.name}.{info.name}", operator


OBJECTS = dict(public_objects())


def examples_of(name):
    found = OBJECTS[name]
    found = getattr(found, "__func__", found)
    names = dict(vars(inspect.getmodule(found)))
    return doctest.DocTestParser().get_doctest(inspect.getdoc(found) or "", names, name, None, 0)


@pytest.mark.parametrize("name", OBJECTS)
def test_a_public_docstring_has_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    test = examples_of(name)
    assert test.examples, f"the docstring of {name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    problems = []
    runner.run(test, out=problems.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(problems)
