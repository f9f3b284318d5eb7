"""Tables of benchmarks/tokens_gpu.py and benchmarks/tokens.py, for tables.py."""

Row = dict
Table = tuple[list[str], list[list[str]]]


def times(result: Row) -> Table:
    """One row a model, size and variant: one forward, its spread, and what it gains."""
    rows = []
    for row in result["rows"]:
        where = (f"{row['model']}, {row['edge']} px, {row['dtype'].removeprefix('torch.')}"
                 if "edge" in row else
                 f"{row['model']} ({row['layers']} of {row['of_layers']} layers)")
        rows.append([where, row["variant"], f"{row['seconds'] * 1e3:.0f}",
                     f"{row['p20'] * 1e3:.0f} to {row['p80'] * 1e3:.0f}",
                     f"{row['speedup']:.2f}x", row["against"]])
    return ["what", "variant", "ms a forward", "p20 to p80", "gain", "over"], rows


def overhead(result: Row) -> Table:
    """What ranking, gathering and recovering cost, a block, in half precision.

    The share is that of all blocks in one stock forward of the same size and dtype.
    """
    stock = {(row["edge"], row["dtype"]): row["seconds"] for row in result["rows"]
             if row["variant"] == "stock" and "edge" in row}
    rows = []
    for row in result["settings"]["overhead"]:
        if row["dtype"] != "torch.float16":
            continue
        share = row["seconds"] * row["blocks"] / stock[row["edge"], row["dtype"]]
        rows.append([f"{row['edge']} px", row["layout"], f"{row['tokens']:,}",
                     f"{row['kept']:,}", str(row["blocks"]), row["part"],
                     str(row.get("launches") or ""),
                     f"{row['seconds'] * 1e6:.0f}",
                     f"{row['p20'] * 1e6:.0f} to {row['p80'] * 1e6:.0f}", f"{share:.1%}"])
    return ["picture", "layout", "tokens", "kept", "blocks", "part", "launches",
            "us a block", "p20 to p80", "share of a step"], rows


def graph_note(result: Row) -> str:
    """How the graphs were timed, and who has none."""
    note = (f"every forward captured into a CUDA graph, stock too, and replayed: the GPU without "
            f"the host; median of {result['rows'][0]['repeats']}, in turn")
    reasons = {name: reason for found in result["settings"]["not_captured"].values()
               for name, reason in found.items()}
    return note + "".join(f"; {name} cannot be captured: {reason}"
                          for name, reason in reasons.items())


def quality(result: Row) -> Table:
    """Likeness to stock and prompt control, one row a variant."""
    rows = [[row["variant"], f"{row['seconds']:.2f}",
             f"{row['psnr']['mean']:.1f} ± {row['psnr']['ci95']:.1f}",
             f"{row['ssim']['mean']:.3f}",
             *(f"{row['control'][k]:.2f}" for k in ("object", "colour", "pattern"))]
            for row in result["rows"]]
    return ["variant", "s a picture", "PSNR to stock, dB", "SSIM", "object", "colour",
            "pattern"], rows
