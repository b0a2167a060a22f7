"""The native code under g++'s sanitizers: `python -m tests.kernels.sanitize`, or `make sanitize`.

Addresses and undefined behaviour: a copy of the repository compiles the AVX2 tier for them, and runs its tests there.
Threads: `team.cpp` exercises the team of threads alone, as a Python with torch in it is too much for that sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS, MODELS = ("native", "attention"), ("fused", "direct")
TESTS = [*(f"tests/kernels/test_{name}.py" for name in KERNELS), *(f"tests/parity/test_{name}.py" for name in MODELS)]


def main() -> int:
    """Run both; returns 0 where nothing was found."""
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "team")
        flags = ["-std=c++17", "-O1", "-g", "-march=x86-64-v3", "-pthread", "-fsanitize=thread"]
        header, source = ROOT / "pagedllm_core/native", ROOT / "tests/kernels/team.cpp"
        subprocess.run([compiler, *flags, "-I", str(header), str(source), "-o", str(program)], check=True)
        threads = subprocess.run([program], check=False).returncode
        copy = Path(folder, "repository")
        for part in ("pagedllm_core", "tests", "integrations", "pyproject.toml"):
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(source, copy / part)
        library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        environment = {
            **os.environ,
            "CXXFLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1",
            "PYTHONPATH": str(copy),
            "PAGEDLLM_NATIVE": "avx2",
        }
        subprocess.run([sys.executable, "-m", "pagedllm_core.native.build"], cwd=copy, env=environment, check=True)
        environment |= {"LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        memory = subprocess.run(command, cwd=copy, env=environment, check=False).returncode
    return threads or memory


if __name__ == "__main__":
    sys.exit(main())
