"""The bundled models: small, readable by transformers and vLLM alike, and as good as their build says."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medray.data.attribute_descriptions import choice_questions, describe_attributes
from medray.data.attribute_questions import ATTRIBUTES, attribute_questions
from medray.data.description_shuffling import separated
from medray.errors import ConfigError
from medray.evaluation.metrics import mcq
from medray.models.bundled import MODELS, model_path
from medray.testbed.cells import render_cell, sample_record
from medray.testbed.corpus import LIST_REQUESTS, SCENE, SHAPES, render_scene, report_dialogue, sample_uniform
from medray.testbed.training import Encoder, accuracies, pixels_of, report_accuracies


def load(name):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = model_path(name)
    return AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32
    ).eval(), AutoProcessor.from_pretrained(path)


def cells(count, seed="test cells"):
    rng = random.Random(seed)
    records = [sample_record(rng) for _ in range(count)]
    return records, [render_cell(record, rng) for record in records]


def accuracy(name, records, images, schema, kinds):
    model, processor = load(name)
    return accuracies(
        model, Encoder(processor.tokenizer, 64), pixels_of(images, processor), records, schema, kinds
    )


def test_paths_are_text_and_unknown_names_are_config_errors():
    assert all(isinstance(model_path(name), str) for name in MODELS)
    with pytest.raises(ConfigError, match=r"huge.*base, expert"):
        model_path("huge")
    code = (
        "import sys; from medray.models.bundled import MODELS, model_path; model_path('base'); assert "
        "'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_they_are_small():
    files = [f for name in MODELS for f in Path(model_path(name)).iterdir()]
    assert sum(f.stat().st_size for f in files) < 25e6
    facts = [json.loads((Path(model_path(name)) / "build.json").read_text()) for name in MODELS]
    assert all({"seed", "steps", "parameters", "versions"} <= set(f) for f in facts)


def test_expert_reads_cells_and_base_does_not():
    records, images = cells(40)
    expert = accuracy("expert", records, images, ATTRIBUTES, ("open",))["open"]
    base = accuracy("base", records, images, ATTRIBUTES, ("open",))["open"]
    assert expert["mean"] >= 0.85, expert
    assert base["mean"] <= 0.65, base
    assert min(expert.values()) > 0.55, expert


def test_expert_answers_yes_no_and_letters_better_than_chance():
    records, images = cells(20, "more test cells")
    shares = accuracy("expert", records, images, ATTRIBUTES, ("closed", "mcq"))
    assert shares["closed"]["mean"] > 0.8 and shares["mcq"]["mean"] > 0.75, shares


def test_base_sees_shapes_and_compares_them_with_claims():
    rng = random.Random("test scenes")
    records = [sample_uniform(SHAPES, rng) for _ in range(40)]
    shares = accuracy(
        "base", records, [render_scene(r, rng) for r in records], SHAPES, ("open", "closed", "mcq")
    )
    assert shares["open"]["mean"] > 0.65 and shares["open"]["colour"] > 0.8, shares
    assert shares["closed"]["mean"] > 0.7 and shares["mcq"]["mean"] > 0.65, shares


def test_base_reads_reports():
    model, processor = load("base")
    shares = report_accuracies(model, Encoder(processor.tokenizer, 64), report_dialogue, count=150)
    assert min(shares[kind] for kind in ("open", "closed", "mcq")) > 0.85, shares


def test_generalist_lists_attributes_and_states_choices():
    """About scenes it has not seen: every answer has the asked form, and most are right."""
    model, processor = load("generalist")
    rng = random.Random("test lists")
    listed, stated = [], []
    for number in range(6):
        record = sample_uniform(SHAPES, rng)
        rows = [
            *choice_questions(record, SCENE, str(number))[:5],
            {"question": LIST_REQUESTS[number % len(LIST_REQUESTS)]},
        ]
        image = render_scene(record, rng)
        for row in rows:
            text = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
                add_generation_prompt=True,
            )
            inputs = processor(text=text, images=image, return_tensors="pt")
            with torch.no_grad():
                tokens = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
            answer = processor.decode(tokens, skip_special_tokens=True)
            if "reference" in row:
                stated.append(mcq(answer, row["reference"], len(row["choices"])))
            else:
                true = set(separated(describe_attributes(record, SCENE))[0])
                listed.append(len(true & set(separated(answer)[0])) / len(true))
    assert all(parsed for _, parsed in stated), stated
    assert sum(hit for hit, _ in stated) / len(stated) > 0.6, stated
    assert sum(listed) / len(listed) > 0.5, listed


VLLM_SCRIPT = """
import json, os, sys
from PIL import Image
from vllm import LLM, SamplingParams
jobs = json.load(open(sys.argv[1]))
answers = {}
for path, rows in jobs["models"].items():
    limits = {"gpu_memory_utilization": 0.3, "max_model_len": 512, "max_num_seqs": 8}
    llm = LLM(path, dtype="float32", enforce_eager=True, **limits)
    prompts = []
    for row in rows:
        prompt = {"prompt": row["text"]}
        if row["image"]:
            prompt["multi_modal_data"] = {"image": Image.open(row["image"]).convert("RGB")}
        prompts.append(prompt)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
    answers[path] = [[list(o.prompt_token_ids), list(o.outputs[0].token_ids)] for o in outputs]
    del llm
json.dump(answers, open(jobs["to"], "w"))
"""


@pytest.mark.vllm
def test_transformers_and_vllm_give_the_same_greedy_tokens(tmp_path):
    """In fp32, for image and text prompts; the prompt ids must already be equal."""
    records, images = cells(2, "vllm cells")
    files = [tmp_path / f"{i}.png" for i in range(len(images))]
    for image, file in zip(images, files):
        image.save(file)
    asked = [
        (None, "Report: the cell is round and big.\nWhat is the cell shape?"),
        (0, "Describe the image in detail."),
    ]
    asked += [(1, row["question"]) for row in attribute_questions(records[1], rng=random.Random(0))[:3]]

    jobs, expected = {}, {}
    for name in MODELS:
        model, processor = load(name)
        jobs[model_path(name)], expected[model_path(name)] = [], []
        for index, question in asked:
            parts = [{"type": "text", "text": question}]
            content = parts if index is None else [{"type": "image"}, *parts]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = processor(
                text=text, images=None if index is None else images[index], return_tensors="pt"
            )
            with torch.no_grad():
                tokens = model.generate(**inputs, max_new_tokens=24)[0].tolist()
            length = inputs["input_ids"].shape[1]
            expected[model_path(name)].append([tokens[:length], tokens[length:]])
            jobs[model_path(name)].append(
                {"text": text, "image": None if index is None else str(files[index])}
            )

    job_file, answer_file = tmp_path / "jobs.json", tmp_path / "answers.json"
    job_file.write_text(json.dumps({"models": jobs, "to": str(answer_file)}))
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [sys.executable, "-c", VLLM_SCRIPT, str(job_file)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(answer_file.read_text())
    assert answers == expected
