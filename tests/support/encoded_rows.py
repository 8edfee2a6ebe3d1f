"""Encoded rows of small random pictures, the way Ray Data workers would hand them over."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from medray.config import (
    DataConfig,
    DpoConfig,
    InstructionFreeTrainConfig,
    LoraConfig,
    ModelConfig,
    ProxyConfig,
    SftConfig,
)
from medray.data.collate import Encoder

torch.set_num_threads(1)

MODEL = ModelConfig(precision="fp32", system_prompt="", max_length=512)
SMALL_LORA = {
    "lora_llm": LoraConfig(rank=4, alpha=8, dropout=0.0),
    "lora_vision": LoraConfig(rank=2, alpha=8, dropout=0.0),
}
SFT = SftConfig(
    micro_batch=2,
    accumulation=2,
    epochs=1,
    zero_stage=2,
    warmup_ratio=0.0,
    lr_llm=1e-3,
    lr_projector=1e-3,
    lr_vision=1e-3,
    **SMALL_LORA,
)
DPO = DpoConfig(
    micro_batch=2,
    accumulation=2,
    epochs=1,
    zero_stage=2,
    warmup_ratio=0.0,
    lr_llm=1e-3,
    lr_projector=1e-3,
    lr_vision=1e-3,
    **SMALL_LORA,
)
TUNE = InstructionFreeTrainConfig(
    micro_batch=2,
    accumulation=2,
    epochs=1,
    zero_stage=2,
    lr_projector=1e-3,
    lr_vision=1e-3,
    proxy=ProxyConfig(count=3, lr=1e-2, momentum=0.9),
)
WARM_UP = TUNE.model_copy(
    update={"lr_projector": None, "lr_vision": None, "proxy": ProxyConfig(count=3, lr=1e-2, mode="free")}
)


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (*size, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


def conversations(count: int, bad: tuple[int, ...] = ()) -> list[dict]:
    answers = ("A cell.", "It is a round nucleus.", "yes", "pink granules in the cytoplasm")
    return [
        {
            "sample_id": f"s{i:03d}",
            "image": b"no image" if i in bad else picture(i),
            "turns": [
                {"role": "user", "text": "What is the shape?"},
                {"role": "assistant", "text": answers[i % 4]},
                {"role": "user", "text": "Is the cell big?"},
                {"role": "assistant", "text": answers[(i + 1) % 4]},
            ],
        }
        for i in range(count)
    ]


def preferences(count: int) -> list[dict]:
    answers = ("The nucleus is segmented.", "no", "It is round and big", "A small cell.")
    return [
        {
            "sample_id": f"p{i:03d}",
            "image": picture(i, (56, 84)),
            "prompt": "Describe this image.",
            "chosen": answers[i % 4],
            "rejected": answers[(i + 1) % 4],
            "ref_chosen_logp": -20.0 - i,
            "ref_rejected_logp": -21.0 + i,
        }
        for i in range(count)
    ]


def descriptions(count: int) -> list[dict]:
    parts = ("big cell", "round nucleus", "pink granules", "light blue cytoplasm", "no vacuoles")
    return [
        {"sample_id": f"d{i:03d}", "image": picture(i), "description": ", ".join(parts[: 2 + i % 4])}
        for i in range(count)
    ]


def encoder(path: str, kind: str) -> Encoder:
    return Encoder(path, MODEL.model_dump(), DataConfig().model_dump(), kind)


def encoded(path: str, kind: str, count: int) -> tuple[list[dict], object]:
    """Rows, and the TokenInfo that collating needs."""
    one = encoder(path, kind)
    rows = conversations(count) if kind == "sft" else preferences(count)
    return one(pa.Table.from_pylist(rows)).to_pylist(), one.dialogues.info()


@pytest.fixture(scope="session", params=["llava", "qwen"])
def tiny(request, tiny_llava, tiny_qwen):
    """Each of the two families' tiny models in turn."""
    return {"llava": tiny_llava, "qwen": tiny_qwen}[request.param]


@pytest.fixture(scope="session")
def process_group(tmp_path_factory):
    """torch.distributed with this process alone, as DeepSpeed needs it."""
    import os

    import torch.distributed as dist

    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group') / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name)
