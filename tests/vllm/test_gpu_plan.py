"""A plan for GPUs inside vLLM, on the CPU: by backends that only tests know, over packed pairs whole and in shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from swiftprune.kernels import dispatch
from tests.vllm import stand_in
from tests.vllm.conftest import Answers, Checkpoints
from tests.vllm.engine import PROMPTS, TOKENS, TOLERANCE, answers, ask, assert_same, engine

SERVED = f"12 2:4 linears run on the backend {stand_in.PLAN}. {dispatch.BACKEND_VARIABLE}={stand_in.PLAN} asks for it"


@pytest.fixture
def plan_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and in those that vLLM starts: these take `sys.path` over, and load what is installed there."""
    stand_in.install()
    installed = tmp_path / "stand_in-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[vllm.general_plugins]\nstand_in = tests.vllm.stand_in:install\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # plans are for GPUs alone, and for interpreters of their kernels
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, stand_in.PLAN)
    for backend in (stand_in.FEW, stand_in.MANY):
        backend.tokens.clear()


@pytest.mark.usefixtures("plan_asked_for")
@pytest.mark.parametrize(("name", "eager"), [("qwen2", True), ("llama-gqa-tied", False)], ids=["eager", "compiled"])
def test_the_number_of_tokens_decides(
    name: str, eager: bool, checkpoints: Checkpoints, dense_answers: Answers, log: list[str]
) -> None:
    packed = ask(checkpoints(name, "packed"), dtype="float32", enforce_eager=eager)
    assert assert_same(dense_answers(name, "float32"), packed, TOLERANCE["float32"]) == len(PROMPTS) * TOKENS
    assert len(log) == 1
    assert SERVED in log[0]
    few, many = (set(backend.tokens) for backend in (stand_in.FEW, stand_in.MANY))
    assert few
    assert few <= {*range(1, stand_in.MOST_OF_FEW + 1)}
    assert many
    assert min(many) > stand_in.MOST_OF_FEW


@pytest.mark.usefixtures("plan_asked_for")
def test_a_compiled_graph_of_other_backends_is_not_taken_from_the_cache(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs on one cache: what the second plan names runs. vLLM's key knows nothing of how a plan was asked for."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    keys = []
    for plan in (stand_in.PLAN, stand_in.OTHER_WAY, stand_in.PLAN):
        monkeypatch.setenv(dispatch.BACKEND_VARIABLE, plan)
        for backend in (stand_in.FEW, stand_in.MANY):
            backend.tokens.clear()
        keys.append(compiled_key(checkpoints("llama-gqa-tied", "packed")))
        few, many = (stand_in.FEW, stand_in.MANY) if plan == stand_in.PLAN else (stand_in.MANY, stand_in.FEW)
        assert few.tokens
        assert max(few.tokens) <= stand_in.MOST_OF_FEW
        assert all(count > stand_in.MOST_OF_FEW for count in many.tokens)
    assert keys[0] == keys[2] != keys[1]


def compiled_key(folder: Path) -> str:
    """Answers a prompt, and returns what vLLM keys its compiled graphs by."""
    with engine(folder, dtype="float32", enforce_eager=False) as llm:
        answers(llm, [[*range(5, 15)]], tokens=3)
        return str(llm.llm_engine.vllm_config.compute_hash())


@pytest.mark.usefixtures("plan_asked_for")
def test_shares_of_two_devices(
    checkpoints: Checkpoints, dense_answers: Answers, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also compiled: the operator is all that the graph holds of a plan."""
    options = {"tensor_parallel_size": 2, "enforce_eager": False}
    packed = ask(checkpoints("llama-gqa-tied", "packed"), dtype="float32", **options)
    dense = dense_answers("llama-gqa-tied", "float32")
    assert assert_same(dense, packed, TOLERANCE["float32"]) == len(PROMPTS) * TOKENS
    assert "".join(capfd.readouterr()).count(SERVED) == 2
