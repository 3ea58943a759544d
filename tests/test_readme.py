"""The code in README runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_blocks_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), names)
    assert names
    if "result" in names:
        assert "knn" in capsys.readouterr().out


def test_files_that_readme_names_are_there() -> None:
    named = set(re.findall(r"(?:configs|docs|benchmarks)/[\w/]+\.(?:yaml|md|py|png)", README))
    assert len(named) >= 5
    assert all((Path(__file__).parent.parent / path).is_file() for path in named)
