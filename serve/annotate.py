"""The clinician page, for `serve run serve.annotate:build items=DIR tokens=clinicians.txt`: see
medray.serving.clinician_page.app and docs/clinician_page.md.
"""

from medray.serving.clinician_page.app import build

__all__ = ["build"]
