"""How the page looks: theme, style, and the script that plays clips together. No network."""

from typing import Any

from gradio import themes

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans",
         "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> Any:
    """Fonts of the system only: a font of the web would be asked for over the network."""
    return themes.Base(
        primary_hue="blue", neutral_hue="slate", radius_size="md", text_size="md",
        font=list(_SANS), font_mono=list(_MONO),
    ).set(
        body_background_fill="#f6f8fb", body_background_fill_dark="#0d1420",
        block_background_fill="white", block_background_fill_dark="#141d2b",
        block_border_width="1px", block_shadow="none", block_label_text_weight="500",
        button_primary_background_fill="#1d5fd1", button_primary_background_fill_hover="#1850b3",
        button_primary_background_fill_dark="#3b82f6",
        button_primary_text_color="white", button_large_text_weight="600",
    )


CSS = """
.fd-head { display: flex; align-items: baseline; gap: 14px; flex-wrap: wrap; padding: 4px 2px 0 }
.fd-head h1 { font-size: 26px; font-weight: 700; letter-spacing: -.02em; margin: 0 }
.fd-head h1 em { font-style: normal; color: #1d5fd1 }
.dark .fd-head h1 em { color: #6ea8ff }
.fd-head p { margin: 0; color: var(--body-text-color-subdued) }
.fd-chip { font-size: 12px; padding: 2px 9px; border-radius: 99px;
  border: 1px solid var(--border-color-primary); color: var(--body-text-color-subdued) }
.fd-live { padding: 12px 14px; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--block-background-fill) }
.fd-line { font-variant-numeric: tabular-nums; font-weight: 500 }
.fd-problem { border-color: #d9534f; background: #fdf1f0; color: #8a1f1b; font-weight: 500 }
.dark .fd-problem { background: #3a1716; color: #ffc9c5 }
.fd-bar { height: 6px; border-radius: 99px; margin-top: 9px; overflow: hidden;
  background: var(--border-color-primary) }
.fd-bar > div { height: 100%; border-radius: 99px; background: #1d5fd1; transition: width .2s }
.fd-busy { opacity: .35; animation: fd-pulse 1.2s ease-in-out infinite alternate }
@keyframes fd-pulse { from { opacity: .15 } to { opacity: .5 } }
.fd-preview { display: block; margin: 12px auto 0; width: 256px; border-radius: 6px }
.fd-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 8px }
.fd-card { padding: 10px 12px; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--block-background-fill); display: flex; flex-direction: column }
.fd-card span { font-size: 12px; color: var(--body-text-color-subdued) }
.fd-card b { font-size: 20px; font-variant-numeric: tabular-nums; line-height: 1.35 }
.fd-card i { font-style: normal; font-size: 11px; line-height: 1.3;
  color: var(--body-text-color-subdued) }
.fd-note { margin: 6px 2px 0; font-size: 13px; color: var(--body-text-color-subdued) }
.fd-chart { width: 100%; height: auto; font: 11px ui-sans-serif, system-ui, sans-serif }
.fd-chart text { fill: var(--body-text-color) }
.fd-chart text.fd-value { font-size: 9.5px; fill: currentColor }
.fd-chart text.fd-value[fill="#ffffff"] { fill: #fff }
.fd-chart text.fd-value[fill="#0b2545"] { fill: #0b2545 }
.fd-about, .fd-about p, .fd-about li { font-size: 13px !important; line-height: 1.45;
  color: var(--body-text-color-subdued) }
.html-container { padding: 0 !important }
.fd-play { display: flex; align-items: center; gap: 10px; padding: 6px 2px }
.fd-play button { padding: 5px 14px; border-radius: 6px; font-weight: 600; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill) }
.fd-play input { flex: 1; accent-color: #1d5fd1 }
.fd-play span { font-variant-numeric: tabular-nums; min-width: 92px; text-align: right }
.fd-legend { display: flex; gap: 18px; flex-wrap: wrap; font-size: 13px; align-items: center }
.fd-legend i { display: inline-block; width: 13px; height: 13px; border-radius: 3px;
  margin-right: 6px; vertical-align: -2px }
#history-gallery .grid-container { grid-template-columns: repeat(auto-fill, 168px) !important }
#history-gallery .thumbnail-item { aspect-ratio: 1 !important }
footer { display: none !important }
"""

# every clip of a group follows the first one; the bar drives the group
HEAD = """
<script>
(() => {
  // on a phone the panel of methods lies over the whole page, so it begins closed there
  const watch = new MutationObserver(() => {
    const button = document.querySelector('.sidebar.open .toggle-button');
    if (!button) return;
    watch.disconnect();
    // until it stays closed: it opens itself once more while the page is built
    const close = left => {
      const open = document.querySelector('.sidebar.open');
      if (open) button.click();
      if (left) setTimeout(close, 150, open ? left - 1 : 0);
    };
    if (innerWidth < 768) setTimeout(close, 150, 20);
  });
  watch.observe(document, {childList: true, subtree: true, attributes: true});
  const clips = bar => {
    const all = bar.closest('.fd-clips').querySelectorAll('video');
    return [...all].filter(v => v.src && v.offsetParent !== null);
  };
  const show = bar => {
    const [first] = clips(bar), box = bar.querySelector('span');
    if (!first || !first.duration) return;
    const range = bar.querySelector('input');
    if (document.activeElement !== range || !first.paused) {
      range.value = 1000 * first.currentTime / first.duration;
    }
    box.textContent = first.currentTime.toFixed(2) + ' / ' + first.duration.toFixed(2) + ' s';
    bar.querySelector('button').textContent = first.paused ? '▶ Play both' : '❚❚ Pause';
  };
  const align = bar => {
    const [first, ...rest] = clips(bar);
    for (const v of rest) if (Math.abs(v.currentTime - first.currentTime) > 0.04) {
      v.currentTime = first.currentTime;
    }
  };
  document.addEventListener('click', e => {
    const bar = e.target.closest && e.target.closest('.fd-play');
    if (!bar || e.target.tagName !== 'BUTTON') return;
    const all = clips(bar);
    if (!all.length) return;
    const go = all[0].paused;
    if (go) {
      const from = all[0].ended ? 0 : all[0].currentTime;
      for (const v of all) { v.loop = true; v.muted = true; v.currentTime = from; v.play(); }
    } else {
      for (const v of all) v.pause();
      align(bar);
    }
    show(bar);
  });
  document.addEventListener('input', e => {
    const bar = e.target.closest && e.target.closest('.fd-play');
    if (!bar) return;
    for (const v of clips(bar)) {
      v.pause();
      v.currentTime = v.duration * e.target.value / 1000;
    }
    show(bar);
  });
  setInterval(() => {
    for (const bar of document.querySelectorAll('.fd-play')) {
      if (!bar.offsetParent) continue;
      const [first] = clips(bar);
      if (first && !first.paused) align(bar);
      show(bar);
    }
  }, 200);
})();
</script>
"""

PLAY = ("<div class='fd-play'><button type='button'>▶ Play both</button>"
        "<input type='range' min='0' max='1000' value='0' aria-label='Place in the clips'>"
        "<span></span></div>")
