"""The endpoint, for `serve run serve.app:build run=runs/demo keys=keys.txt`: see medray.serving.chat.app
and docs/serving.md.
"""

from medray.serving.chat.app import build

__all__ = ["build"]
