import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from longwave.tasks.progress import clock
from longwave.training.chart import MOST_POINTS, Line, line_chart, smooth, thin, ticks
from longwave.training.live import Live, thousands
from longwave.training.log import Log, read_log
from longwave.training.loop import train
from longwave.training.progress import Budget, Progress
from longwave.training.report import render

VOID = {"meta", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects tags, attributes and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.said = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID or tag == "polyline" or tag == "circle":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


@pytest.fixture
def page(make) -> tuple[Page, str, str]:
    config = make(steps=4, eval_every=2, sample_prompt="<b>&")
    train(config)
    html = Path(config.out, "report.html").read_text()
    return Page(html), html, config.out


def test_the_report_is_one_whole_file(page):
    parsed, html, _ = page
    assert "http" not in html
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert not {"src", "href"} & {name for name, _ in parsed.attributes}
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html


def test_the_report_shows_the_run(page):
    parsed, _, out = page
    said = "".join(parsed.said)
    assert parsed.tags.count("svg") == 5
    bits = [entry["bits_per_byte"] for entry in read_log(out) if entry["event"] == "eval"]
    assert len(bits) == 2
    assert f"{bits[-1]:.3f}" in said
    assert "optim.lr" in said
    assert '"kind": "mamba2"' in said
    assert "Repeat it" in said
    assert "after step 4" in said


def test_text_is_escaped():
    entries = [
        {
            "event": "start",
            "step": 0,
            "config": {},
            "parameters": 1,
            "flops_per_token": 1.0,
            "environment": {},
            "command": "a <b>",
        },
        {"event": "sample", "step": 1, "text": "<script>&</script>"},
    ]
    parsed = Page(render("<run>", entries))
    assert "script" not in parsed.tags
    assert "<script>&</script>" in "".join(parsed.said)


def test_the_log_is_json_lines(page):
    _, _, out = page
    entries = [json.loads(line, parse_constant=pytest.fail) for line in Path(out, "log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in entries if e["event"] != "sample"] == [
        "start", "step", "step", "eval", "step", "step", "eval", "checkpoint",
    ]  # fmt: skip
    assert [e["tokens"] for e in entries if e["event"] == "step"] == [64, 128, 192, 256]


def test_the_log_drops_what_is_beyond_the_checkpoint_and_half_lines(tmp_path):
    with Log(tmp_path, 0) as log:
        for step in range(1, 5):
            log.write("step", step)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "st')
    with Log(tmp_path, 2) as log:
        log.write("step", 3)
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3]
    Log(tmp_path, 0).__exit__()
    assert read_log(tmp_path) == []


def test_charts():
    assert line_chart("empty", "step", [Line("none", [])]) == ""
    Page(line_chart("one point & <more>", "step", [Line("a", [(1, 2.0)], "marked")]))
    Page(line_chart("flat", "step", [Line("a", [(1, 0.0), (2, 0.0)])]))
    many = [(float(x), 2.0 * x) for x in range(1001)]
    assert len(thin(many)) <= MOST_POINTS
    assert thin(many)[0] == (1.0, 2.0)  # mean of 0, 1, 2
    assert [y for _, y in smooth([(0, 5.0), (1, 5.0), (2, 5.0)])] == pytest.approx([5.0] * 3)
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.3, 1.9)[0] <= 1.3
    assert ticks(1.3, 1.9)[-1] >= 1.9


def test_numbers_for_people():
    assert [clock(s) for s in (75, 3675, 90000)] == ["1:15", "1:01:15", "1d 1:00:00"]
    assert [thousands(x) for x in (950, 12345, 1.2e6, 3e9)] == ["950", "12.3k", "1.2M", "3G"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_live_line():
    progress = Progress(step=5, seconds=2.0, bits_per_byte=2.5)
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        with Live(Budget(10, None, progress), 1e6, 2e9, stream) as live:
            live.update(progress, 3.0, 100, 0.5)
            live.update(progress, 3.0, 100, 0.5)
            live.note("evaluated")
    line = "step 5/10  loss 3.000  2.500 bits/byte  200 tok/s  MFU 10.0%  ETA 0:02"
    assert plain.getvalue() == f"{line}\nevaluated\n"  # the second update comes too soon
    assert terminal.getvalue().startswith(f"\r\x1b[K{line}")
    assert terminal.getvalue().endswith("\n")
    with Live(Budget(10, None, progress), 1e6, None, plain) as live:
        live.update(progress, 3.0, 100, 0.5)
    assert "0.2 GFLOP/s" in plain.getvalue()
