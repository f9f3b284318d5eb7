"""The contact sheet: one page with every picture and clip, that sorts and filters, offline."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any
from urllib.parse import quote

# what a reader may sort by: field, and how it is called
_KEYS = (("when", "time made"), ("prompt", "prompt"), ("seed", "seed"), ("methods", "method"),
         ("density", "density"), ("seconds", "seconds"), ("steps", "steps"), ("status", "status"))


def page(entries: Sequence[dict[str, Any]], title: str) -> str:
    """HTML of the whole sheet. It loads nothing but the results beside it."""
    done = sum(entry["status"] == "done" for entry in entries)
    told = f"{done} done" + (f", {len(entries) - done} failed" if done < len(entries) else "")
    options = "".join(f'<option value="{key}">{name}</option>' for key, name in _KEYS)
    cards = "\n".join(_card(entry) for entry in entries)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
            f"<header><h1>{escape(title)}</h1><p>{told}</p>"
            f'<label>Sort by <select id="key">{options}</select></label>'
            f'<label><input type="checkbox" id="down"> descending</label>'
            f'<label>Show <input type="search" id="words" placeholder="words to match"></label>'
            f'<label>Size <input type="range" id="size" min="120" max="640" value="240"></label>'
            f'<span id="count" role="status"></span></header>\n'
            f'<main id="cards">\n{cards}\n</main>\n<script>{_SCRIPT}</script></body></html>\n')


def _card(entry: dict[str, Any]) -> str:
    sortable = {key: entry[key] for key, _ in _KEYS}
    data = escape(json.dumps(sortable, ensure_ascii=False), quote=True)
    prompt = escape(entry["prompt"])
    return (f'<article data-entry="{data}" class="{entry["status"]}">{_media(entry)}'
            f"<p>{prompt}</p><dl>{_facts(entry)}</dl></article>")


def _media(entry: dict[str, Any]) -> str:
    if entry["status"] == "failed":
        return f'<pre role="alert">{escape(entry["error"])}</pre>'
    source, about = quote(entry["file"]), escape(entry["prompt"], quote=True)
    if entry["kind"] == "video":
        return (f'<video src="{source}" title="{about}" controls muted loop playsinline '
                f'preload="metadata"></video>')
    return f'<a href="{source}"><img src="{source}" alt="{about}" loading="lazy"></a>'


def _facts(entry: dict[str, Any]) -> str:
    size = f"{entry['height']} x {entry['width']}" if entry["height"] else ""
    if entry["kind"] == "video" and entry["frames"]:
        size += f", {entry['frames']} frames"
    asked = "" if entry["density_asked"] is None else f" {entry['density_asked']:g}"
    density = "" if entry["density"] is None else f"{entry['density']:.0%} of attention"
    seconds = "" if entry["seconds"] is None else f"{entry['seconds']:.1f} s"
    shared = f", {entry['together']} at a time" if (entry["together"] or 1) > 1 else ""
    sidecar = (f'<a href="{quote(entry["file"])}.json">settings</a>' if entry["file"] else
               escape(entry["where"]))
    rows = (("seed", str(entry["seed"])), ("steps", str(entry["steps"] or "")),
            ("size", size), ("method", escape(entry["methods"] + asked)), ("computed", density),
            ("time", seconds + shared), ("model", escape(entry["model"])))
    shown = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows if value)
    return f"{shown}<dt></dt><dd>{sidecar}</dd>"


_STYLE = """
:root { color-scheme: light dark; --size: 240px; font: 14px/1.4 system-ui, sans-serif; }
body { margin: 0 1rem 2rem; }
header { position: sticky; top: 0; background: Canvas; padding: .5rem 0; display: flex;
  flex-wrap: wrap; gap: .3rem 1.2rem; align-items: center; z-index: 1;
  border-bottom: 1px solid color-mix(in srgb, CanvasText 20%, Canvas); }
h1 { font-size: 1.1rem; margin: 0; } header p { margin: 0; }
main { display: grid; gap: 1rem; padding-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(var(--size), 1fr)); }
article { border: 1px solid color-mix(in srgb, CanvasText 20%, Canvas); border-radius: 6px;
  overflow: hidden; display: flex; flex-direction: column; }
article[hidden] { display: none; }
img, video { display: block; width: 100%; height: auto; background: #8883; }
pre { margin: 0; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; color: #c0392b; }
article p { margin: .5rem .6rem .2rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .6rem; margin: 0 .6rem .6rem;
  font-size: 12px; opacity: .85; } dd { margin: 0; overflow-wrap: anywhere; }
"""

_SCRIPT = """
const main = document.getElementById('cards');
const cards = [...main.children].map((node, place) => (
  {node, place, entry: JSON.parse(node.dataset.entry), words: node.textContent.toLowerCase()}));
const key = document.getElementById('key'), down = document.getElementById('down');
const words = document.getElementById('words'), size = document.getElementById('size');
const count = document.getElementById('count');
function compare(a, b) {
  const x = a.entry[key.value], y = b.entry[key.value];
  if (x === null || y === null) return (x === null) - (y === null) || a.place - b.place;
  const order = typeof x === 'number' ? x - y : String(x).localeCompare(String(y));
  return (down.checked ? -order : order) || a.place - b.place;
}
function show() {
  const wanted = words.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const card of [...cards].sort(compare)) {
    card.node.hidden = !wanted.every(word => card.words.includes(word));
    shown += !card.node.hidden;
    main.append(card.node);
  }
  count.textContent = shown === cards.length ? '' : shown + ' shown';
}
for (const control of [key, down]) control.addEventListener('change', show);
words.addEventListener('input', show);
size.addEventListener('input', () => (
  document.documentElement.style.setProperty('--size', size.value + 'px')));
// a clip plays while it is looked at
const watcher = new IntersectionObserver(seen => seen.forEach(({target, isIntersecting}) => (
  isIntersecting ? target.play().catch(() => {}) : target.pause())), {threshold: .6});
for (const clip of document.querySelectorAll('video')) watcher.observe(clip);
"""
