"""`vllm serve` on the packed SmolLM2, driven by the official client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI

from exporters import export
from runtime_bench import demo_data
from swiftprune.config import PruneSettings

pytestmark = pytest.mark.slow
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OpenAI, str]]:
    folder = tmp_path_factory.mktemp("server")
    export(demo_data.fetch(Path("build/demo")).model, folder / "model", PruneSettings(calibration="none"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "vllm"),
        "serve",
        str(folder / "model"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "512",
        "--enforce-eager",
        "--served-model-name",
        "smollm2-2of4",
    ]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = folder / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        assert "swiftprune: 120 2:4 linears run on the backend" in log.read_text()
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120), "smollm2-2of4"
    finally:
        process.terminate()  # not SIGINT, which jobs in the background ignore
        assert process.wait(60) == 0
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"vllm serve did not start:\n{log.read_text()[-4000:]}")


def test_completions(server: tuple[OpenAI, str]) -> None:
    client, model = server
    first, again = (
        client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0) for _ in range(2)
    )
    assert first.choices[0].text == again.choices[0].text != ""
    assert first.usage is not None
    assert first.usage.completion_tokens == 12


def test_streaming_gives_the_same_text(server: tuple[OpenAI, str]) -> None:
    client, model = server
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text
    parts = [
        chunk.choices[0].text
        for chunk in client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    ]
    assert len(parts) > 1
    assert "".join(parts) == whole


def test_chat(server: tuple[OpenAI, str]) -> None:
    client, model = server
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Say hello."}], max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_sixteen_requests_at_once(server: tuple[OpenAI, str]) -> None:
    client, model = server

    def complete(index: int) -> str:
        prompt = " ".join(str(number) for number in range(index + 1))
        done = client.completions.create(model=model, prompt=prompt, max_tokens=8 + index, temperature=0)
        return str(done.choices[0].text)

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(complete, range(16)))
    assert all(together)
    assert complete(3)[:4] == together[3][:4]
