"""Faces of packages whose modules are imported on first use."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's `__getattr__`, which imports the module that holds a name, and its `__dir__`.

    Args:
        package: its `__name__`.
        modules: names, separated by spaces, by the module that holds them, relative to the package; no names: the
            module itself.

    Example:
        __getattr__, __dir__ = lazy_names(__name__, {"data.dataset": "CocoDataset DataError", "data": ""})
        CocoDataset  # from another module: imports data.dataset
    """
    places = {name: module for module, names in modules.items() for name in names.split() or [module]}

    def __getattr__(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{places[name]}")
        return module if name == places[name] else getattr(module, name)

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return __getattr__, __dir__
