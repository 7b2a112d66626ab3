"""Checkpoints as people bring them: with leftovers, without a head, in a wrapper, with code of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Gemma3Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    Mistral3Config,
)

from exporters import export
from swiftprune.__main__ import run as run_tool
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings, make_settings
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.kernels.linear import Linear24
from swiftprune.models.load import load_whole_model
from swiftprune.stages import memory
from swiftprune.stages.context import Run
from swiftprune.stages.text import load_data
from tests import models

NO_DATA = PruneSettings(calibration="none")
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_the_model_has_no_place_for_come_along(tiny_copy: Path, text_file: Path, tmp_path: Path) -> None:
    """Old Llama and Pythia checkpoints hold rotary tables and masks, newer ones heads for further tokens."""
    left = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "mtp.layers.0.norm.weight": torch.ones(64)}
    edit_tensors(tiny_copy, lambda tensors: tensors.update(left))
    settings = PruneSettings(
        method="wanda",
        calibration=str(text_file),
        samples=8,
        seqlen=32,
        refine=("weights", "blocks", "distill"),
        steps=2,
        max_perplexity_ratio=1.05,
    )
    export(tiny_copy, tmp_path / "out", settings, target="dense")
    written = {k: v for shard in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(shard).items()}
    assert all(torch.equal(written[name], tensor) for name, tensor in left.items())


@pytest.mark.parametrize("settings", [{}, {"refine": ("distill",), "steps": 2}, {"method": "admm"}])
def test_a_wrapper_that_transformers_knows(settings: dict[str, Any], text_file: Path, tmp_path: Path) -> None:
    """What a causal model has in its config stands in `text_config` here."""
    config = Gemma3Config(
        text_config={**SMALL, "head_dim": 16, "sliding_window": 32},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    folder = models.write_model(tmp_path / "gemma", config)
    calibration = {"calibration": str(text_file), "samples": 8} if settings else {"samples": 2}
    export(folder, tmp_path / "out", PruneSettings(**settings, **calibration, seqlen=32, dtype="float16"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["text_config"]["dtype"] == "float16"


@pytest.mark.parametrize("settings", [{"method": "admm"}, {"refine": ("distill",), "steps": 2}])
def test_a_model_that_sees_images(settings: dict[str, Any], text_file: Path, tmp_path: Path) -> None:
    """No class for causal language models loads it: text is what it is pruned on, and images what it still reads."""
    config = Mistral3Config(
        text_config={**SMALL, "model_type": "mistral", "head_dim": 16},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_index=10,
        vision_feature_layer=-1,
    )
    folder, out = models.write_model(tmp_path / "m", config), tmp_path / "out"
    given = PruneSettings(**settings, calibration=str(text_file), samples=8, seqlen=32)
    report = export(folder, out, given)
    with pytest.raises(SettingsError, match="--permute"):
        export(folder, tmp_path / "no", given.model_copy(update={"permute": True}))
    assert {layer.name.partition(".layers.")[0] for layer in report.layers} == {"model.language_model"}
    tower = sum(e.nbytes for name, e in Checkpoint(folder).tensors.items() if "vision" in name or "projector" in name)
    assert tower == report.bytes_before - report.token_bytes_before > 0
    packed = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    dense = models.masked_twin(folder, packed, [layer.name for layer in report.layers])
    trained = {name: p for name, p in packed.named_parameters() if "language_model" in name and "norm" in name}
    dense.load_state_dict(trained, strict=False)
    text = torch.tensor([[5, 6, 10, 10, 7, 8]])
    image = {"pixel_values": torch.randn(1, 3, 28, 56), "image_sizes": torch.tensor([[28, 56]])}
    for inputs in ({"input_ids": text, **image}, {"input_ids": text + 20}):
        with torch.no_grad():
            found, wanted = packed(**inputs).logits, dense(**inputs).logits
        assert (found - wanted).norm() < 2e-2 * wanted.norm()
    assert "AutoModelForMultimodalLM.from_pretrained" in (out / "README.md").read_text()


def test_a_hybrid_with_convolutions(text_file: Path, tmp_path: Path) -> None:
    config = Lfm2Config(**SMALL | {"num_hidden_layers": 3}, layer_types=["conv", "full_attention", "conv"])
    folder = models.write_model(tmp_path / "lfm", config)
    report = export(
        folder, tmp_path / "out", PruneSettings(method="admm", calibration=str(text_file), samples=2, seqlen=32)
    )
    assert {layer.kind for layer in report.layers} >= {"in_proj", "out_proj", "w1", "w2", "w3", "q_proj"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_head_that_is_stored_in_the_place_of_the_embeddings(tiny_copy: Path, text_file: Path, tmp_path: Path) -> None:
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=2, seqlen=32, permute=True)
    export(tiny_copy, tmp_path / "usual", settings, target="dense")
    edit_tensors(tiny_copy, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    export(tiny_copy, tmp_path / "out", settings, target="dense")
    usual, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("usual", "out"))
    for name, parameter in usual.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


def test_a_checkpoint_without_a_head(tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    AutoModel.from_pretrained(tiny_models("llama-mha-untied")).save_pretrained(folder)
    edit_config(folder, architectures=["LlamaForCausalLM"], tie_word_embeddings=False)
    models.write_tokenizer(folder)
    said: list[str] = []
    given = PruneSettings(method="wanda", calibration=str(text_file), samples=2, seqlen=32)
    export(folder, tmp_path / "out", given, notify=said.append)
    assert any("holds no output head" in text for text in said)
    AutoModel.from_pretrained(tmp_path / "out")
    for settings in (PruneSettings(), given.model_copy(update={"refine": ("distill",), "steps": 2})):
        with pytest.raises(CheckpointError, match="holds no output head, which --"):
            export(folder, tmp_path / "again", settings)
    with pytest.raises(CheckpointError, match="holds no output head, which --evaluate needs"):
        export(folder, tmp_path / "again", given, evaluate=text_file)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_other_models_over_the_packed_body(kind: Any, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    export(
        tiny_models("llama-mha-untied"),
        tmp_path / "out",
        PruneSettings(calibration="none", ignore=r"layers\.0\.mlp|lm_head"),
    )
    model, load = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert sum(isinstance(module, Linear24) for module in model.modules()) == 18
    assert not load["mismatched_keys"]
    assert set(load["missing_keys"]) <= {"score.weight"}


def test_attention_is_chosen_here_and_kept_in_the_config(tiny_copy: Path, text_file: Path, tmp_path: Path) -> None:
    edit_config(tiny_copy, attn_implementation="flash_attention_2")
    settings = PruneSettings(samples=2, seqlen=16, refine=("distill",), steps=1)
    export(tiny_copy, tmp_path / "out", settings, target="dense")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attn_implementation"] == "flash_attention_2"


def test_the_models_own_generation_settings_change_nothing(tiny_copy: Path, tiny_models: Callable[[str], Path]) -> None:
    """Else self-sampled text is skewed, and every case of a benchmark is void for wrong answers."""
    own = {"do_sample": True, "repetition_penalty": 1.7, "top_k": 2, "temperature": 0.1, "no_repeat_ngram_size": 2}
    (tiny_copy / "generation_config.json").write_text(json.dumps({**own, "bos_token_id": 0, "eos_token_id": 1}))
    plain = tiny_models("llama-gqa-tied")
    first, second = (
        load_data(Run(Checkpoint(folder), PruneSettings(samples=3, seqlen=24))) for folder in (tiny_copy, plain)
    )
    assert first is not None
    assert second is not None
    assert torch.equal(first.tokens, second.tokens)
    model = load_whole_model(tiny_copy)
    prompt = torch.tensor([[5, 6, 7]])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
    logits = model(answer[:, :-1]).logits[0, 2:]
    assert torch.equal(logits.argmax(-1), answer[0, 3:])
    assert model.generation_config.eos_token_id == 1


def test_what_loaders_need_comes_along_and_what_misleads_them_does_not(tiny_copy: Path, tmp_path: Path) -> None:
    edit_config(tiny_copy, auto_map={"AutoConfig": "configuration_x.XConfig"})
    (tiny_copy / "configuration_x.py").write_text(
        "from transformers import LlamaConfig\nclass XConfig(LlamaConfig):\n    pass\n"
    )
    wanted = {
        "vocab.bpe": "",
        "additional_chat_templates/tool.jinja": "x",
        "code/helper.py": "",
        "generation_config.json": "{}",
    }
    unwanted = {
        "adapter_config.json": "{}",
        "pytorch_model.bin.index.json": "{}",
        "trainer_state.json": "{}",
        "params.json": "{}",
        "original/params.json": "{}",
        "original/consolidated.00.pth": "",
        "checkpoint-5/config.json": "{}",
        "checkpoint-5/model.safetensors": "",
        ".git/config.json": "",
        "__pycache__/x.py": "",
        "training.bin": "",
    }
    for name, content in {**wanted, **unwanted}.items():
        (tiny_copy / name).parent.mkdir(exist_ok=True)
        (tiny_copy / name).write_text(content)
    export(tiny_copy, tmp_path / "out", NO_DATA)
    made = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {*wanted, "configuration_x.py", "tokenizer.json"} <= made
    assert not made & unwanted.keys()
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(config).__name__ == "XConfig"


def test_code_that_a_checkpoint_brings_is_run_only_when_it_is_trusted(tiny_copy: Path, tmp_path: Path) -> None:
    edit_config(
        tiny_copy,
        model_type="brought",
        auto_map={"AutoConfig": "code_x.XConfig", "AutoModelForCausalLM": "code_x.XForCausalLM"},
    )
    (tiny_copy / "code_x.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class XConfig(LlamaConfig):\n    model_type = 'brought'\n"
        "class XForCausalLM(LlamaForCausalLM):\n    config_class = XConfig\n"
    )
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        export(tiny_copy, tmp_path / "out", NO_DATA)
    report = export(
        tiny_copy, tmp_path / "out", PruneSettings(samples=2, seqlen=16), target="dense", trust_remote_code=True
    )
    assert len(report.layers) == 21


def test_presets_leave_out_what_cannot_be_had_and_say_so(text_file: Path, tmp_path: Path) -> None:
    """What was asked for by name is refused instead, before any work."""
    granite = models.write_model(tmp_path / "granite", GraniteConfig(**SMALL, logits_scaling=8.0))
    given = {"calibration": str(text_file), "samples": 4, "seqlen": 32}
    said: list[str] = []
    stages: set[str] = set()
    report = export(
        granite,
        tmp_path / "out",
        make_settings("balanced", given),
        target="dense",
        notify=said.append,
        progress=lambda stage, *_: stages.add(stage),
    )
    assert (report.settings.method, report.settings.refine, report.settings.minutes) == ("admm", (), None)
    assert any("Left out of --quality" in text and "changes its logits after the head" in text for text in said)
    assert any("no chat template" in text for text in said)
    assert "prune" in stages
    lfm = models.write_model(tmp_path / "lfm", Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))
    left = Run(Checkpoint(lfm), make_settings("best", given), notify=said.append)
    assert not left.settings.permute
    assert left.settings.refine == ("distill",)
    for folder, asked, message in (
        (granite, {"refine": ("distill",), "steps": 2}, "changes its logits after the head"),
        (lfm, {"permute": True}, "--permute knows the decoder blocks of"),
    ):
        stages.clear()
        with pytest.raises(SettingsError, match=message):
            export(
                folder,
                tmp_path / "refused",
                make_settings("balanced", given | asked),
                progress=lambda stage, *_: stages.add(stage),
            )
        assert not stages


def test_a_target_that_would_store_nothing_sparse_is_refused(tmp_path: Path) -> None:
    folder = models.write_model(tmp_path / "model", models.SUPPORTED["llama-gqa-tied"], torch.float32)
    with pytest.raises(SettingsError, match=r"store every linear dense: .*does not take float32; add --dtype bfloat16"):
        export(folder, tmp_path / "out", NO_DATA, target="torch")


@pytest.mark.parametrize(
    ("ignore", "dense"),
    [
        ("re:.*down_proj", 3),
        ("re:down_proj|model.layers.0.mlp.up_proj", 1),
        ("lm_head, model.layers.0", 7),
        ('["lm_head", "re:.*layers.[01].mlp.*"]', 6),
        (r"layers\.\d{1,2}\.mlp.(up|gate)_proj", 6),
        ("layers.1", 7),
    ],
)
def test_patterns_of_ignore(ignore: str, dense: int, tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL | {"num_hidden_layers": 11 if ignore == "layers.1" else 3})
    pipeline = Run(
        Checkpoint(models.write_model(tmp_path / "model", config)), PruneSettings(calibration="none", ignore=ignore)
    )
    assert sum(name.startswith("model.layers") for name in pipeline.targets.dense) == dense


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ("Layers.0", r"'Layers\.0': no module of the model has a name that it matches; near are: .*layers\.0"),
        ("re:down_proj", r"near are: .*down_proj"),
        ("lm_head,re:.*mlp.gate$", r"'re:\.\*mlp\.gate\$'"),
        ("lm_head,dwon_proj", r"near are: .*down_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(
    ignore: str, message: str, tiny_models: Callable[[str], Path]
) -> None:
    with pytest.raises(SettingsError, match=message):
        Run(Checkpoint(tiny_models("llama-gqa-tied")), PruneSettings(calibration="none", ignore=ignore))


def test_a_hub_repository_gives_one_copy_of_its_weights(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub by a stand-in that follows its rules for patterns."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    AutoModelForCausalLM.from_pretrained(tiny_models("llama-mha-untied")).save_pretrained(hub, max_shard_size="200KB")
    shards = sorted(path.name for path in hub.glob("*.safetensors"))
    assert len(shards) > 1
    for name in ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "flax.msgpack"):
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_text("another copy")
    asked: list[str | None] = []

    def download(name: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        asked.append(revision)
        files = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = Checkpoint.open("owner/name", revision="v2")
    assert set(asked) == {"v2"}
    assert checkpoint.shards == shards
    taken = {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}
    assert not any("another copy" in (cache / name).read_text(errors="ignore") for name in taken)
    for path in (*hub.glob("model*"), hub / "pytorch_model.bin"):
        path.unlink()
    shutil.rmtree(cache)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*, nor these of pytorch_model\.bin"):
        Checkpoint.open("owner/name")
    with pytest.raises(SettingsError, match="is a local folder, which has no revisions"):
        Checkpoint.open(hub, revision="v2")


def test_a_stage_that_does_not_fit_into_memory_is_refused_before_any_work(
    tiny_models: Callable[[str], Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preset leaves distillation out instead; both say how much is needed and how much there is."""
    folder, said = tiny_models("llama-gqa-tied"), list[str]()
    given: dict[str, Any] = {"calibration": str(text_file), "samples": 4, "seqlen": 32}
    monkeypatch.setattr(memory, "available_bytes", lambda compute: 100_000_000)
    with pytest.raises(SettingsError, match=r"--refine distill needs about 1\.3 GB of memory, and 0\.1 GB are free"):
        Run(Checkpoint(folder), PruneSettings(method="wanda", refine=("distill",), steps=2, **given))
    left = Run(Checkpoint(folder), make_settings("balanced", given), notify=said.append)
    assert (left.settings.refine, left.settings.minutes) == ((), None)
    assert any("Left out of --quality" in text and "0.1 GB are free" in text for text in said)
    monkeypatch.setattr(memory, "available_bytes", lambda compute: 1000)
    Run(Checkpoint(folder), PruneSettings(method="wanda", **given), notify=said.append)
    assert said[-1].startswith("The largest decoder block takes about 0.0 GB of memory, and 0.0 GB are free")


def test_the_limit_of_the_process_counts() -> None:
    code = (
        "from swiftprune.compute import Compute; from swiftprune.stages.memory import available_bytes; "
        "print(available_bytes(Compute()))"
    )
    run = ["prlimit", "--data=2500000000", sys.executable, "-c", code]
    found = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert 0 < found < 2_500_000_000


LOAD = (
    "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__, sys.argv[2:])"
)


@pytest.mark.parametrize(
    ("options", "imports"),
    [
        (["-m", "swiftprune"], "from transformers import AutoModelForCausalLM"),  # it knows nothing of the format
        ([], "import swiftprune; from transformers import AutoModelForCausalLM"),
        ([], "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_config; import swiftprune"),
    ],
)
def test_importing_swiftprune_is_all_that_loading_needs(
    options: list[str], imports: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    export(tiny_models("llama-gqa-tied"), tmp_path / "out", NO_DATA)
    (tmp_path / "tool.py").write_text(f"import sys; {imports}\n{LOAD}\n")
    command = [sys.executable, *options, str(tmp_path / "tool.py"), str(tmp_path / "out"), "--more"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout == "Linear24 ['--more']\n", run.stderr


def test_tools_to_run_must_be_there() -> None:
    with pytest.raises(SystemExit, match="no-such-tool: no such command"):
        run_tool("no-such-tool", [])
