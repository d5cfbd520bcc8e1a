"""Modules that are imported when they are first used."""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType


def imported_on_use(package: str) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public modules are imported on first use (PEP 562).

    Importing all of the library takes as long as importing JAX does; most programs use a part of it.

    Args:
        package: its name.

    Example:
        >>> getattr_, dir_ = imported_on_use("jaxcompress")
        >>> getattr_("tree").__name__, "pruning" in dir_()
        ('jaxcompress.tree', True)
    """
    path = sys.modules[package].__path__
    names = [module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")]

    def get(name: str) -> ModuleType:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*vars(sys.modules[package]), *names})


def import_all(package: str = "jaxcompress") -> None:
    """Imports all public modules: what registers itself when it is defined is then known.

    Example:
        >>> import_all()
        >>> "jaxcompress.quantization" in sys.modules
        True
    """
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")
