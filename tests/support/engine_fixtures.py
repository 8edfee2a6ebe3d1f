"""One small engine for all tests of this folder: a start costs 15-40 s."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from medray.config import DataConfig, EngineConfig, ModelConfig, SamplingConfig, SelfPlayConfig


def _png(number: int) -> bytes:
    pixels = np.random.RandomState(number).randint(0, 255, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def png():
    """Encoded 64 x 48 noise by number."""
    return _png


@pytest.fixture(scope="session")
def images():
    """Six good images and one that is none."""
    rows = [{"sample_id": f"img-{number}", "image": _png(number)} for number in range(6)]
    return pa.Table.from_pylist([*rows, {"sample_id": "broken", "image": b"not an image"}])


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """A tiny random LLaVA whose tokenizer knows the judge's prompt, so that the prompt fits its 1024
    positions.
    """
    from medray.inference.judges.prompt import judge_prompt
    from medray.testbed.tiny_vlm import random_llava

    path = tmp_path_factory.mktemp("talker")
    random_llava(path, seed=0, texts=[judge_prompt("What is it?", "A cell.", "Two cells.")] * 2)
    return str(path)


@pytest.fixture(scope="session")
def sections():
    """Constructor arguments every engine worker shares."""
    return {
        "model_config": ModelConfig(precision="fp32"),
        "data_config": DataConfig(),
        "engine_config": EngineConfig(
            enforce_eager=True, max_model_len=1024, cpus_per_actor=1, max_num_seqs=64
        ),
    }


@pytest.fixture(scope="session")
def play_config():
    def sampling(**kwargs):
        return SamplingConfig(max_tokens=12, **kwargs)

    return SelfPlayConfig(
        describe=sampling(temperature=0, top_k=0, top_p=1),
        ask=sampling(top_k=300),
        questions=3,
        answer=sampling(),
    )


@pytest.fixture(scope="session")
def player(talker, sections, play_config):
    from medray.methods.self_train.self_play import SelfPlay

    worker = SelfPlay(model=talker, **sections, config=play_config, round=2)
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def on_engine(player):
    """Other workers on the engine that is already up."""

    def make(cls, **attributes):
        worker = cls.__new__(cls)
        worker.__dict__.update(player.__dict__, **attributes)
        return worker

    return make
