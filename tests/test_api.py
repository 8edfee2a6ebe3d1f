"""What `import medray` offers, as docs/api.md shows it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import medray

PAGE = Path(__file__).resolve().parents[1] / "docs/api.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
SLOW = "# runs for minutes"


@pytest.mark.ray
def test_the_snippets_of_the_page_run(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in SNIPPETS:
        code = compile(snippet, str(PAGE), "exec")
        if SLOW not in snippet:  # what those call has tests of its own
            exec(code, names)
    assert sum(SLOW in snippet for snippet in SNIPPETS) == 1 and len(SNIPPETS) > 4


def test_every_name_is_there_and_on_the_page():
    page = PAGE.read_text()
    for name in medray.__all__:
        assert getattr(medray, name).__doc__ and name in page and name in dir(medray)
    with pytest.raises(AttributeError, match="it offers load_config"):
        medray.nothing  # noqa: B018


def test_importing_medray_loads_neither_torch_nor_ray():
    code = (
        "import sys, medray; assert not {'torch', 'ray', 'transformers'} & set(sys.modules), "
        "sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
