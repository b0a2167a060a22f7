"""What the page draws itself: the panel of the shared batch, and a leaflet with the sentence that was quoted."""

from __future__ import annotations

import base64
import re
from html import escape

from material import Passage

from pagedllm_core import EngineStats

STYLE = """<style>
[data-testid="stMainBlockContainer"] { padding: 2.5rem 3rem 7rem; max-width: 1500px; }
[data-testid="stBottomBlockContainer"] { padding: 1rem 3rem 1.6rem; max-width: 1500px; }
.clinic h1 { font-size: 1.9rem; font-weight: 650; letter-spacing: -0.01em; padding: 0; margin: 0; color: #0f4f49; }
.clinic p { margin: 0.35rem 0 0.4rem; color: #5b6b68; max-width: 40rem; }
.heading { font-size: 0.8rem; font-weight: 600; letter-spacing: 0.06em; text-transform: uppercase; color: #0f766e;
  margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.6rem; margin-bottom: 1rem; }
.tile { background: #f2f6f5; border-radius: 0.6rem; padding: 0.55rem 0.8rem 0.6rem; color: #5b6b68;
  font-size: 0.8rem; white-space: nowrap; }
.tile b { display: block; font-size: 1.6rem; font-weight: 600; line-height: 1.3; color: #1f2d2b;
  font-variant-numeric: tabular-nums; }
.tile.busy { background: #0f766e; color: #d5efec; }
.tile.busy b { color: #ffffff; }
.leaflet { line-height: 1.6; margin: 0; }
.leaflet .rest { color: #93a19f; }
.leaflet mark { background: #c9ece7; color: inherit; padding: 0.1rem 0; }
.history { list-style: none; margin: 0 !important; padding: 0 !important; }
.history li { display: flex; gap: 1rem; justify-content: space-between; padding: 0.5rem 0; margin: 0 !important;
  border-bottom: 1px solid #e7eeec; font-size: 0.9rem; }
.history li:last-child { border: none; }
.history a { color: #1f2d2b; text-decoration: none; }
.history a:hover { color: #0f766e; text-decoration: underline; }
.history span { color: #5b6b68; text-align: right; flex: none; max-width: 45%; }
.turn { scroll-margin-top: 4rem; }
@media (min-width: 641px) {
  [data-testid="stColumn"]:nth-child(2) { position: sticky; top: 2.5rem; align-self: flex-start; }
}
@media (max-width: 640px) {
  [data-testid="stMainBlockContainer"] { padding: 1.5rem 1rem 7rem; }
  [data-testid="stBottomBlockContainer"] { padding: 1rem 1rem 1.2rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
}
</style>"""

HEADER = """<div class="clinic"><h1>Brackwater Clinic</h1>
<p>Ask what you would look up in our forty leaflets. The answer names its leaflet. The clinic was made up, and nothing
here is medical advice.</p></div>"""


def heading(text: str) -> str:
    """The name of a part of the page."""
    return f'<p class="heading">{escape(text)}</p>'


def panel(stats: EngineStats) -> str:
    """The shared batch: four numbers, and the picture of its KV blocks that a notebook shows of `stats()`."""
    hits = stats.prefix_cache_hits / max(1, stats.prefix_cache_queries)
    tiles = [
        _tile("running", f"{stats.running:,}", "running", busy=stats.running > 0),
        _tile("waiting", f"{stats.waiting:,}", "waiting"),
        _tile("largest", f"{stats.max_batch_size:,}", "largest batch"),
        _tile("hits", f"{hits:.0%}", "prefix-cache hits"),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>{_picture(stats)}'


def _picture(stats: EngineStats) -> str:
    """The SVG of `stats()` as an image: Streamlit takes SVG out of HTML."""
    found = re.search(r"<svg.*</svg>", stats._repr_html_(), re.DOTALL)
    if found is None:
        return ""
    data = base64.b64encode(found[0].encode()).decode()
    blocks = f"{stats.kv_blocks_used} used, {stats.kv_blocks_cached} cached, {stats.kv_blocks_free} free"
    return f'<img alt="KV blocks: {blocks}" src="data:image/svg+xml;base64,{data}" width="100%">'


def leaflet(passage: Passage, sentence: str | None = None) -> str:
    """A whole leaflet: its other passages in grey, and the sentence marked."""
    before, found, after = passage.leaflet.text.partition(passage.text)
    if not found:  # a splitter that changed the text
        before, found, after = "", passage.text, ""
    shown = escape(found)
    if sentence is not None:
        shown = shown.replace(escape(sentence), f"<mark>{escape(sentence)}</mark>", 1)
    return f'<p class="leaflet">{_grey(before)}{shown}{_grey(after)}</p>'


def history(entries: list[tuple[str, str]]) -> str:
    """The questions of a visitor, each a link to its answer, and where that came from."""
    items = [
        f'<li><a href="#question-{number}">{escape(question)}</a><span>{escape(source)}</span></li>'
        for number, (question, source) in enumerate(entries, 1)
    ]
    return f'<ol class="history">{"".join(items)}</ol>'


def anchor(number: int) -> str:
    """Where a link of the history leads to."""
    return f'<div class="turn" id="question-{number}"></div>'


def _tile(name: str, value: str, label: str, busy: bool = False) -> str:
    return f'<div class="tile{" busy" if busy else ""}" data-name="{name}"><b>{value}</b>{label}</div>'


def _grey(text: str) -> str:
    return f'<span class="rest">{escape(text)}</span>' if text else ""
