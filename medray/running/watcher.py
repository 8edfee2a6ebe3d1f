"""A small process that outlives a job, to print the last line when the job cannot.

Ray's C++ ends a driver whose raylet or GCS died without any message of ours, and a job that is killed (out of
memory, kill -9) has no time for one. Run by path, without the package, so that it starts in a few
milliseconds. It reads lines from the job until the job ends:

    log PATH    where the job's log is
    end         the job has said everything itself
"""

from __future__ import annotations

import subprocess
import sys


class Watcher:
    """The job's side.

    Args:
        again: the argument with which the same command resumes the run.
    """

    def __init__(self, again: str):
        # In a session of its own: neither Ctrl-C nor `kill -9` of the job's process group reaches it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, again],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def tell(self, line: str) -> None:
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # somebody has ended it
            return

    def end(self) -> None:
        """Let it go without a word."""
        self.tell("end")
        try:
            self._process.stdin.close()
        except OSError:
            return
        self._process.wait()


def main(again: str) -> None:
    log = None
    for line in sys.stdin.buffer:
        word, _, rest = line.decode(errors="replace").rstrip("\n").partition(" ")
        if word == "end":
            return
        if word == "log":
            log = rest
    where = f"log: {log}\n" if log else ""
    sys.stderr.write(
        "failed: the job's process ended before its work was done "
        "(killed, out of memory, or ended by Ray, whose processes died; "
        f"what Ray said is above)\n{where}fix the cause, then rerun the same command with {again} to resume\n"
    )


if __name__ == "__main__":
    main(sys.argv[1])
