"""Model folders: complete, in the names vLLM knows, written whole or not at all; python starts without
torchvision's library.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from medray.models.export import save_vlm


def tensor_names(folder):
    return {name for path in Path(folder).glob("*.safetensors") for name in safe_open(path, "pt").keys()}  # noqa: SIM118


@pytest.mark.parametrize("fixture", ["tiny_llava", "tiny_qwen"])
def test_saved_model_loads_with_every_weight_unchanged(fixture, request, tmp_path):
    folder = request.getfixturevalue(fixture)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.chat_template and processor.chat_template == processor.tokenizer.chat_template
    save_vlm(model, processor, tmp_path / "again")
    assert tensor_names(tmp_path / "again") == tensor_names(folder)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_clip_tower_has_the_names_vllm_wants(tiny_llava):
    tower = [name for name in tensor_names(tiny_llava) if "vision_tower" in name]
    assert tower and all("vision_tower.vision_model." in name for name in tower)


def test_cast_changes_the_folder_and_not_the_model(tiny_llava, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32)
    save_vlm(model, AutoProcessor.from_pretrained(tiny_llava), tmp_path / "bf16", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {
        p.dtype
        for p in AutoModelForImageTextToText.from_pretrained(tmp_path / "bf16", dtype="auto").parameters()
    } == {torch.bfloat16}
    assert model.config.dtype == torch.float32 and model.dtype == torch.float32


def test_failed_export_leaves_the_old_folder_and_nothing_else(tiny_llava, tmp_path, monkeypatch):
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    processor = AutoProcessor.from_pretrained(tiny_llava)
    save_vlm(model, processor, tmp_path / "model")
    before = sorted(os.listdir(tmp_path / "model"))

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(processor), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_vlm(model, processor, tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"] and sorted(os.listdir(tmp_path / "model")) == before


def test_torchvision_imports_in_a_fresh_process_and_torch_is_not_loaded_for_it(tmp_path):
    code = (
        "import sys; assert 'torch' not in sys.modules; import torchvision, torchvision.transforms.v2, "
        "torch; "
        "torch.ops.torchvision.nms; print(torchvision.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.28")


def test_python_starts_quietly_when_the_shim_cannot_be_imported(tmp_path):
    line = (Path(__file__).parents[2] / "medray" / "medray_torchvision_shim.pth").read_text()
    (tmp_path / "medray_torchvision_shim.pth").write_text(line)
    code = f"import site; site.addsitedir({str(tmp_path)!r}); print('up')"
    # -S: no site-packages, so medray is not there.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "up\n", "")
