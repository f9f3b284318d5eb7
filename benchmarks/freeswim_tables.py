"""Tables of benchmarks/freeswim.py and benchmarks/freeswim_gpu.py, for tables.py."""

from method_tables import Table, _mean

Row = dict
_PARTS = {"1.3b": "1.3B, 1088 x 1920", "24gb": "1.3B, 1088 x 1920, in 24 GB",
          "14b": "14B, 2160 x 3840"}


def quality(result: Row) -> Table:
    rows = []
    for row in result["rows"]:
        seconds = row.get("seconds_a_clip")
        rows.append([
            str(row["side"]), row["variant"],
            *(_mean(row.get(k), form) for k, form in (
                ("repetition_half", ".2f"), ("repetition_far", ".2f"), ("object", ".2f"),
                ("object_every_frame", ".2f"), ("colour", ".2f"), ("pattern", ".2f"),
                ("direction", ".2f"), ("sharpness", ".3f"), ("psnr_to_first_clip", ".1f"))),
            "" if seconds is None else f"{seconds['seconds']:.2f}",
        ])
    return ["side", "run", "repetition, half frame", "any far shift", "object", "in every frame",
            "colour", "pattern", "direction", "sharpness", "PSNR to first clip, dB",
            "s a clip"], rows


def quality_note(result: Row) -> str:
    made = result["settings"]
    return (f"{made['model']}, {made['samples']} clips of {made['frames']} frames, "
            f"{made['steps']} steps, mean ± 95 % confidence; s a clip without decoding the first")


def passes(result: Row) -> Table:
    rows = []
    for row in result["rows"]:
        if row["what"] != "pass":
            continue
        peak = row["peak_memory_gib"]
        rows.append([
            _PARTS[row["part"]], row["run"], str(row["layers"]), f"{row['seconds']:.2f}",
            "" if peak is None else f"{peak:.1f}", row.get("guide_kept", "")])
    return ["model and size", "pass of one branch", "layers", "s", "peak GiB", "guide kept"], rows


def steps(result: Row) -> Table:
    rows = [[_PARTS[row["part"]], row["run"], f"{row['seconds']:.2f}", f"{row['of_dense']:.2f}",
             row["note"]] for row in result["rows"] if row["what"] == "step"]
    return ["model and size", "run", "s a step", "of dense", "note"], rows


def gpu_note(result: Row) -> str:
    made = result["settings"]
    rounds = made["rounds"]
    times = "once" if rounds == 1 else f"{rounds} times"
    return (f"random weights, 81 frames, each pass timed {times}; a step has two branches, the "
            f"mean over {made['kept_steps']} steps")
