"""The committed stub says what the extension has."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_stub_is_the_generated_one(tmp_path: Path) -> None:
    generated = tmp_path / "_core.pyi"
    patterns = ROOT / "src/python/stub_patterns.txt"
    command = ["-m", "nanobind.stubgen", "-q", "-m", "mscclpp_ep._core", "-p", str(patterns)]
    subprocess.run([sys.executable, *command, "-o", str(generated)], check=True)
    committed = ROOT / "python/mscclpp_ep/_core.pyi"
    hint = f"regenerate it: python {' '.join(command)} -o {committed}"
    assert generated.read_text() == committed.read_text(), hint
