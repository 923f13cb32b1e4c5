"""Each package knows only what the design lets it know, and light commands stay light."""

import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    code = f"""
import sys
{statement}
print(*sorted({{name.partition('.')[0] for name in sys.modules}}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


ALL_OF_CORE = """
import importlib, pkgutil, diffem_core
for module in pkgutil.walk_packages(diffem_core.__path__, 'diffem_core.'):
    importlib.import_module(module.name)
"""
ALL_OF_STORAGE = ALL_OF_CORE.replace("diffem_core", "storage_schemas")


def test_the_core_knows_neither_prefect_nor_stores() -> None:
    modules = modules_after(ALL_OF_CORE)
    assert "torch" in modules, "the loop must really have imported the package"
    assert not modules & {"prefect", "zarr", "fsspec", "xarray", "storage_schemas", "pipelines"}


def test_the_storage_knows_neither_torch_nor_prefect() -> None:
    modules = modules_after(ALL_OF_STORAGE)
    assert "zarr" in modules, "the loop must really have imported the package"
    assert not modules & {"torch", "prefect", "diffem_core", "pipelines"}


@pytest.mark.parametrize(
    "statement",
    [
        "import diffem_core",
        "import storage_schemas.config",
        "import pipelines.cli",
        "from pipelines.config_io import load_config; "
        "load_config('deploy/experiments/digits.yaml')",
        "import pipelines.status",
    ],
)
def test_light_imports_stay_light(statement: str) -> None:
    assert not modules_after(statement) & {
        "torch",
        "deepinv",
        "prefect",
        "zarr",
        "xarray",
        "matplotlib",
        "sklearn",
    }
