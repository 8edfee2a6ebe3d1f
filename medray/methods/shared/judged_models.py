"""Models rated by a judge on a benchmark's open questions: pairwise win rate, and LLaVA-Med's score
against the references.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from medray.config import ClinicianPreferenceConfig, EvaluateJobConfig
from medray.evaluation.prediction_files import answers
from medray.evaluation.win_rate import QUESTION_COLUMNS, judge_rows, win_rate
from medray.methods.shared.stages import check_judged, judge_inputs
from medray.records import SELF_PLAY
from medray.running.run import Run, Stage
from medray.storage.shards import stored_rows

_VERDICT_COLUMNS = [name for name in SELF_PLAY.names if name != "image"] + ["verdicts", "judge"]


class JudgeRows:
    """Callable for Dataset.map_batches(batch_format="pyarrow"): rows of records.QUESTION to what judges take,
    open questions only.

    Holds the ids and answers of the open questions, of both models: some hundred bytes each.

    Args:
        first: predictions of the model to compare with; None compares with the reference answers.
        second: predictions of the model that is rated.
    """

    def __init__(self, first: str | None, second: str):
        self.first = None if first is None else answers(first, "open")
        self.second = answers(second, "open")

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(list(self._made(table)), schema=SELF_PLAY)

    def keeps(self, row: dict[str, Any]) -> bool:
        """Whether a question, by its `sample_id` and `answer_type`, has a row: it is open, and both
        models answered it.
        """
        identity = row["sample_id"]
        return (
            row["answer_type"] == "open"
            and identity in self.second
            and (self.first is None or identity in self.first)
        )

    def _made(self, table: pa.Table) -> Iterator[dict[str, Any]]:
        from medray.evaluation.chat_score import chat_rows

        questions = [row for row in table.to_pylist() if row["answer_type"] == "open"]
        return (
            chat_rows(questions, self.second)
            if self.first is None
            else judge_rows(questions, self.first, self.second)
        )


def judge_models(
    run: Run,
    config: EvaluateJobConfig | ClinicianPreferenceConfig,
    name: str,
    questions: dict[str, Any],
    folders: Mapping[str, dict[str, Any]],
    chats: bool = True,
) -> dict[str, Any]:
    """{"win_rates": {"b against a": ...}, "chats": {model: ...}} of one benchmark; chats need a judge that
    writes scores.

    Both are empty, and no judge starts, where it has no open question.

    Args:
        chats: also have every model's answers scored against the references.
    """
    from medray.evaluation.chat_score import chat_score

    base, *others = folders
    asked = {
        row["sample_id"]: row
        for row in stored_rows(questions["outputs"]["rows"], ["sample_id", *QUESTION_COLUMNS])
        if row["answer_type"] == "open"
    }
    found: dict[str, Any] = {"win_rates": {}, "chats": {}}
    if not asked:
        return found
    judge = judge_inputs(config)  # once: it reads a local judge's weights
    for model in others:
        rows = _judged(
            run, config, judge, f"30-{name}-{model}-against-{base}", questions, folders[base], folders[model]
        )
        found["win_rates"][f"{model} against {base}"] = win_rate(
            stored_rows(rows, _VERDICT_COLUMNS), asked, config.evaluate
        )
    if chats and config.judge.scoring == "scores":
        for model in folders:
            rows = _judged(
                run, config, judge, f"30-{name}-{model}-against-references", questions, None, folders[model]
            )
            found["chats"][model] = chat_score(stored_rows(rows, _VERDICT_COLUMNS), asked, config.evaluate)
    return found


def _judged(
    run: Run,
    config: EvaluateJobConfig | ClinicianPreferenceConfig,
    judge: dict[str, Any],
    name: str,
    questions: dict[str, Any],
    first: dict | None,
    second: dict[str, Any],
) -> str:
    """Judged rows (records.JUDGED); continues row by row."""
    from medray.inference.judges.judges import judge_map
    from medray.models.vlm import resolve_model
    from medray.storage.resumable import write_resumable

    arguments = {"first": first and first["outputs"]["rows"], "second": second["outputs"]["rows"]}

    def work(stage: Stage) -> dict[str, Any]:
        import ray.data

        model = resolve_model(config.judge.model) if config.judge.kind == "vllm" else None
        engine = config.judge.engine.beside(config.engine)
        judge_class, options = judge_map(config.judge, model, config.data, engine)
        pool = ray.data.ActorPoolStrategy(size=1)  # it holds the answers of both models

        def judged(rows: Any) -> Any:
            # Without a share of a CPU, which it hardly uses: beside the judge's it would leave Ray Data too
            # little to list files (medray.plan.demand).
            made = rows.map_batches(
                JudgeRows, fn_constructor_kwargs=arguments, batch_format="pyarrow", num_cpus=0, compute=pool
            )
            return made.map_batches(judge_class, **options)

        rows, again = write_resumable(
            questions["outputs"]["rows"],
            stage.path("rows"),
            stage.path("committed"),
            judged,
            8 * engine.rows_per_task,
            config.data.read_cpus,
            keeps=JudgeRows(**arguments).keeps,
            keep_columns=["answer_type"],
        )
        check_judged(stage, config)
        return {"rows": stage.path("rows"), "counts": {"questions": rows, **again}}

    inputs = {"first": first and first["hash"], "second": second["hash"], **judge}
    return run.stage(name, inputs, work)["outputs"]["rows"]
