"""Tables of benchmarks/staged.py and benchmarks/staged_gpu.py, for tables.py."""

from method_tables import Table, _mean

Row = dict
_SEEN = ("object", "colour", "pattern", "place", "direction")


def quality(result: Row) -> Table:
    """One row a run; a figure that no row has gets no column."""
    found = result["rows"]
    seen = [name for name in _SEEN if any(name in row for row in found)]
    judged = any("likelihood" in row for row in found)
    rows = []
    for row in found:
        distance, gain = row["kernel_distance"], row.get("likelihood_over")
        rows.append([
            row["variant"], "" if row["work"] is None else f"{row['work']:.2f}",
            "" if distance is None else f"{distance:.3f}",
            *(_mean(row.get(name), ".2f") for name in seen),
            f"{1e3 * row['sharpness']['mean']:.1f}"])
        if judged:
            rows[-1] += [f"{row['likelihood']['mean']:.3f}", "" if gain is None else
                         f"{gain['mean']:+.3f} ± {gain['ci95'] or 0:.3f} ({gain['run']})"]
    more = ["log probability of what was asked", "over fewer steps"] if judged else []
    return ["run", "work", "kernel distance", *seen, "sharpness", *more], rows


def quality_note(result: Row) -> str:
    made = result["settings"]
    return (f"{made['model']}, {made['samples']} {made['kind']}s of pairs never seen in training, "
            f"stock has {made['steps']} steps; work is the denoiser's operations over stock's")


def loops(*results: Row) -> Table:
    """Every model of all files in one table."""
    rows = [[row["case"], row["run"], f"{row['seconds']:.2f}", f"{row['speedup']:.2f}x",
             " + ".join(map(str, row["steps"])), " + ".join(map(str, row["steps_run"])),
             ", ".join(f"{s:.3f}" for s in row["seconds_a_step"])]
            for result in results for row in result["rows"]]
    return ["model", "run", "s a loop", "speed-up", "steps", "of them run", "s a step"], rows


def loops_note(result: Row) -> str:
    cases = " and ".join(dict.fromkeys(row["case"] for row in result["rows"]))
    return f"{cases}: random weights, one prompt; {result['settings'].get('how', 'whole loops')}"
