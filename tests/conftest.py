"""What every test relies on: no network, and no engine left over."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads it when a kernel is decorated: kernels run interpreted, on CPU tensors, but for a run of tests/gpu alone.
_GPU = Path(__file__).parent / "gpu"
_paths = [path.resolve() for path in (Path(one.partition("::")[0]) for one in sys.argv[1:]) if path.exists()]
_only_gpu = bool(_paths) and all(path.is_relative_to(_GPU) for path in _paths)
os.environ.setdefault("TRITON_INTERPRET", "0" if _only_gpu else "1")
