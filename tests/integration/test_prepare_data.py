"""jobs/prepare_data.py on a small dirty source: shards, quarantine, leaks, continuing, reading back,
exporting.
"""

import json
import os
import shutil
import subprocess
import sys

import pyarrow.dataset
import pytest
from PIL import Image

from medray.commands.prepare_data import main
from medray.config import DataConfig, PrepareDataConfig
from medray.errors import DataError, TooManySetAside
from medray.ingest.source_index import read_index
from medray.methods.prepare_data.export import export_dataset
from medray.methods.prepare_data.pipeline import prepare_dataset
from medray.methods.shared.data_report import prepared_lines
from tests.images.test_decoding import noise, saved
from tests.integration.conftest import BUCKET
from tests.support.jobs import ROOT

pytestmark = pytest.mark.ray


def picture(number, kind="PNG"):
    """A picture with structure: near-duplicates are found by it."""
    return saved(noise((12, 12), number).resize((96, 96), Image.BICUBIC), kind)


def dialogue(identity, image, split, question="What?", answer="A cell."):
    return {
        "id": identity,
        "image": image,
        "split": split,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def write_source(folder):
    """Twelve good images (one in both splits as another file, one as a recompressed copy), and one of
    each kind of bad record.
    """
    folder.mkdir()
    images = {f"{i}.png": picture(i) for i in range(10)}
    images |= {
        "copy.png": picture(0),
        "near.jpg": picture(1, "JPEG"),
        "cut.jpg": saved(noise((400, 300)), "JPEG")[:2000],
    }
    for name, data in images.items():
        (folder / name).write_bytes(data)
    records = [dialogue(f"d{i}", f"{i}.png", "train" if i < 8 else "test") for i in range(10)]
    records += [
        dialogue("copied", "copy.png", "test"),
        dialogue("nearly", "near.jpg", "test"),
        dialogue("second", "0.png", "train", "And now?", "Still."),
    ]
    bad = [
        dialogue("cut", "cut.jpg", "train"),
        dialogue("gone", "gone.png", "train"),
        dialogue("d1", "1.png", "train"),
        dialogue("empty", "2.png", "train", answer=" "),
    ]
    lines = [json.dumps(record) for record in [*records, *bad]] + ["{broken"]
    (folder / "README.md").write_text("not data")
    (folder / "more.HEIC").write_bytes(b"an image that nothing reads")
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def config(source, **changes):
    return PrepareDataConfig(data=DataConfig(source=source, read_cpus=0.5, rows_per_shard=4, **changes))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, ray_cluster):
    root = tmp_path_factory.mktemp("prepared")
    source = write_source(root / "source")
    return root / "out", source, prepare_dataset(config(source), str(root / "out"))


def rows(folder, *columns):
    return (
        pyarrow.dataset.dataset(str(folder), format="parquet")
        .to_table(columns=list(columns) or None)
        .to_pylist()
    )


def test_counts_and_quarantine(prepared):
    out, _, summary = prepared
    assert (
        summary["format"],
        summary["images"],
        summary["dialogues"],
        summary["duplicates"],
        summary["quarantined"],
    ) == ("llava", 12, 13, 1, 4)
    assert summary["splits"] == {"test": 4, "train": 8}
    assert (
        summary["unread"]
        == json.loads((out / "manifest.json").read_text())["unread"]
        == {".heic": 1, ".md": 1}
    )
    assert "files not read: 1 .heic, 1 .md" in prepared_lines(summary)
    assert ".heic" in (out / "report.html").read_text()
    reasons = {row["sample_id"]: row["reason"] for row in rows(out / "quarantine")}
    for identity, words in {
        "cut": "decoded",
        "gone": "does not exist",
        "d1": "duplicate",
        "empty": "empty",
    }.items():
        assert words in reasons[identity]
    assert any("not JSON" in reason for reason in reasons.values())
    assert json.loads((out / "manifest.json").read_text())["images"] == 12


def test_each_image_is_in_the_shards_once_with_all_that_was_said(prepared):
    out, _, _ = prepared
    samples = {row["sample_id"]: row for row in rows(out / "shards") if row["error"] is None}
    assert sorted(samples) == sorted([*(f"{i}.png" for i in range(10)), "copy.png", "near.jpg"])
    assert {one["sample_id"] for one in samples["0.png"]["dialogues"]} == {"d0", "second"}
    assert samples["3.png"]["image"] == picture(3)
    assert (samples["3.png"]["width"], samples["3.png"]["height"], samples["3.png"]["image_format"]) == (
        96,
        96,
        "PNG",
    )
    # cut.jpg, gone.png, the empty answer and the broken line keep a row that says why
    assert len(rows(out / "shards")) == 16


def test_leaks_are_found(prepared):
    out, _, summary = prepared
    found = summary["leaks"]["test also in train"]
    assert (found["images"], found["exact"], found["near"], found["leaked"]) == (4, 1, 1, 2)
    pairs = {
        (row["held_out_id"], row["other_id"], row["kind"]) for row in rows(out / "leaks" / "pairs.parquet")
    }
    assert pairs == {("copy.png", "0.png", "exact"), ("near.jpg", "1.png", "near")}
    page = (out / "report.html").read_text()
    assert (
        "test" in page and "data:image/png" in page and 'src="http' not in page and 'href="http' not in page
    )


def test_the_same_command_continues(prepared, caplog):
    """Shards that are committed stay; lost work is done again."""
    out, source, summary = prepared
    before = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    shutil.rmtree(out / "stages" / "03-account")
    (out / "stages" / "02-shards" / "manifest.json").unlink()  # killed after its last shard
    again = prepare_dataset(config(source), str(out))
    assert {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()} == before
    assert {**again, "seconds": 0, "wall_seconds": 0} == {**summary, "seconds": 0, "wall_seconds": 0}


@pytest.mark.parametrize("fault", ["images", "answers"])
def test_a_source_that_was_mended_is_read_again_where_rows_were_set_aside(tmp_path, ray_cluster, fault):
    """In its images, of which only the shards with bad ones are written again, or in its records."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()

    def write(bad):
        for number in range(60):
            (source / f"{number}.png").write_bytes(
                b"cut" if fault == "images" and number < bad else picture(number)
            )
        records = [
            dialogue(
                f"d{i}", f"{i}.png", "train", answer=" " if fault == "answers" and i < bad else "A cell."
            )
            for i in range(60)
        ]
        (source / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def prepare():
        settings = config(str(source))
        settings.data.rows_per_shard = 2
        return prepare_dataset(settings, str(out))

    write(bad=22)
    with pytest.raises(TooManySetAside, match="22 of 60"):
        prepare()
    whole = {
        file: file.stat().st_mtime_ns
        for file in (out / "shards").iterdir()
        if not any(row["set_aside"] for row in rows(file, "set_aside"))
    }
    assert whole or fault == "answers"
    write(bad=0)
    summary = prepare()
    assert (summary["images"], summary["quarantined"], len(rows(out / "shards", "sample_id"))) == (60, 0, 60)
    if fault == "images":
        assert {file: file.stat().st_mtime_ns for file in whole} == whole
    assert prepare()["images"] == 60


def test_what_is_lost_of_the_quarantine_and_the_leaks_is_made_again(prepared, tmp_path):
    shutil.copytree(prepared[0], tmp_path / "out")
    before = {name: rows(tmp_path / "out" / name) for name in ("quarantine", "leaks/pairs.parquet")}
    shutil.rmtree(tmp_path / "out/quarantine")
    (tmp_path / "out/leaks/pairs.parquet").unlink()
    prepare_dataset(config(prepared[1]), str(tmp_path / "out"))
    assert {name: rows(tmp_path / "out" / name) for name in before} == before and all(before.values())


def test_every_job_reads_the_directory(prepared, ray_cluster):
    out, source, _ = prepared
    index = {
        (row["sample_id"], row["image_id"], row["split"], row["payload"])
        for row in read_index(config(str(out)).data, 0.5).iter_rows()
        if row["error"] is None
    }
    wanted = {
        (row["sample_id"], row["image_id"], row["split"], row["payload"])
        for row in read_index(config(source).data, 0.5).iter_rows()
        if row["error"] is None and row["sample_id"] not in ("cut", "gone")
    }
    assert index == wanted


def test_export_and_inspect(prepared, tmp_path, capsys, ray_cluster):
    out, _, _ = prepared
    made = export_dataset("llava", str(out), str(tmp_path / "llava"))
    assert (made["rows"], made["left_out"]) == (13, 0)
    again = {
        row["sample_id"]: json.loads(row["payload"])
        for row in read_index(config(str(tmp_path / "llava")).data, 0.5).iter_rows()
    }
    assert again["second"] == {
        "turns": [{"role": "user", "text": "And now?"}, {"role": "assistant", "text": "Still."}]
    }
    with pytest.raises(DataError, match="nothing that trl has a place for"):
        export_dataset("trl", str(out), str(tmp_path / "trl"))
    assert main(["--inspect", str(out), "--rows", "3", "--to", str(tmp_path / "sheet.html")]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12
    assert (tmp_path / "sheet.html").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "sheet.html").read_text().count('class="card"') == 3


@pytest.mark.whole_job
def test_from_a_bucket_to_a_bucket(tmp_path, s3):
    environment, fs = s3
    fs.put(write_source(tmp_path / "source"), f"{BUCKET}/source", recursive=True)
    command = [
        sys.executable,
        "jobs/prepare_data.py",
        f"s3://{BUCKET}/source",
        "--to",
        f"s3://{BUCKET}/prepared",
        "--set",
        "data.read_cpus=0.5",
        "--set",
        "cluster.num_cpus=4",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment, "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert (
        summary["run"],
        summary["images"],
        summary["quarantined"],
        summary["leaks"]["test also in train"]["leaked"],
    ) == (f"s3://{BUCKET}/prepared", 12, 4, 2)
    assert summary["unread"] == {".heic": 1, ".md": 1} and "files not read: 1 .heic, 1 .md" in done.stderr
    found = pyarrow.dataset.dataset(f"{BUCKET}/prepared/shards", format="parquet", filesystem=fs).to_table(
        columns=["sample_id"]
    )
    assert len(set(found["sample_id"].to_pylist())) == found.num_rows == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/at/all"], "does not exist"),
        (["--set", "data.formt=llava"], "did you mean"),
        (["--format", "lava"], "data.format"),
        (["--export", "csv", "x"], "unknown format"),
        (["--export", "trl", "/nowhere"], "no shards"),
    ],
)
def test_bad_configuration_says_what_to_do(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
