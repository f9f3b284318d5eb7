"""Tables of benchmarks/tokens_gpu.py and benchmarks/tokens.py, for tables.py."""

from method_tables import Table, _mean

Row = dict


def times(*results: Row) -> Table:
    """One row a model, size and variant: one forward, its spread, and what it gains.

    Results are given newest first: what one has of a model, size and dtype stands for the others'.
    """
    seen, groups = set(), {}
    for result in results:
        here = {_what(row) for row in result["rows"]}
        for row in result["rows"]:
            if _what(row) not in seen:
                groups.setdefault(_what(row), []).append(row)
        seen |= here
    # in the order of the oldest, which has them all
    order = dict.fromkeys(_what(row) for result in reversed(results) for row in result["rows"])
    rows = [[what, row["variant"], f"{row['seconds'] * 1e3:.0f}",
             f"{row['p20'] * 1e3:.0f} to {row['p80'] * 1e3:.0f}", f"{row['speedup']:.2f}x",
             row["against"]] for what in order for row in groups[what]]
    return ["what", "variant", "ms a forward", "p20 to p80", "gain", "over"], rows


def times_note(result: Row) -> str:
    """Which rows this result stands for: of two, the later run lacks the last model."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    return f"{models[-1]}: median of {result['rows'][-1]['repeats']}, interleaved"


def overhead(result: Row) -> Table:
    """What ranking, gathering and recovering cost, a block, in half precision.

    The share is that of all blocks in one stock forward of the same size and dtype.
    """
    rows = _overhead(result)
    return ["picture", "layout", "tokens", "kept", "blocks", "part", "launches", "us a block",
            "p20 to p80", "share of a step"], [row for edge in sorted(rows) for row in rows[edge]]


def _overhead(result: Row) -> dict[int, list[list[str]]]:
    """Rows by the picture's edge."""
    stock = {(row["edge"], row["dtype"]): row["seconds"] for row in result["rows"]
             if row["variant"] == "stock" and "edge" in row}
    rows: dict[int, list[list[str]]] = {}
    for row in result["settings"]["overhead"]:
        if row["dtype"] != "torch.float16":
            continue
        share = row["seconds"] * row["blocks"] / stock[row["edge"], row["dtype"]]
        rows.setdefault(row["edge"], []).append([
            f"{row['edge']} px", row["layout"], f"{row['tokens']:,}", f"{row['kept']:,}",
            str(row["blocks"]), row["part"], str(row.get("launches") or ""),
            f"{row['seconds'] * 1e6:.0f}",
            f"{row['p20'] * 1e6:.0f} to {row['p80'] * 1e6:.0f}", f"{share:.1%}"])
    return rows


def overhead_note(result: Row) -> str:
    repeats = result["settings"]["overhead"][0]["repeats"]
    return f"median of {repeats}, one block at a time, float16"


def _what(row: Row) -> str:
    if "edge" not in row:
        return f"{row['model']} ({row['layers']} of {row['of_layers']} layers)"
    return f"{row['model']}, {row['edge']} px, {row['dtype'].removeprefix('torch.')}"


def graph_note(result: Row) -> str:
    """How the graphs were timed, and who has none."""
    note = (f"every forward captured into a CUDA graph, stock too, and replayed: the GPU without "
            f"the host; median of {result['rows'][0]['repeats']}, in turn")
    reasons = {name: reason for found in result["settings"]["not_captured"].values()
               for name, reason in found.items()}
    return note + "".join(f"; {name} cannot be captured: {reason}"
                          for name, reason in reasons.items())


def operations(result: Row) -> Table:
    """What counting operations allows at most."""
    rows = [[f"{row['edge']} px", f"{row['tera']:.1f}", f"{row['deep_layers']:.0%}",
             f"{row['self_attention']:.0%}",
             *(f"{row[name]:.2f}x" for name in ("at_edm", "kv_downsample", "both"))]
            for row in result["rows"]]
    return ["picture", "10^12 operations a forward", "in the layers at a quarter of the side",
            "in all self-attention", "at-edm at most", "kv-downsample at most", "both"], rows


def quality(result: Row) -> Table:
    """Likeness to stock and prompt control, one row a variant.

    Time only of a GPU: on a CPU other jobs ran beside it.
    """
    timed = result["device"]["type"] == "cuda"
    rows = [[row["variant"], *([f"{row['seconds'] * 1e3:.0f}"] if timed else []),
             _mean(row["psnr"], ".1f"), _mean(row["ssim"], ".3f"),
             *(f"{row['control'][k]:.2f}" for k in ("object", "colour", "pattern"))]
            for row in result["rows"]]
    return ["variant", *(["ms a picture"] if timed else []), "PSNR to stock, dB", "SSIM",
            "object", "colour", "pattern"], rows


def quality_note(result: Row) -> str:
    made = result["settings"]
    return (f"{made['model']}, {made['prompts']} pictures of {made['call']['height']} px, "
            f"{made['call']['num_inference_steps']} steps, {made['dtype']}")
