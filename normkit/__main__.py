# SPDX-License-Identifier: Apache-2.0
"""The command line: `normkit info`, `normkit demo` and `normkit bench`, or `python -m normkit ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__, demo, info
from .bench import command as bench


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="normkit", description="Fused residual normalisation for PyTorch and JAX.")
    parser.add_argument("--version", action="version", version=f"normkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command, summary in (
        ("info", info, "show versions, devices and what is chosen on each, with a check of every implementation"),
        ("demo", demo, "decode text with a real LLaMA in PyTorch and JAX, and check both against transformers"),
        ("bench", bench, "time normkit and its peers on this machine, verified, against a copy of as many bytes"),
    ):
        options = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        command.add_arguments(options)
        options.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
