"""The page: what it shows, what it asks a network for (nothing), how it fits into Chromium."""

import dataclasses
import hashlib
import html.parser
import http.server
import re
import shutil
import subprocess
import sys
import threading

import matplotlib
import numpy as np
import pytest
from hand_made import (
    FILES,
    MASKS,
    TEXTS,
    artifact,
    certificate,
    evidence,
    moved,
    per_token,
    recording,
    recordings,
    signature,
    timing,
    verdict,
    with_recording,
)

from lora_export import checks, judging, report
from lora_export.errors import InputError
from lora_export.records import Evidence, ModuleOutput, Status, TensorSpec
from lora_export.report import _plots

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"


def modules(*errors, found="value"):
    """Three modules of an artifact, allowed to deviate by one each."""
    return tuple(
        ModuleOutput("onnx", f"layer.{i}", found, error, 1.0, 1.0) for i, error in enumerate(errors)
    )


FULL = evidence(modules_compared=modules(0.0, 0.5, 2.0, 9.0))

# Two plots, of an artifact's answers alone.
RECORDED = with_recording(evidence(timings=()), "merged", None)


def certified(found):
    made = judging.certify(found, checks.RUN, "lora-export run", FILES, {"seed": 0}, 1)
    return report.render("html", made, found)


class Page(html.parser.HTMLParser):
    """The elements of a page that a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def full():
    return certified(FULL)


# ---------------------------------------------------------------- the page


def test_every_element_is_closed_where_it_was_opened(full):
    assert Page(full).open == []


def test_what_is_no_pass_comes_first_with_where_it_sits():
    found = certificate(
        verdict(check="sound"),
        verdict(Status.NOT_RUN, check="unknown"),
        verdict(Status.FAIL, check="broken", measured=9.0, where=("layer.0.query.weight",)),
    )
    text = report.render("html", found)
    places = [text.index(f"{check}: onnx") for check in ("broken", "unknown", "sound")]
    assert places == sorted(places)
    assert places[0] < text.index("<code>layer.0.query.weight</code>") < places[1]
    assert "A limit of 9 abs would have passed." in text
    assert re.search(r"<title>NOT proven: 1 of 3 verdicts pass</title>", text)


def test_a_page_on_which_all_passes_has_no_mark_of_failure():
    text = report.render("html", certificate(verdict()))
    assert "proven: 1 of 1 verdicts pass" in text
    assert 'class="bad"' not in text
    assert 'class="bad"' in report.render("html", certificate(verdict(Status.INCONCLUSIVE)))


def test_texts_are_shown_and_never_run():
    bad = verdict(Status.FAIL, check=HOSTILE, subject=HOSTILE, note=HOSTILE, where=(HOSTILE,))
    found = certificate(bad, command=HOSTILE, settings={HOSTILE: HOSTILE})
    page = Page(report.render("html", found))
    assert page.all("script") == page.all("img") == []
    assert sum(HOSTILE in text for text in page.texts) >= 6


def test_names_inside_plots_are_shown_and_never_run():
    known = {**FULL.recordings, HOSTILE: recording(HOSTILE, [np.ones((3, 2)), np.ones((2, 2))])}
    timed = timing(**{HOSTILE: 1.0})
    named = dataclasses.replace(FULL.modules_compared[3], module=HOSTILE, artifact=HOSTILE)
    known_labels = signature(labels=(HOSTILE, "positive"))
    found = dataclasses.replace(
        FULL, recordings=known, timings=(timed,), artifacts=(artifact(HOSTILE),),
        modules_compared=(named,), signature=known_labels,
    )  # fmt: skip
    page = Page(report.render("html", certificate(verdict()), found))
    assert page.all("script") == page.all("img") == []
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]


@pytest.mark.parametrize("name", ["größer", "好", "a" * 200, "$x_1$", "$", "<&>"])
def test_a_label_of_any_letters_is_shown(name):
    found = dataclasses.replace(RECORDED, signature=signature(labels=(name, "positive")))
    texts = Page(_plots.plots(found)[-1].svg).texts
    wanted = name if len(name) <= _plots.MOST_OF_A_NAME else name[:15] + "…"
    assert [text for text in texts if text.strip() == wanted]


def references(text):
    """What a browser would fetch: every address but those inside the page, and any import."""
    page = Page(text)
    names = ("src", "href", "xlink:href", "srcset", "action", "data", "poster")
    found = [a[n] for _, a in page.tags for n in names if n in a and not a[n].startswith("#")]
    found += re.findall(r"@import[^;]*|url\((?!#)[^)]*\)|https?://[^\s\"'<]*", text)
    return found + [name for name in ("script", "iframe", "link", "object") if page.all(name)]


def test_nothing_is_asked_of_a_network(full):
    assert references(full) == []
    assert "default-src 'none'" in full


@pytest.mark.parametrize(
    "fault",
    ['<img src="x.png">', '<link rel="stylesheet">', "<style>a{b:url(x)}</style>",
     "<style>@import 'x';</style>", '<a href="http://x">x</a>', "<script></script>"],
)  # fmt: skip
def test_what_would_be_asked_for_is_found(full, fault):
    assert references(full.replace("</body>", f"{fault}</body>")) != []


def test_the_same_evidence_gives_the_same_bytes_in_another_process():
    program = (
        "import sys; sys.path.insert(0, 'tests'); import test_report_html as t, hashlib; "
        "print(hashlib.sha256(t.certified_again().encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hashlib.sha256(certified_again().encode()).hexdigest()


def certified_again():
    return report.render("html", certificate(verdict()), FULL)


def test_a_style_that_was_set_for_other_plots_changes_nothing():
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.hashsalt": "another"}):
        changed = _plots.plots(RECORDED)
    assert changed == _plots.plots(RECORDED)


# ---------------------------------------------------------------- plots


def titles(found):
    return [plot.title for plot in _plots.plots(found)]


def test_there_is_a_plot_of_all_that_was_recorded():
    assert titles(FULL) == [
        "Error by layer: onnx",
        "Differences of logits from the reference",
        "Latency: batch 1, length 32",
        "Decisions of merged",
        "Decisions of onnx",
    ]


@pytest.mark.parametrize(
    ("gone", "left_out"),
    [
        ({"modules_compared": ()}, "Error by layer"),
        ({"modules_compared": modules(1.0, found="")}, "Error by layer"),
        ({"recordings": {}}, "Differences"),
        ({"recordings": {}}, "Decisions"),
        ({"timings": ()}, "Latency"),
        ({"timings": (timing(0, onnx=1.0),)}, "Latency"),
    ],
)
def test_a_plot_without_data_is_left_out(gone, left_out):
    found = titles(dataclasses.replace(FULL, **gone))
    assert [title for title in found if title.startswith(left_out)] == []
    assert len(found) < 5


def test_no_evidence_gives_no_plots():
    assert _plots.plots(Evidence()) == []
    assert "<svg" not in report.render("html", certificate(verdict()))


def test_every_plot_is_an_image_with_title_and_description(full):
    page = Page(full)
    known = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    images = page.all("svg")
    assert len(images) == 5
    for image in images:
        assert image["role"] == "img"
        assert set(image["aria-labelledby"].split()) <= known


def test_names_inside_a_page_are_used_once(full):
    names = [attributes["id"] for _, attributes in Page(full).tags if "id" in attributes]
    assert len(names) == len(set(names)) > 0


def test_plots_take_their_colours_from_the_page(full):
    body = full.partition("</style>")[2]
    assert "var(--series-0)" in body
    assert "var(--ink)" in body
    assert re.findall(r"#[0-9a-f]{6}\b", body) == []


def test_the_first_module_that_parts_is_named():
    (plot,) = _plots.plots(Evidence(modules_compared=FULL.modules_compared))
    assert "parts from the reference at layer.2, with 2.0e+00" in plot.description
    (plot,) = _plots.plots(Evidence(modules_compared=modules(0.0, 0.5)))
    assert "None is outside its limit" in plot.description


def test_decisions_are_held_against_labels_and_without_them_against_the_reference():
    # The reference says 1, 0, 1 as the labels do; now the labels differ in the last row.
    changed = [dataclasses.replace(RECORDED.batches[0], labels=(1, 0, 0)), RECORDED.batches[1]]
    found = dataclasses.replace(RECORDED, batches=tuple(changed))
    assert _plots.plots(found)[-1].description == "2 of 3 are those of the label."
    bare = [dataclasses.replace(batch, labels=()) for batch in RECORDED.batches]
    found = dataclasses.replace(RECORDED, batches=tuple(bare))
    assert _plots.plots(found)[-1].description == "3 of 3 are those of the reference."


def test_decisions_are_counted_in_the_right_cell():
    turned = moved(FULL, "onnx", 0, (0, 0), 10.0)  # the first row decides 0 now, and 1 is right
    counts = _plots._decisions(turned, turned.recordings["onnx"], labelled=True)
    assert counts.tolist() == [[1, 0], [1, 1]]


def test_decisions_on_tokens_leave_padding_out():
    found = _plots.plots(dataclasses.replace(per_token(), timings=(), batches=tuple(
        dataclasses.replace(batch, labels=()) for batch in per_token().batches)))[-1]  # fmt: skip
    assert found.description == "9 of 9 are those of the reference."


def test_places_in_a_text_are_no_classes():
    spans = signature(outputs=(TensorSpec("logits", "float32", ("batch", "sequence")),))
    answers = [mask * 1.0 for mask in MASKS]
    found = evidence(signature=spans, recordings=recordings(answers), timings=())
    assert titles(found) == ["Differences of logits from the reference"]


def test_of_many_differences_a_sample_is_drawn_and_the_largest_told(monkeypatch):
    monkeypatch.setattr(_plots, "MOST_POINTS", 2)
    found = moved(FULL, "onnx", 0, (2, 1), 0.5)
    apart = _plots._apart(found, found.recordings["onnx"], "logits")
    assert apart.size < 10
    assert apart.max() == pytest.approx(0.5, abs=1e-4)


def test_the_tolerance_is_the_one_of_the_verdict():
    found = _plots.plots(RECORDED)[0]
    (limit,) = {v.limit for v in checks.judge(RECORDED, checks.RUN) if v.check == "parity"}
    assert f"The tolerance is {limit:.1e}; " in found.description


TEXT, GRID = RECORDED.batches
BROKEN = {
    "answers that are NaN": moved(RECORDED, "onnx", 0, (0, 0), np.nan),
    "answers that are infinite": moved(RECORDED, "onnx", 0, (0, 0), np.inf),
    "no noise floor": moved(RECORDED, "unmerged", 0, (0, 0), np.nan),
    "a reference that is NaN": moved(RECORDED, "reference", 0, (0, 0), np.nan),
    "no answers": with_recording(RECORDED, "onnx", recording("onnx", [])),
    "other classes": with_recording(
        RECORDED, "onnx", recording("onnx", [np.zeros((3, 5)), np.zeros((2, 5))])
    ),
    "no difference": with_recording(RECORDED, "onnx", RECORDED.recordings["reference"]),
    "no unmerged model": with_recording(RECORDED, "unmerged", None),
    "no reference": with_recording(RECORDED, "reference", None),
    "no signature": dataclasses.replace(RECORDED, signature=None),
    "no inputs": dataclasses.replace(RECORDED, batches=()),
    "labels of no class": dataclasses.replace(
        RECORDED, batches=(dataclasses.replace(TEXT, labels=(7, -1, 0)), GRID)
    ),
    "too few labels": dataclasses.replace(
        RECORDED, batches=(dataclasses.replace(TEXT, labels=(1,)), GRID)
    ),
    "modules of no number": Evidence(modules_compared=modules(np.nan, np.inf, -1.0)),
    "times of zero": Evidence(timings=(timing(30, onnx=0.0),)),
    "times of no number": Evidence(timings=(timing(1, onnx=np.nan, pt2=np.inf),)),
    "one time": Evidence(timings=(timing(1, onnx=1.0),)),
    "an answer for each token": dataclasses.replace(per_token(), timings=()),
}


def test_without_a_noise_floor_no_tolerance_is_claimed():
    description = _plots.plots(BROKEN["no noise floor"])[0].description
    assert "values that are NaN or infinite" in description
    assert "tolerance" not in description


@pytest.mark.parametrize("found", BROKEN.values(), ids=BROKEN)
def test_evidence_of_any_kind_is_drawn(found):
    for plot in _plots.plots(found):
        assert Page(plot.svg).open == []


# ---------------------------------------------------------------- without the extra


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_an_input_error_that_names_the_extra(monkeypatch, package):
    from lora_export.report import html as page

    page._template.cache_clear()
    for name in [n for n in sys.modules if n == "lora_export.report._plots"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(report, "_plots", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}: pip install 'lora-export\[report\]'"):
        report.render("html", certificate(verdict()))


# ---------------------------------------------------------------- a real browser


AROUND = """<!DOCTYPE html><iframe src="report.html" width="{width}" height="844"
 style="border:0"></iframe><script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  page.querySelectorAll("details").forEach(entry => entry.open = true);
  document.title = Math.max(page.body.scrollWidth, page.documentElement.scrollWidth);
}});
</script>"""


def shown(folder, text, width):
    """Return how wide Chromium makes the page in a frame of `width`, and all it asks a server for.

    Everything that can be folded is unfolded.
    """
    (folder / "report.html").write_text(text, "utf-8")
    (folder / "around.html").write_text(AROUND.format(width=width))
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *_):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile",
               "--virtual-time-budget=5000", "--dump-dom"]  # fmt: skip
    try:
        done = subprocess.run(
            [CHROMIUM, *options, f"http://127.0.0.1:{server.server_port}/around.html"],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    found = re.search(r"<title>(\d+)</title>", done.stdout)
    return int(found[1]), set(asked) - {"/around.html", "/favicon.ico"}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome is installed")
class TestBrowser:
    @pytest.mark.parametrize("width", [360, 390, 1280])
    def test_a_page_fits_and_asks_for_nothing(self, tmp_path, width):
        long = "model.encoder.layer.11.attention.self.query.weight" * 4
        bad = verdict(Status.FAIL, note=long, subject=long, where=(long, *TEXTS))
        made = certificate(bad, verdict(), command=long, settings={long: long})
        taken, asked = shown(tmp_path, report.render("html", made, FULL), width)
        assert width - 20 < taken <= width  # a bar to scroll down has a width too
        assert asked == {"/report.html"}

    def test_a_page_that_is_too_wide_would_be_found(self, tmp_path, full):
        wide = full.replace("</body>", '<div style="width: 500px">x</div></body>')
        assert shown(tmp_path, wide, 390)[0] > 390

    def test_a_request_would_be_found(self, tmp_path, full):
        open_page = re.sub(r"<meta http-equiv[^>]*>", "", full)
        asking = open_page.replace("</body>", '<img src="picture.png"></body>')
        assert shown(tmp_path, asking, 390)[1] == {"/report.html", "/picture.png"}

    def test_the_page_itself_forbids_requests(self, tmp_path, full):
        asking = full.replace("</body>", '<img src="picture.png"></body>')
        assert shown(tmp_path, asking, 390)[1] == {"/report.html"}
