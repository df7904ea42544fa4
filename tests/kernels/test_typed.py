"""mypy cannot hold jitted functions to types, so it holds no function of `kernels/`: this does, for all others."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def is_jitted(function):
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def untyped(source):
    """The functions in `source` that are neither jitted nor typed throughout."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and not is_jitted(function):
            arguments = function.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            named += [rest for rest in (arguments.vararg, arguments.kwarg) if rest is not None]
            if function.returns is None or any(argument.annotation is None for argument in named):
                yield function.name


@pytest.mark.parametrize("file", sorted(KERNELS.glob("*.py")), ids=lambda file: file.stem)
def test_every_function_that_is_not_jitted_is_typed(file):
    assert list(untyped(file.read_text(encoding="utf-8"))) == []


def test_an_untyped_function_is_found():
    assert list(untyped("@triton.jit\ndef f(x): pass\ndef g(x: int): pass\ndef h(x: int) -> int: pass")) == ["g"]
