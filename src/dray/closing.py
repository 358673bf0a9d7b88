"""The base of everything that holds something: ``with`` closes it."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self


class Closing(abc.ABC):
    """A context manager whose block ends with `close`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what this object holds. Twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
