"""Everything `make test` checks: lint, format, types, layers, then the tests. Exits non-zero if any of it fails.

The quick checks come first and are summed up, so that the output ends with pytest's own summary.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = {
    "ruff check": ["-m", "ruff", "check"],
    "ruff format": ["-m", "ruff", "format", "--check"],
    "pyright": ["-m", "pyright", "--warnings"],
    "layers": ["scripts/lint_layers.py"],
}


def main() -> int:
    failed = [name for name, arguments in CHECKS.items() if not passes(name, arguments)]
    print(f"\n{len(CHECKS) - len(failed)} of {len(CHECKS)} checks passed; now the tests", flush=True)
    tests = subprocess.run([sys.executable, "-m", "pytest", *sys.argv[1:]], cwd=ROOT, env=environment(), check=False)
    if failed:
        print(f"\nfailed before the tests: {', '.join(failed)} (see above)", file=sys.stderr)
    return tests.returncode or bool(failed)


def passes(name: str, arguments: list[str]) -> bool:
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    passed = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode == 0
    print(f"== {name}: {'passed' if passed else 'FAILED'} ({time.monotonic() - start:.1f} s)", flush=True)
    return passed


def environment() -> dict[str, str]:
    """Threads for the processors this process may use, not for all the machine has, and none that spin while idle:
    the tests and the server they start take turns on the same ones."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **os.environ}


if __name__ == "__main__":
    sys.exit(main())
