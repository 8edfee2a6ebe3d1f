import io

import pytest
from PIL import Image

from medray.config import EvaluateConfig
from medray.evaluation.prediction_files import write_predictions
from medray.evaluation.scores import compare_models, score
from medray.methods.shared.results_page import latex_table, markdown_table, wins_and_losses, write_page

CONFIG = EvaluateConfig(bootstrap=50)


def rows(model, right):
    made = [
        {
            "sample_id": f"q{n}",
            "image_id": f"i{n}",
            "question": "Left?",
            "reference": "yes",
            "answer": "Yes." if n < right else "No.",
            "answer_type": "closed",
            "attribute": "side",
            "modality": ("ct", "mri")[n % 2],
            "model": model,
        }
        for n in range(4)
    ]
    opened = {
        "sample_id": "o",
        "image_id": "i0",
        "question": "What?",
        "reference": "lung mass",
        "answer": "lung lung lung lung heart",
        "answer_type": "open",
    }
    return [*made, {**opened, "model": model, "modality": "ct"}]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions")
    names = {"base_1": 2, "<tuned>": 4}
    for name, right in names.items():
        write_predictions(rows(name, right), str(folder / name))
    uris = {name: str(folder / name) for name in names}
    benchmark = {
        "models": {name: score(uri, CONFIG, uris["base_1"]) for name, uri in uris.items()},
        "comparison": compare_models(uris, "base_1", CONFIG),
        "definition": {
            "splits": ["test"],
            "suffixes": {"closed": "Answer yes or no & nothing else."},
            "note": "",
        },
        "counts": {"questions": 5},
    }
    return {"schema": 1, "benchmarks": {"vqa-rad": benchmark}}


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (400, 300), (200, 30, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def examples():
    asked = {
        "question": "Left <b>?",
        "reference": "yes",
        "answer_type": "closed",
        "choices": None,
        "attribute": "side",
        "sample_id": "q2",
    }
    yield {**asked, "image": picture()}, {"base_1": "No.", "<tuned>": "Yes."}
    yield {**asked, "image": b"broken"}, {"base_1": "Yes.", "<tuned>": "maybe"}
    yield {**asked, "image": picture()}, {"base_1": "Yes.", "<tuned>": "yes"}  # neither is better
    yield {**asked, "image": picture()}, {"base_1": "Yes."}


def test_markdown_table(results):
    head, marks, first, second = markdown_table(results).splitlines()
    assert head == (
        "| benchmark | model | n | images | open recall, legacy | open recall, strict | open recall, set "
        "| closed, legacy | closed, strict | words |"
    )
    assert marks == "| --- | --- | " + " | ".join(["---:"] * 8) + " |"
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[:7] == [
        "vqa-rad",
        "base_1",
        "5",
        "4",
        "80.0 [80.0, 80.0]",
        "50.0 [50.0, 50.0]",
        "50.0 [50.0, 50.0]",
    ]
    assert cells[8].startswith("50.0 [") and cells[9:] == ["1.8"]
    assert "| <tuned> |" in second and "| 100.0 [100.0, 100.0] |" in second
    by = markdown_table(results, "by_modality").splitlines()
    assert [line.split(" | ")[:4] for line in by[2:]] == [
        ["| vqa-rad", "ct", "base_1", "3"],
        ["| vqa-rad", "ct", "<tuned>", "3"],
        ["| vqa-rad", "mri", "base_1", "2"],
        ["| vqa-rad", "mri", "<tuned>", "2"],
    ]


def test_latex_table(results):
    text = latex_table(results, caption="50 % & more", label="tab:x")
    lines = text.splitlines()
    assert (
        r"\begin{tabular}{llrrrrrrrr}" in lines
        and r"\caption{50 \% \& more}" in lines
        and r"\label{tab:x}" in lines
    )
    row = next(line for line in lines if line.startswith("vqa-rad & base"))
    assert row.startswith(
        r"vqa-rad & base\_1 & 5 & 4 & 80.0 [80.0, 80.0] & 50.0 [50.0, 50.0]"
    ) and row.endswith(r"\\")
    assert row.count("&") == 9 and r"\begin{tabular}{lllrrrrrrrr}" in latex_table(results, "by_attribute")


def test_page_holds_everything_and_loads_nothing(results):
    page = write_page(results, {"vqa-rad": examples()}, [{"stage": "20-scores", "seconds": 1.5}])
    assert "&lt;tuned&gt;" in page and "<tuned>" not in page
    assert "Answer yes or no &amp; nothing else." in page
    for part in (
        "vqa-rad: closed questions",
        "vqa-rad: by modality",
        "vqa-rad: paired differences",
        "vqa-rad: floors",
        "gain by the image",
        "20-scores",
    ):
        assert part in page
    assert "0.800 [0.800, 0.800]" in page and "left out" in page
    assert (
        page.count("<svg") >= 5 and 'src="http' not in page and "<script" not in page and "<link" not in page
    )


def test_gallery_of_wins_and_losses():
    cards = wins_and_losses(examples(), ["base_1", "<tuned>"])
    won, lost = cards.split("<h3>")[1:]
    assert (
        won.startswith("&lt;tuned&gt; better than base_1</h3>")
        and won.count('class="card"') == 1
        and "data:image/jpeg;base64" in won
    )
    assert "Left &lt;b&gt;?" in won and '<div class="good">&lt;tuned&gt; (1.00): Yes.</div>' in won
    assert lost.count('class="card"') == 1 and "image cannot be shown" in lost
    assert wins_and_losses(examples(), ["base_1"]) == ""


def test_gallery_reads_no_more_than_it_needs():
    def endless():
        while True:
            yield from examples()

    assert wins_and_losses(endless(), ["base_1", "<tuned>"], most=2).count('class="card"') == 4
