"""Clinician preference alignment of a medical vision-language model (BioMed-VITAL, arXiv 2406.13173), as
one resumable Ray job.
"""

from __future__ import annotations

from medray.commands.command_line import method_parser, run_method
from medray.config import ClinicianPreferenceConfig
from medray.plan.preflight import check_clinician_preference

EPILOG = """\
what it does
  data -> embeddings, k-means, a diverse draw -> two answers per question about the drawn images
  -> clinicians tick the good ones -> dialogues about all images, after accepted demonstrations
  -> ratings 0-10 -> pairs -> rating model -> scores
  -> selection -> tuning -> export -> verify -> evaluate -> report.html

clinicians
  By default they are simulated from the images' true attributes, with clinicians.error_rate, and called so
  everywhere. With real ones the job ends with exit status 3 when its questions are ready, and says how
  to serve the page; when enough is ticked, run it again:
  --set clinicians.kind=database --set clinicians.source=sqlite:///judgements.db

examples
  python jobs/clinician_preference.py             the demo: synthetic cells, bundled tiny models, two cores
  python jobs/clinician_preference.py --data path/to/wbcatt --run runs/cells --set 'weights=[1, 10, 100]'
  python jobs/clinician_preference.py --set rater.train_on=model --set select.fraction=0.1       an ablation
  python jobs/clinician_preference.py --config qwen2.5-vl-7b --data s3://bucket/figures \\
    --run s3://bucket/runs/a
  ray job submit --working-dir . -- python jobs/clinician_preference.py --config qwen2.5-vl-7b \\
    --data ... --run ...

The same command resumes a run that was stopped or killed.
Every field: `medray config`, docs/reference/config.md.
The method, and what to set: docs/clinician_preference.md.
The last line on stdout is JSON: {"run", "base", "selected", "rater", ...}.
"""


def work(config: ClinicianPreferenceConfig, run_uri: str, shared_uri: str | None) -> dict:
    from medray.methods.clinician_preference.pipeline import clinician_preference

    return clinician_preference(config, run_uri, shared_uri)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a stage failed, 2 bad configuration, 3 waiting for clinicians, 4 held by
    another job, 130 interrupted.
    """
    parser = method_parser("clinician_preference", __doc__, EPILOG)
    parser.add_argument(
        "--shared",
        metavar="DIR",
        help="run directory for what other runs can use too (all stages up to the scores, the base model's "
        "evaluation); default: --run",
    )
    arguments = parser.parse_args(argv)
    return run_method(
        arguments,
        ClinicianPreferenceConfig,
        check_clinician_preference,
        lambda config, run_uri: work(config, run_uri, arguments.shared),
    )
