import pytest

from medray.config import VerifyConfig
from medray.errors import StageError
from medray.inference.verify import _against_transformers, verify_on_cluster

pytestmark = pytest.mark.vllm


def rows(png):
    questions = ["What is the shape of the nucleus?", "Describe.", "Is it big?"]
    return [
        {"sample_id": f"v{number}", "image": png(number), "question": text}
        for number, text in enumerate(questions)
    ]


def test_qwen_export_decodes_alike_and_bad_rows_are_skipped(ray_cluster, tiny_qwen, png, sections):
    model = sections["model_config"].model_copy(update={"pad_to_square": False})
    bad = {"sample_id": "bad", "image": b"", "question": "?"}
    report = verify_on_cluster(
        tiny_qwen,
        [bad, *rows(png)],
        VerifyConfig(rows=3),
        model,
        sections["data_config"],
        sections["engine_config"],
    )
    assert (report["rows"], report["skipped"]) == (3, 1)
    assert report["equal_rows"] + report["near_ties"] == 3 and report["tokens"] > 3
    with pytest.raises(StageError, match="none of 1 rows"):
        verify_on_cluster(
            tiny_qwen, [bad], VerifyConfig(), model, sections["data_config"], sections["engine_config"]
        )


def test_llava_decodes_alike_and_differences_are_named(player, talker, png, sections):
    from medray.inference.verify import _vllm_rows

    config = VerifyConfig(rows=3)
    taken, skipped = player.run(_vllm_rows(player, rows(png), config))
    assert (len(taken), skipped) == (3, 0)
    report = _against_transformers(talker, taken, config, sections["model_config"], on_gpu=False)
    assert report["equal_rows"] + report["near_ties"] == 3

    other_token = [{**taken[0], "token_ids": [*taken[0]["token_ids"][:2], 99, *taken[0]["token_ids"][3:]]}]
    with pytest.raises(StageError, match="v0, token 2"):
        _against_transformers(talker, other_token, config, sections["model_config"], on_gpu=False)
    other_prompt = [{**taken[0], "prompt_ids": [*taken[0]["prompt_ids"], 1]}]
    with pytest.raises(StageError, match="other prompt ids"):
        _against_transformers(talker, other_prompt, config, sections["model_config"], on_gpu=False)
