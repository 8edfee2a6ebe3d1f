"""Shared fixtures. Everything real: one local Ray for the whole session, tiny models in temporary folders."""

import os
import signal
from pathlib import Path

# Before torch or Ray are imported: two cores are shared by Ray workers, vLLM and pytest itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Serve gives up a proxy that is not ready within 5 seconds, or does not answer within 10: on a machine at
# work it needs longer.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "60")

# A background shell makes its children deaf to Ctrl-C, and theirs, unless they have a handler. Not by
# preexec_fn: that forks this process while Ray's threads talk to its cluster, and there were calls that never
# ended after it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ["tests.support.engine_fixtures", "tests.support.encoded_rows"]


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with four logical CPUs, shared by every test that needs one."""
    import ray

    from medray.running.ray_session import start_ray

    ray.shutdown()  # what a test began that did not ask for this one
    start_ray(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=True,
        logging_level="ERROR",
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # as medray.running.ray_session sets it
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory):
    """A tiny LLaVA with random weights, in Hugging Face format."""
    from medray.testbed.tiny_vlm import random_llava

    path = tmp_path_factory.mktemp("llava")
    random_llava(path, seed=0)
    return str(path)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory):
    """A tiny Qwen2.5-VL with random weights, in Hugging Face format."""
    from medray.testbed.tiny_vlm import random_qwen2_5_vl

    path = tmp_path_factory.mktemp("qwen")
    random_qwen2_5_vl(path, seed=0)
    return str(path)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A tiny CLIP with random weights, in Hugging Face format."""
    from medray.testbed.tiny_clip import random_clip

    path = tmp_path_factory.mktemp("clip")
    random_clip(path, seed=0)
    return str(path)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets named by MEDRAY_DATA."""
    folder = os.environ.get("MEDRAY_DATA")
    if not folder or not (Path(folder) / "wbcatt").is_dir():
        pytest.skip("MEDRAY_DATA does not name a folder with wbcatt/ and vqa_rad/")
    return Path(folder)
