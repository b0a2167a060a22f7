"""What loading needs, whatever is loaded. Imports nothing heavy."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Pause Python's cyclic garbage collector where a great deal is made and nothing is thrown away.

    torch and transformers bring hundreds of thousands of objects, and a model's module and tensors more. The collector
    would walk through all of them again and again: a quarter of the time to the first answer went there. Several may
    load at once: whoever paused it first lets it go on.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
