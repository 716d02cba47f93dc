"""What a command has warned of, so that its last line can say so."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from embtune.errors import EmbtuneWarning


@contextmanager
def noted_warnings() -> Iterator[Collection[str]]:
    """The texts of embtune's own warnings so far, each once; they are shown as ever."""
    noted: dict[str, None] = {}
    with warnings.catch_warnings():
        show_as_ever = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, EmbtuneWarning):
                noted[str(message)] = None
            show_as_ever(message, category, *place, **more)

        warnings.showwarning = show
        yield noted.keys()
