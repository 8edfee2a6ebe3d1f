"""`medray recipes`: the recipes that come with medray."""

from __future__ import annotations

import argparse
import sys

from medray.config.recipes import names, recipe_path
from medray.errors import ConfigError


def main() -> int:
    """List the recipes, each with the first line of its comment, or print one. Returns 2 for a name that
    there is not.
    """
    parser = argparse.ArgumentParser(
        prog="medray recipes",
        description="List the recipes that come with medray, or print one to change: medray recipes "
        "self_train/tiny-cpu > mine.yaml",
    )
    parser.add_argument("name", nargs="?", help="recipe to print, such as self_train/llava-1.5-7b")
    wanted = parser.parse_args().name
    if wanted is None:
        for name in names():
            first = recipe_path(name).read_text(encoding="utf-8").splitlines()[0]
            print(f"{name:<40}{first.removeprefix('#').strip() if first.startswith('#') else ''}")
        return 0
    try:
        sys.stdout.write(recipe_path(wanted).read_text(encoding="utf-8"))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
