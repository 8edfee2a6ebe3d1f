"""The processes that a test started, to kill one of them."""

import psutil


def descendants(title: str) -> list[psutil.Process]:
    """Those of this process whose command line holds `title`; Ray's workers name their actor there."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:  # it ended while we looked
            continue
    return found
