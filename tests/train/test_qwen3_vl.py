"""Qwen3-VL feeds vision features to inner layers too (deepstack): packing, sharing and freezing must know
them.
"""

import torch

from medray.config import DpoConfig, LoraConfig
from medray.models.vlm import part_of, prepare_trainable, shared_image_features, trainable_parameters
from medray.train.objectives import (
    answer_logps,
    dpo_objective,
    sequence_logps,
    sum_rows,
    supervised_logits,
    token_logps,
)

PAIRS, IMAGE = 2, 599


def tiny_qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                "vocab_size": 600,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 32,
                "initializer_range": 0.15,
                "rope_scaling": {
                    "type": "default",
                    "rope_type": "default",
                    "mrope_section": [4, 6, 6],
                    "mrope_interleaved": True,
                },
            },
            vision_config={
                "depth": 4,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "deepstack_visual_indexes": [0, 1, 2],
                "num_position_embeddings": 64,
            },
            image_token_id=IMAGE,
            video_token_id=598,
            vision_start_token_id=597,
            vision_end_token_id=596,
        )
    ).eval()


def ragged_batch():
    """Two pairs on images of 4 x 4 patches (4 tokens), answers of 6, 4, 3 and 6 tokens."""
    image = [torch.full((PAIRS, count), token) for count, token in ((1, 597), (4, IMAGE), (1, 596))]
    prompt = torch.cat([torch.randint(500, (PAIRS, 3)), *image, torch.randint(500, (PAIRS, 5))], 1)
    ids = torch.cat([prompt.repeat(2, 1), torch.randint(500, (2 * PAIRS, 6))], 1)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, : prompt.shape[1]] = -100
    for row, cut in ((1, 2), (2, 3)):
        labels[row, -cut:] = -100
        mask[row, -cut:] = 0
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "pixel_values": torch.randn(PAIRS * 16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2 * PAIRS),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "ref_chosen_logps": torch.zeros(PAIRS),
        "ref_rejected_logps": torch.zeros(PAIRS),
    }


def test_packed_shared_and_separate_agree():
    model, batch = tiny_qwen3_vl(), ragged_batch()
    apart = {name: value for name, value in batch.items() if name != "labels" and not name.startswith("ref_")}
    apart["pixel_values"] = torch.cat([apart["pixel_values"]] * 2)
    with torch.no_grad():
        packed, lengths = answer_logps(model, batch)
        with shared_image_features(model, 2):
            logits, labels, rows = supervised_logits(model, batch)
        shared, _ = sum_rows(token_logps(logits, labels), rows, 2 * PAIRS)
        separate, _ = sequence_logps(model(**apart).logits, batch["labels"])
    assert lengths.tolist() == [6, 4, 3, 6]
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-4)


def test_every_open_parameter_gets_gradient():
    loras = {
        "lora_llm": LoraConfig(rank=2, alpha=2, dropout=0.0),
        "lora_vision": LoraConfig(rank=3, alpha=2, dropout=0.0),
    }
    model = prepare_trainable(tiny_qwen3_vl(), DpoConfig(**loras)).train()
    dpo_objective(model, ragged_batch())[0].backward()
    open_parameters = trainable_parameters(model)
    assert {part_of(name) for name in open_parameters} == {"llm", "vision", "projector"}
    assert all(parameter.grad is not None for parameter in open_parameters.values())
    assert all(".lora_" in name or part_of(name) == "projector" for name in open_parameters)
