"""Discovery: a method, metric, attack or model family is one file, whose class is found by its `name`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from safemax_sd.core.errors import OptionError

T = TypeVar("T")


def closest(name: str, names: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest of `names`, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class Registry(Generic[T]):
    """Concrete subclasses of `base` in the modules of one package.

    Args:
        kind: Noun for the subclasses in error messages, such as `objective`.
        base: Abstract base class with a `name` attribute.
        package: Import path of the package whose modules are searched.
        option: Flag that names a subclass, for errors; that of the kind if not given.
    """

    def __init__(self, kind: str, base: type[T], package: str, *, option: str | None = None) -> None:
        self.kind, self.base, self.package = kind, base, package
        self.option = option or f"--{kind.replace(' ', '_')}"

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._classes())

    def get(self, name: str) -> type[T]:
        """Return the class with a name.

        Raises:
            OptionError: No class has that name; the message suggests the nearest.
        """
        classes = self._classes()
        if name not in classes:
            allowed = f"no such {self.kind}{closest(name, classes)}; there are: {', '.join(sorted(classes))}"
            raise OptionError(self.option, name, allowed)
        return classes[name]

    def _classes(self) -> dict[str, type[T]]:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        found: dict[str, type[T]] = {}
        for cls in _subclasses(self.base):
            if inspect.isabstract(cls):
                continue
            name = str(cls.name)
            if found.get(name, cls) is not cls:  # a class with two bases is listed twice
                raise TypeError(f"two {self.kind} classes are named {name!r}: {found[name]} and {cls}")
            found[name] = cls
        return found


def _subclasses(base: type[Any]) -> list[type[Any]]:
    direct = base.__subclasses__()
    return [*direct, *(deeper for cls in direct for deeper in _subclasses(cls))]
