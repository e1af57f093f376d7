"""Pages as Markdown and HTML."""

from foedus.report.pages import Heading, Picture, Rows, Text, as_html, as_markdown

BLOCKS = [Heading(1, "A & B"), Text("see `x < y`"), Rows([{"a|b": "c|d", "n": 2}]), Picture("one two.png", "a picture")]


def test_markdown_keeps_pipes_and_blanks_apart():
    text = as_markdown(BLOCKS)
    assert "| a\\|b | n |" in text
    assert "| c\\|d | 2 |" in text
    assert "![a picture](one%20two.png)" in text


def test_html_is_escaped_and_holds_its_pictures(tmp_path):
    (tmp_path / "one two.png").write_bytes(b"\x89PNG")
    text = as_html(BLOCKS, "<title>", tmp_path)
    assert "<h1>A &amp; B</h1>" in text
    assert "<code>x &lt; y</code>" in text
    assert "data:image/png;base64,iVBORw==" in text
    assert "&lt;title&gt;" in text
