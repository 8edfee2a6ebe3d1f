"""Self-training of a medical vision-language model (STLLaVA-Med), as one resumable Ray job."""

from __future__ import annotations

from medray.commands.command_line import method_parser, run_method
from medray.config import SelfTrainingConfig
from medray.plan.preflight import check_self_training

EPILOG = """\
what it does
  data -> SQ-SFT -> export -> verify -> self-questions and answers -> judge -> pairs
  -> reference log-probabilities -> DPO -> export -> verify -> evaluate -> report.html;
  --set rounds=N repeats from the self-questions.

examples
  python jobs/self_train.py                       the demo: synthetic cells, bundled tiny models, two cores
  python jobs/self_train.py --data path/to/wbcatt --run runs/wbc --set rounds=2
  python jobs/self_train.py --config llava-1.5-7b --data s3://bucket/shards --run s3://bucket/runs/a
  ray job submit --working-dir . -- python jobs/self_train.py --config llava-1.5-7b --data ... --run ...

The same command resumes a run that was stopped or killed.
Every field: `medray config`, docs/reference/config.md.
The last line on stdout is JSON: {"run", "base", "tuned", "pairs", "seconds", ...}.
"""


def work(config: SelfTrainingConfig, run_uri: str) -> dict:
    from medray.methods.self_train.pipeline import self_train

    return self_train(config, run_uri)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a stage failed, 2 bad configuration, 4 held by another job, 130 interrupted."""
    arguments = method_parser("self_train", __doc__, EPILOG).parse_args(argv)
    return run_method(arguments, SelfTrainingConfig, check_self_training, work)
