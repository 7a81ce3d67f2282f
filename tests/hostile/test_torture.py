"""Deaths, full disks and two writers, in a process of its own: its children fork before torch has started threads."""

import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("torture_cases.py")


def test_torture() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, cwd=CASES.parents[2], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
