"""The examples in plugins' docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import featherlight.plugins

MODULES = [module.name for module in pkgutil.iter_modules(featherlight.plugins.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"featherlight.plugins.{name}"))
    assert result.failed == 0


def test_some_examples_exist() -> None:
    assert sum(doctest.testmod(importlib.import_module(f"featherlight.plugins.{name}")).attempted for name in MODULES) >= 5
