"""`cafe export --push` against a stand-in of the hub's HTTP API, by the real huggingface_hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cafe.errors import CheckpointError
from cafe.model.checkpoint.locate import TINY_DIR
from cafe.release.push import push_to_hub, uploaded_files
from helpers.hub import TOKEN, Hub, local_hub

SECONDS = 120


@pytest.fixture
def hub() -> Iterator[Hub]:
    with local_hub() as started:
        yield started


def cafe(hub: Hub, home: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its settings once, at import."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        **changes,
    }
    command = [sys.executable, "-m", "cafe", "export", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.slow
def test_a_pushed_model_is_the_directory_and_a_dry_run_changes_nothing(
    hub: Hub, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in uploaded_files(TINY_DIR):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes((TINY_DIR / name).read_bytes())
    (model / ".cache").mkdir()
    (model / ".cache" / "secret").write_text("never")
    arguments = [str(model), "--push", "somebody/model", "--private"]

    dry = cafe(hub, tmp_path, *arguments, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "the repository somebody/model is new" in dry.stdout
    assert "  model.safetensors\n" in dry.stdout
    assert not hub.repositories
    assert not [x for x in hub.requests if x.startswith("POST")]

    done = cafe(hub, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/somebody/model/commit/" in done.stdout
    assert hub.private == {"somebody/model": True}
    files = hub.repositories["somebody/model"]
    assert sorted(files) == sorted(uploaded_files(TINY_DIR))
    assert all((model / name).read_bytes() == content for name, content in files.items())

    again = cafe(hub, tmp_path, *arguments, "--dry-run")
    assert "the repository somebody/model is there" in again.stdout


@pytest.mark.slow
def test_the_hubs_refusals_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    arguments = ["tiny", "--push", "somebody/model"]
    no_token = cafe(hub, tmp_path, *arguments, HF_TOKEN="hf_wrong")
    assert no_token.returncode == 2
    assert "hf auth login" in no_token.stderr
    hub.read_only = True
    refused = cafe(hub, tmp_path, *arguments)
    assert refused.returncode == 2
    assert "the token may not write there" in refused.stderr
    assert not hub.repositories
    offline = cafe(hub, tmp_path, *arguments, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    assert "Traceback" not in no_token.stderr + refused.stderr + offline.stderr


def test_what_cannot_be_pushed_is_said_before_the_hub_is_asked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="OWNER/NAME"):
        push_to_hub(TINY_DIR, "model")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        push_to_hub(tmp_path, "somebody/model")
