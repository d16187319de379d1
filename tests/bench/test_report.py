import io
from html.parser import HTMLParser

from rich.console import Console

from bitwright.bench.html import to_html
from bitwright.bench.measure import Ratio
from bitwright.bench.report import LayerBits, Report, Row, to_markdown, to_table, write_text
from bitwright.flow.evaluate import Drop

REPORT = Report(
    "a <title>",
    ["one note"],
    [
        Row("float", 0.95, bytes=1000),
        Row("w4a4", 0.94, Drop(0.01, -0.005, 0.025, 600), 250, Ratio(2.0, 1.8, 2.2), "bit for bit", "100.0 % same"),
    ],
    {"w4a4": [LayerBits("conv1", 8, 8, 144), LayerBits("add_0", 0, 8, 0), LayerBits("fc", 32, 32, 640)]},
    percent=True,
)


class _Checker(HTMLParser):
    VOID = frozenset({"meta", "line", "circle", "rect"})

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_well_formed_self_contained_and_escaped():
    page, checker = to_html(REPORT), _Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.links == []
    assert "<script" not in page
    assert "a &lt;title&gt;" in page
    assert "conv1: weight 8, input 8 bits" in page


def test_markdown_shows_scores_in_percent_with_the_interval():
    text = to_markdown(REPORT)
    assert "| w4a4 | 94.00 % | +1.00 [-0.50, +2.50] | 250 | 2.00x (1.80-2.20) | bit for bit | 100.0 % same |" in text
    assert "| conv1 | 8 / 8 |" in text


def test_plain_scores_are_not_shown_as_percent():
    assert "| m | -12.5 |" in to_markdown(Report("r", rows=[Row("m", -12.5)]))


def test_terminal_table_leaves_out_empty_columns():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(to_table(Report("r", rows=[Row("m", 0.5)])))
    text = console.export_text()
    assert "score" in text
    assert "speed" not in text


def test_text_files_are_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "report.md"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [entry.name for entry in path.parent.iterdir()] == ["report.md"]
