"""The `medray` command: small helpers around the jobs. The jobs themselves are the scripts in jobs/."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script."""
    parser = argparse.ArgumentParser(prog="medray", description="Helpers around medray's jobs (python jobs/self_train.py --help).")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="check versions, devices, vLLM, Ray and shared memory, each with a fix")
    commands.add_parser("config", help="print every configuration field with its default and meaning (Markdown)")
    command = parser.parse_args(argv).command
    if command == "doctor":
        from medray.commands.doctor import main as doctor

        return doctor()
    from medray.config.reference_page import main as reference

    return reference()


if __name__ == "__main__":
    sys.exit(main())
