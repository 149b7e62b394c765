"""Runs ``rankc reproduce`` from this checkout, installed or not."""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
# This folder comes off the path, so that no tool can pass for a library; the checkout goes first.
sys.path[:] = [str(CHECKOUT), *(p for p in sys.path if Path(p or ".").resolve() != CHECKOUT / "tools")]

from codegen.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]], checkout=CHECKOUT)
