"""The arms of docs/results/instruction_free.md: runs the jobs, prints the tables.

Every arm is what one `jobs/instruction_free.py` command per seed does, printed before it runs, in a run
directory of its own under --runs. What arms have in common (the data, the base model's answers, the warm-up
of equal k, seed and shuffling) is made once, in --runs/shared. The same command of this script continues
where it was stopped, and does nothing where all is done; what is done stands in a record, with which it
continues on another machine too (--record).

    nohup python -m studies.instruction_free --data WBCATT --runs runs/arms > runs/arms.log 2>&1 &
    python -m studies.instruction_free --data WBCATT --runs runs/arms --finished     # the tables of what is
    finished python -m studies.instruction_free --runs runs/arms-cells --arms text proxy-textbook+shuffled
    --seeds 0

Without --data the arms are run on the synthetic cells. Writes table.md and report.html (plots) into --runs,
prints the Markdown tables (mean over seeds, 95 % t-interval over seeds) and one JSON line last.
"""

from __future__ import annotations

from medray.config import InstructionFreeConfig
from medray.methods.instruction_free.pipeline import instruction_free
from studies.study import Study, main, per_cent

TEXT = ["tune.instruction=Describe this medical scan."]
PLAIN, SHUFFLED = ["tune.shuffling=none"], ["tune.shuffling=separator"]
LORA = ["tune.lr_llm=3e-4", "tune.lora_llm={rank: 32, alpha: 64, dropout: 0.0}"]
MODES = ("textbook", "released", "frozen", "free")  # free: the proxy without momentum
OTHER_COUNTS = (1, 2, 32)  # than 8
WHOLE = "proxy-textbook+shuffled"  # as in the paper
WITH_LORA = ("text", "text+shuffled", WHOLE)

ARMS: dict[str, list[str]] = {
    "text": [*TEXT, *PLAIN],
    "text+shuffled": [*TEXT, *SHUFFLED],
    **{f"proxy-{mode}": [f"tune.proxy.mode={mode}", *PLAIN] for mode in MODES},
    **{f"proxy-{mode}+shuffled": [f"tune.proxy.mode={mode}", *SHUFFLED] for mode in MODES},
    "text, LoRA": [*TEXT, *PLAIN, *LORA],
    "text+shuffled, LoRA": [*TEXT, *SHUFFLED, *LORA],
    f"{WHOLE}, LoRA": [*SHUFFLED, *LORA],
    **{f"{WHOLE}, k={k}": [f"tune.proxy.count={k}", *SHUFFLED] for k in OTHER_COUNTS},
}
"""Overrides of the configuration by arm. The proxy has 8 vectors and the language model is frozen where
the name does not say otherwise.
"""

COLUMNS = (
    "strict",
    "balanced",
    "likelihood",
    "format failures",
    "leakage",
    "plain",
    "general",
    "retained",
    "precision",
    "recall",
    "F1",
    "ROUGE-L",
)

PROXIES = [f"proxy-{mode}" for mode in MODES]
ALL_SHUFFLED = [f"{arm}+shuffled" for arm in PROXIES]


def _modes(one: str, other: str) -> tuple[list[str], list[str]]:
    """One mode against another, with and without shuffling."""
    return [f"proxy-{one}", f"proxy-{one}+shuffled"], [f"proxy-{other}", f"proxy-{other}+shuffled"]


CONTRASTS = {
    "shuffling, fixed text": (["text+shuffled"], ["text"]),
    "shuffling, proxies": (ALL_SHUFFLED, PROXIES),
    "proxies minus text, unshuffled": (PROXIES, ["text"]),
    "proxies minus text, shuffled": (ALL_SHUFFLED, ["text+shuffled"]),
    "the paper's whole minus plain text": ([WHOLE], ["text"]),
    "momentum (textbook) minus none": _modes("textbook", "free"),
    "momentum (released) minus none": _modes("released", "free"),
    "momentum (textbook) minus frozen": _modes("textbook", "frozen"),
    "momentum (released) minus frozen": _modes("released", "frozen"),
    **{f"k = {count} minus k = 8": ([f"{WHOLE}, k={count}"], [WHOLE]) for count in OTHER_COUNTS},
    "LoRA minus a frozen language model": ([f"{arm}, LoRA" for arm in WITH_LORA], WITH_LORA),
}
"""The claims of the paper, as means of arms minus means of others."""

STUDY = Study(
    job="instruction_free",
    method=instruction_free,
    config_type=InstructionFreeConfig,
    title="Instruction-free tuning",
    arms=ARMS,
    against=lambda arm: "text",
    columns=COLUMNS,
    base=lambda results: per_cent(results["measures"]["base"], COLUMNS),
    tuned=lambda results: per_cent(results["measures"]["tuned"], COLUMNS),
    floors=lambda results: results["floors"],
    contrasts=CONTRASTS,
)

if __name__ == "__main__":
    main(STUDY, "instruction_free_arms", __doc__)
