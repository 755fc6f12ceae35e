"""A saved result says where it comes from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from octavo.bench import report


def test_the_commit_tells_whether_files_were_changed(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    assert report.commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    clean = report.commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "file").write_text("two")
    assert report.commit(tmp_path) == f"{clean}+changes"


def test_a_result_is_saved_with_its_surroundings(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "result.json"
    report.save(file, "bench x", {"path": Path("a")}, {"speed": 1.5})
    saved = json.loads(file.read_text())
    assert saved["command"] == "bench x"
    assert saved["arguments"] == {"path": "a"}
    assert saved["result"] == {"speed": 1.5}
    assert saved["date"].endswith("+00:00")
    assert saved["hardware"]["cpu"]
    assert saved["hardware"]["memory_gib"] > 0
