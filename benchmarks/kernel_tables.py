"""Tables of the kernels and of whole denoisers, for tables.py.

Each takes a result and returns the heads and the rows of one table.
"""

Row = dict
Table = tuple[list[str], list[list[str]]]


def denoiser(result: Row) -> Table:
    rows = []
    for row in result["rows"]:
        part = f" ({row['layers']} of {row['of_layers']} layers)"
        rows.append([
            row["model"] + ("" if row["layers"] == row["of_layers"] else part), row["variant"],
            f"{row['density']:.3f}", f"{row['seconds']:.3f}", f"{row['speedup']:.2f}x",
            f"{row['peak_memory_gib']:.1f}"])
    heads = ["model", "variant", "density", "s a forward", "speed-up", "peak GiB"]
    return heads, rows


# the file of a run with nothing else on the machine
HOST = "kernels_host_cuda.json"


def kernels(result: Row) -> Table:
    """One line a shape: the best dense kernel, then each implementation's time and E."""
    rows = []
    for (name, heads, tokens, dim, _), found in _shapes(result["rows"]).items():
        dense = min((r for r in found if r["what"].startswith("dense") and "seconds" in r),
                    key=lambda r: r["seconds"])
        cells = [name, f"{heads} x {tokens:,} x {dim}", f"{dense['density']:.3f}",
                 f"{dense['seconds'] * 1e3:.2f} ({dense['what'].removeprefix('dense ')})"]
        memory = ""
        for impl in ("gluon", "triton", "FlexAttention"):
            row = next((r for r in found if r["what"] in (impl, f"tile-sparse, {impl}")), None)
            timed = row is not None and "seconds" in row
            cells.append(f"{row['seconds'] * 1e3:.2f}, {row['speedup']:.2f}x, "
                         f"{row['efficiency']:.2f}" if timed else "")
            if timed and impl == "gluon":
                ours, theirs = (r["given_bytes"] + r["bytes"] for r in (row, dense))
                memory = f"{ours / theirs - 1:+.1%}"
        rows.append([*cells, memory])
    heads = ["shape", "heads x tokens x D", "density", "best dense, ms",
             "gluon: ms, speed-up, E", "triton: ms, speed-up, E", "FlexAttention: ms, speed-up, E",
             "gluon's memory over dense"]
    return heads, rows


def _shapes(rows: list[Row]) -> dict[tuple, list[Row]]:
    """By shape; drawn lists differ from run to run in the third digit of their density."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((row["name"], row["heads"], row["tokens"], row["dim"],
                          round(row["density"], 2)), []).append(row)
    return found


def kernels_note(result: Row) -> str:
    return f"median of {result['settings']['rounds']}, interleaved"


def host(*results: Row) -> Table:
    """What the host takes for one call, in the first result and once more in the second."""
    first, second = (r["rows"] for r in results)
    again = {(row["name"], row["what"]): row for row in second}
    rows = []
    for row in first:
        if row["what"] != "dense flash":
            both = (row, again.get((row["name"], row["what"])))
            rows.append([row["name"], row["what"], *(
                cell for one in both for cell in (("", "") if one is None else (
                    f"{one['seconds'] * 1e3:.2f}", f"{one['host_microseconds']:.0f}")))])
    return ["what", "implementation", "ms", "host us a call", "again: ms", "host us a call"], rows


def host_note(result: Row) -> str:
    alone = "other GPUs idle" if result["file"] == HOST else "again, in a run of the first table"
    return f"{alone}: median of {result['settings']['rounds']}, interleaved"


def kernel_cases(*results: Row) -> Table:
    rows = [[row["impl"], f"{row['cases']:,}", str(row["failed"]),
             f"{row['worst_error_over_allowed']:.2f}"] for r in results for row in r["rows"]]
    return ["implementation", "cases", "failed", "largest error over its bound"], rows


def windows(result: Row) -> Table:
    """One line a shape: dense, then each implementation's time, speed-up and E."""
    shapes: dict[tuple, list[Row]] = {}
    for row in result["rows"]:
        if "seconds" in row:
            shapes.setdefault((row["name"], row["density"]), []).append(row)
    rows = []
    for (name, density), found in shapes.items():
        first, cells = found[0], []
        grid, window, stride = (
            " x ".join(map(str, first[key])) for key in ("grid", "window", "stride"))
        dense = min((r for r in found if r["what"].startswith("dense")), key=lambda r: r["seconds"])
        for impl in ("gluon", "triton", "FlexAttention"):
            row = next((r for r in found if r["what"] == impl), None)
            cells.append("" if row is None else f"{row['seconds'] * 1e3:.2f}, "
                         f"{row['speedup']:.2f}x, {row['efficiency']:.2f}")
        covered = next((f"{r['covered']:.2f}" for r in found if "covered" in r), "")
        rows.append([
            name, f"{grid}" + (f" + {first['text']}" if first["text"] else ""), window, stride,
            f"{first['heads']} x {first['dim']}", f"{density:.3f}",
            f"{dense['seconds'] * 1e3:.2f}", *cells, covered])
    heads = ["shape", "grid + text", "window", "stride", "heads x D", "density", "dense, ms",
             "gluon: ms, speed-up, E", "triton: ms, speed-up, E", "FlexAttention: ms, speed-up, E",
             "covered"]
    return heads, rows


def windows_note(result: Row) -> str:
    right = "; ".join(f"{row['what']}: {row['cases']} cases against float64, {row['failed']} failed"
                      for row in result["rows"] if "cases" in row)
    return f"median of {result['settings']['rounds']}, interleaved; {right}"


def sanitize(result: Row) -> Table:
    rows = [[row["kernel"], row["tool"], row.get("summary", row.get("failed", ""))[:80]]
            for row in result["rows"] if row["tool"]]
    return ["kernel", "tool", "its summary"], rows


def backward(result: Row) -> Table:
    """Times of the backward alone."""
    rows = []
    for row in result["rows"]:
        if row["kind"] != "time" or "failed" in row or "config" in row:
            continue
        spent = row.get("parts", {})
        rows.append([
            f"{row['heads']} x {row['tokens']:,} x {row['head_dim']}", row["what"],
            f"{row['density']:.3f}", "on" if row["tail"] else "",
            f"{row['seconds'] * 1e3:.2f}", f"{row['tflops']:.0f}", f"{row['speedup']:.2f}x",
            f"{row['efficiency']:.2f}",
            *(f"{spent[k] * 1e3:.2f}" if k in spent else "" for k in ("dq", "dkv", "tail", "rest")),
        ])
    heads = ["heads x tokens x D", "what", "density", "tail", "ms", "TFLOP/s", "over best dense",
             "E", "dq, ms", "dk and dv, ms", "means, ms", "rest, ms"]
    return heads, rows


def backward_note(result: Row) -> str:
    """The error cases, in words."""
    cases = [row for row in result["rows"] if row["kind"] == "error"]
    worst = max((max(row["shares"].values()) for row in cases if "shares" in row), default=0.0)
    return (f"{len(cases)} random cases against float64, {sum('failed' in r for r in cases)} "
            f"failed, largest error {worst:.2f} of its bound; median of "
            f"{result['settings']['rounds']}, interleaved")


def cpu_attention(result: Row) -> Table:
    rows = [[f"{row['tokens']:,}", row["blocks"], f"{row['density']:.2f}",
             "on" if row["tail"] else "off", f"{row['dense_seconds'] * 1e3:.0f}",
             f"{row['seconds'] * 1e3:.0f}", f"{row['speedup']:.2f}x"] for row in result["rows"]]
    heads = ["tokens", "blocks", "density", "tail", "dense ms", "ms", "speed-up"]
    return heads, rows
