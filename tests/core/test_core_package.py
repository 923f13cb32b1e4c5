"""The package as its users meet it."""

import inspect
import subprocess
import sys

import pytest

import diffem_core


def test_every_public_name_is_there_and_documented() -> None:
    for name in diffem_core.__all__:
        value = getattr(diffem_core, name)
        assert name in dir(diffem_core)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, name
    homes = {name for names in diffem_core._MODULES.values() for name in names}
    assert homes == set(diffem_core.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = diffem_core.nonsense


IMPORTS = [
    "import diffem_core.e_step",
    "from diffem_core.m_step import m_step as a",
    "from diffem_core import e_step, m_step",
]


@pytest.mark.parametrize("order", [IMPORTS, IMPORTS[::-1]])
def test_steps_are_functions_whatever_was_imported_before(order: list[str]) -> None:
    check = (
        "import diffem_core; print(callable(diffem_core.e_step) and callable(diffem_core.m_step))"
    )
    code = "\n".join([*order, check])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "True"


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys, diffem_core; print(sorted({'torch', 'numpy', 'deepinv'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_functions_take_no_sinks() -> None:
    for name in diffem_core.__all__:
        value = getattr(diffem_core, name)
        if inspect.isfunction(value):
            kinds = {p.kind for p in inspect.signature(value).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name
