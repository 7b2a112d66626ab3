"""Reports: that they show every figure, hide no doubt, and trust no text."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import statistics
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from runtime_bench import cli, report, results
from runtime_bench.results import Check
from swiftprune.errors import SettingsError
from tests.runtime_bench.sample_results import case, gpu_result, layers_result, metric, run_result, trade_off_result

HOSTILE = "<script>alert(1)</script>"
REASON = "wrong answers</script><img src=x onerror=alert(2)>"


class _Page(HTMLParser):
    """The text that a reader sees, and the attributes of all elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._code = False
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._code = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._code = False

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.words.append(data)


def page(*results: Any) -> _Page:
    return _Page(report.html(results, [f"results/{index}.json" for index in range(len(results))]))


def everything() -> list[Any]:
    return [
        run_result(),
        run_result(engine="vllm", speedup=1.5, seed=1, warnings=["other processes used 31% of the processor time"]),
        run_result(
            "SmolLM2-135M",
            tpot=25.0,
            speedup=1.0,
            cases=[
                case(1, tpot=25.0, speedup=1.0, seed=2),
                case(8, void="the server ended with 1"),
            ],
        ),
        layers_result(),
        gpu_result(),
        trade_off_result(),
    ]


def test_no_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no results"):
        report.html([], [])
    with pytest.raises(SettingsError, match="no results"):
        report.markdown([])
    with pytest.raises(SettingsError, match="swiftprune-bench run"):
        report.picture([layers_result()], tmp_path / "x.png")


@pytest.mark.parametrize("missing", ["jinja2", "plotly.offline", "plotly.graph_objects"])
def test_without_the_extra_it_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SettingsError, match=r"pip install 'swiftprune\[report\]'"):
        page(run_result())


@pytest.mark.parametrize("make", [run_result, layers_result, gpu_result, trade_off_result])
def test_one_result_of_any_kind_is_enough(make: Any) -> None:
    result = make()
    seen = page(result)
    assert result.machine.cpu in seen.text
    assert result.command in seen.text
    assert "results/0.json" in seen.text
    assert "|" in report.markdown([result])


def test_every_figure_is_in_the_tables() -> None:
    run = run_result()
    text = page(run).text
    for figure in [*(figure for each in run.cases for figure in each.metrics), *run.load]:
        row = " ".join(
            [
                report.metric_name(figure.name),
                *(report.quantity(statistics.median(values)) for values in (figure.dense, figure.sparse)),
                f"{figure.unit} {figure.speedup().value:.2f}× {figure.speedup().low:.2f}–{figure.speedup().high:.2f}",
            ]
        )
        assert row in text
    for each in run.cases:
        assert each.label in text
    for quality in run.quality:
        assert f"{report.quantity(quality.dense)} {report.quantity(quality.sparse)}" in text
    assert "the kernels give 127 of 128 greedy tokens as the same weights unpacked, largest gap 0.031 <= 0.25" in text
    for version in run.machine.packages.values():
        assert version in text
    assert run.machine.revision in text


def test_every_cell_of_layers_and_gpus_is_in_the_tables() -> None:
    layers, gpu = layers_result(), gpu_result()
    text = page(layers, gpu).text
    for cell in layers.cells:
        assert f"{cell.rows} × {cell.cols} {cell.dtype} {cell.tokens} {cell.threads} {cell.backend}" in text
        assert f"{cell.speedup:.2f}×" in text
    for gpu_cell in gpu.cells:
        for time in gpu_cell.times:
            if time.status == "ok":
                assert f"{time.backend} {report.quantity(statistics.median(time.us))}" in text
            else:
                assert f"{time.backend} {time.status.capitalize()}: {time.reason}" in text


def test_quality_over_time() -> None:
    found = trade_off_result()
    for text in (page(found).text, report.markdown([found])):
        assert "the machine was busy: admm" in text
        assert "the state of the machine was not recorded: dense" in text
    seen = page(found).text
    assert "SmolLM2-135M-Instruct, quality over time 1.50× the perplexity of dense at best, of 5 recipes" in seen
    assert "20.0 → 30.0 best, in 58.4 minutes" in seen
    assert "best 58.4 30.0 1.50× 40.0 1.60× calibrate 3.00, mask 300.0, distill 3,200" in seen
    assert report.markdown([found]).splitlines()[:3] == [
        "| SmolLM2-135M-Instruct | minutes | wikipedia | x dense | news | x dense |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| dense | 0.0 | 20.0 | 1.00 | 25.0 | 1.00 |",
    ]
    assert "| admm | 2.5 | 60.0 | 3.00 | 80.0 | 3.20 |" in report.markdown([found])
    unpruned = found.model_copy(update={"rows": found.rows[:1]})
    assert "void nothing was pruned" in page(unpruned).text


def test_the_headline_is_the_case_with_the_fewest_at_once() -> None:
    cases = [
        case(4).model_copy(update={"metrics": [metric("tpot", [90, 90], [10, 10])]}),
        case(1, 256).model_copy(update={"metrics": [metric("tpot", [80, 80], [10, 10])]}),
        case(1, 64).model_copy(update={"metrics": [metric("ttft", [70], [10]), metric("tpot", [30, 30], [20, 20])]}),
    ]
    head = report.headline(run_result(cases=cases))
    assert head.speedup is not None
    assert (head.case, head.speedup.value) == (cases[2], 1.5)
    assert "1.50× faster" in page(run_result(cases=cases)).text


@pytest.mark.parametrize(
    ("sparse", "claim"),
    [([5.0, 5.0], "2.00× faster"), ([20.0, 20.0], "0.50× slower"), ([9.0, 11.0], "1.01× no certain difference")],
)
def test_the_headline_claims_only_what_is_certain(sparse: list[float], claim: str) -> None:
    only = case().model_copy(update={"metrics": [metric("tpot", [10.0, 10.0], sparse)]})
    assert claim in page(run_result(cases=[only])).text


def test_vllm_workloads_without_tpot() -> None:
    only = case().model_copy(update={"metrics": [metric("latency", [3.0], [2.0], unit="s")], "itl_ms": {}})
    result = run_result(cases=[only])
    assert "3.00 → 2.00 s time of the whole request" in page(result).text
    assert "3.00 -> 2.00 s, 1.50x (one round)" in report.markdown([result])


def test_a_void_case_shows_its_reason_and_no_figure() -> None:
    figure = metric("tpot", [123.4], [61.7], bound={"dense": 100.0, "sparse": 50.0})
    broken = case(void="wrong answers: too far off").model_copy(
        update={"metrics": [figure], "itl_ms": {"dense": [123.4], "sparse": [61.7]}}
    )
    result = run_result().model_copy(update={"cases": [broken], "load": [], "quality": []})
    html = report.html([result], ["a.json"])
    seen = _Page(html)
    assert "void wrong answers: too far off" in seen.text
    assert f"{broken.label} Void: wrong answers: too far off" in seen.text
    for text in (seen.text, report.markdown([result]), html.partition('id="figures"')[2].partition("</script>")[0]):
        assert "2.00" not in text
        assert "123" not in text
    assert "| void: wrong answers: too far off |" in report.markdown([result])


def test_doubts_are_shown() -> None:
    noisy = run_result(warnings=["other processes used 31% of the processor time"]).model_copy(
        update={"check": Check(tokens=10, equal=3, largest_gap=4.5, tolerance=0.25)}
    )
    silent = run_result(engine="vllm").model_copy(update={"check": None, "conditions": None})
    for text in (page(noisy, silent).text, report.markdown([noisy, silent])):
        assert "other processes used 31% of the processor time" in text
        assert "the sparse side wrote wrong tokens: the kernels give 3 of 10 greedy tokens" in text.replace("\\", "")
        assert "largest gap 4.5 > 0.25" in text
        assert "the tokens of the sparse side were not checked" in text
        assert "the state of the machine was not recorded" in text


def test_text_of_others_is_only_text() -> None:
    result = run_result(HOSTILE, cases=[case(1), case(2), case(4, void=REASON)], warnings=[HOSTILE])
    result.command = "swiftprune-bench run '</code></script><b>'"
    hostile = trade_off_result().model_copy(update={"model": HOSTILE})
    hostile.rows[1].recipe = HOSTILE
    html = report.html([result, layers_result(), hostile], [HOSTILE, "b.json", "c.json"])
    seen = _Page(html)
    assert HOSTILE in seen.text
    assert REASON in seen.text
    assert result.command in seen.text
    assert "<script>alert" not in html
    assert not any(tag in ("img", "b") for tag, _ in seen.elements)
    scripts = [attributes for tag, attributes in seen.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "figures"}, {}, {}]
    assert not any(name.startswith("on") for _, attributes in seen.elements for name in attributes)


def test_markdown_escapes_what_github_would_render() -> None:
    result = run_result("a|b\n<img src=x> [c](http://d) `e`", cases=[case(void=REASON)])
    text = report.markdown([result])
    assert r"| a\|b \<img src=x> \[c\](http://d) \`e\` | transformers |" in text
    assert "<img" not in text.replace(r"\<img", "")


def test_the_page_loads_nothing() -> None:
    seen = page(*everything())
    for tag, attributes in seen.elements:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#"), tag
    assert not any(tag in ("link", "iframe", "img", "object") for tag, _ in seen.elements)
    (policy,) = (a["content"] or "" for tag, a in seen.elements if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy.replace("http-equiv", "")


def test_tables_and_figures_say_what_they_are() -> None:
    seen = page(*everything())
    assert all(attributes.get("scope") for tag, attributes in seen.elements if tag == "th")
    labelled = [a for _, a in seen.elements if a.get("role") in ("img", "region")] + [
        a for tag, a in seen.elements if tag == "select"
    ]
    assert labelled
    assert all(attributes.get("aria-label") for attributes in labelled)
    levels = [int(tag[1]) for tag, _ in seen.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_markdown_table() -> None:
    cases = [
        case(1).model_copy(
            update={
                "metrics": [
                    metric("ttft", [200, 400, 300], [100, 200, 150]),
                    metric("tpot", [100, 110, 120], [50, 55, 60]),
                    metric("tokens_per_s", [10, 9, 8], [15, 13.5, 12], unit="tok/s", lower_is_better=False),
                ]
            }
        ),
        case(8, void="its process was ended by SIGKILL; was there enough memory?"),
    ]
    result = run_result("SmolLM2-135M", cases=cases, warnings=["the machine was busy before: load 3"])
    result.quality = result.quality[:1]
    assert report.markdown([result]) == (
        "| model | engine | case | TTFT | TPOT | tokens/s |\n"
        "| --- | --- | --- | ---: | ---: | ---: |\n"
        "| SmolLM2-135M | transformers | batch, 1 at once, 64 in, 48 out "
        "| 300.0 -> 150.0 ms, 2.00x (2.00-2.00, 75% sure) "
        "| 110.0 -> 55.0 ms, 2.00x (2.00-2.00, 75% sure) | 9.00 -> 13.5 tok/s, 1.50x (1.50-1.50, 75% sure) |\n"
        "| SmolLM2-135M | transformers | batch, 8 at once, 64 in, 48 out "
        "| void: its process was ended by SIGKILL; was there enough memory? | - | - |\n"
        "\n"
        "- **SmolLM2-135M, transformers**: the machine was busy before: load 3\n"
        "- **SmolLM2-135M, transformers**: void: its process was ended by SIGKILL; was there enough memory?: "
        "batch, 8 at once, 64 in, 48 out\n"
        "- SmolLM2-135M, transformers: the kernels give 127 of 128 greedy tokens as the same weights unpacked, "
        "largest gap 0.031 <= 0.25\n"
        "- SmolLM2-135M, transformers: perplexity 12.4 -> 19.9 (WikiText-2, test)\n"
    )


def test_labels_tell_results_apart() -> None:
    half = run_result().model_copy(update={"dtype": "float16"})
    assert report.labels([run_result(), half, run_result(engine="vllm"), layers_result()]) == [
        "Llama-3.2-1B, transformers, bfloat16",
        "Llama-3.2-1B, transformers, float16",
        "Llama-3.2-1B, vllm",
        "linear layers",
    ]
    assert len(set(report.labels([run_result(), run_result(), run_result()]))) == 3


def test_share_of_bound() -> None:
    time = metric("tpot", [10.0], [5.0], bound={"dense": 8.0})
    rate = metric("tokens_per_s", [10.0], [5.0], lower_is_better=False, bound={"dense": 20.0})
    assert report.share_of_bound(time, "dense") == 0.8
    assert report.share_of_bound(rate, "dense") == 0.5
    assert report.share_of_bound(time, "sparse") is None


def test_picture_is_a_png_twice_900_wide(tmp_path: Path) -> None:
    report.picture([*everything(), run_result("costs $5 or $6")], tmp_path / "made" / "speed.png")
    header = (tmp_path / "made" / "speed.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == 1800


# In a browser


def sync_api() -> Any:
    """Playwright's; without it the tests are skipped, but not in CI."""
    if os.environ.get("CI"):
        return importlib.import_module("playwright.sync_api")
    return pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium here: apt-get install chromium")
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api().sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hostile = run_result(HOSTILE, "<b onclick=alert(3)>vllm</b>", cases=[case(1), case(2), case(4, void=REASON)])
    results = [*everything(), hostile]
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.html(results, [f"results/{index}.json" for index in range(len(results))]))
    return path


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_in_a_browser(browser: Any, file: Path, width: int, height: int, theme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
    asked: list[str] = []
    complaints: list[str] = []

    def refuse(route: Any) -> None:
        asked.append(route.request.url)
        route.abort()

    def dismiss(dialog: Any) -> None:
        complaints.append(f"dialog {dialog.message}")
        dialog.dismiss()

    context.route(re.compile("^https?:"), refuse)
    tab = context.new_page()
    tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", dismiss)
    tab.goto(file.as_uri())

    figures = tab.locator("[data-figure]")
    assert tab.locator(".js-plotly-plot .main-svg .cartesianlayer").count() == figures.count() == 7
    for index in range(figures.count()):
        assert figures.nth(index).bounding_box()["width"] <= width
        assert figures.nth(index).locator(".trace path").count()

    def background() -> str:
        return str(tab.evaluate("getComputedStyle(document.body).backgroundColor"))

    def grid() -> str:
        return str(tab.locator("#chart-latency .ygrid").first.evaluate("line => getComputedStyle(line).stroke"))

    before = background(), grid()
    tab.locator("#theme").click()
    assert background() != before[0]
    assert grid() != before[1]
    tab.locator("#theme").click()
    assert (background(), grid()) == before

    for select in tab.locator("select").all():
        place = tab.locator("#" + select.get_attribute("data-for"))
        drawn = place.locator(".main-svg").first.inner_html()
        for option in select.locator("option").all()[::-1]:
            select.select_option(option.get_attribute("value"))
            assert option.text_content() in place.get_attribute("aria-label")
            assert place.locator(".trace path").count()
        select.select_option(index=1)
        assert place.locator(".main-svg").first.inner_html() != drawn

    for summary in tab.locator("summary").all():
        if summary.evaluate("summary => !summary.parentElement.open"):
            summary.click()
    copy = tab.locator("button[data-copy]").first
    copy.click()
    sync_api().expect(copy).to_have_text("Copied")

    for link in tab.locator("nav a").all():
        assert tab.locator(link.get_attribute("href")).count() == 1
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert not complaints
    assert not asked
    context.close()


def test_a_report_never_replaces_what_it_shows(tmp_path: Path) -> None:
    given = tmp_path / "run.json"
    results.save(run_result(), given)
    before = given.read_bytes()
    cases = [("--html", given, "one of the results"), ("--markdown", given, "one of the results")]
    cases += [("--picture", tmp_path, "is a folder"), ("--picture", tmp_path / "x.docx", "ends in .png")]
    for option, place, why in cases:
        run = CliRunner().invoke(cli.app, ["report", str(given), option, str(place)])
        assert isinstance(run.exception, SettingsError)
        assert why in str(run.exception)
    assert given.read_bytes() == before
    assert list(tmp_path.iterdir()) == [given]
