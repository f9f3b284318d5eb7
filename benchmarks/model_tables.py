"""Tables of the shipped models: ability, the evaluator, attention mass, the gallery; for tables.py.

Each takes a result and returns the heads and the rows of one table.
"""

from collections.abc import Callable

Row = dict
Table = tuple[list[str], list[list[str]]]


def ability(result: Row) -> Table:
    """One row a kind and size: the share of prompts that came out right."""
    found = result["rows"]
    figures = {"object": "object", "colour": "background colour", "pattern": "pattern",
               "place": "asked place", "direction": "direction"}
    shown = [k for k in figures if any(k in row for row in found)]
    sized = [] if any("size" not in row for row in found) else ["pixels"]
    rows = []
    for row in found:
        size = [f"{row['size']} x {row['size']}"] if sized else []
        cells = [f"{row[k]:.1%}" if k in row else "" for k in shown]
        if "place" in row:
            cells[shown.index("place")] += f" of {row['placed']}"
        rows.append([row["kind"], *size, str(row["samples"]), *cells])
    return ["", *sized, "samples", *(figures[k] for k in shown)], rows


def seconds(*results: Row) -> Table:
    """How long one picture or clip takes with a model's own settings."""
    rows = [[row["model"], row["kind"].removesuffix("s"), f"{row['size']} x {row['size']}",
             str(row["frames"] or 1), f"{row['seconds_a_sample']:.1f}"]
            for result in results for row in result["rows"]]
    return ["model", "of", "pixels", "frames", "seconds"], rows


def evaluator(result: Row) -> Table:
    """Renders of known content, so each verdict should be right; blur and morphs should show."""
    rows = []
    for row in result["rows"]:
        if row["what"] == "pictures":
            seen = f"pictures, {row['edge']} px"
            seen += f", blurred over {row['blur_pixels']} px" if row["blur_pixels"] > 1 else ""
            moved = ""
        else:
            seen = f"clips, {row['motion']}, {row['edge']} px"
            moved = f"{row[row['motion'].replace(' ', '_')]:.1%}"
        rows.append([
            seen, str(row["samples"]),
            *(f"{row[k]:.1%}" if k in row else "" for k in ("object", "colour", "pattern")),
            f"{row['place']:.1%} of {row['placed']}" if "place" in row else "", moved,
            f"{1e3 * row['sharpness']:.0f}",
            *(f"{row[k]:.4f}" if k in row else "" for k in
              ("distance_to_fresh_renders", "shape_stability", "shape_stability_of_morphs")),
        ])
    return ["renders", "samples", "object", "colour", "pattern", "place", "motion",
            "sharpness, 1/1000", "distance to fresh renders", "shape stability",
            "of clips that change their object"], rows


def image_training(result: Row) -> Table:
    """One row a run of tiny-image: layers, steps at its last size, and what came out."""
    rows = []
    for row in result["rows"]:
        seen = row["unseen_pairs"]
        rows.append([row["run"], row["layers"], f"{row['steps']['full']:,}",
                     f"{row['seconds']['full']:.0f}", f"{row['steps_a_second']['full']:.1f}",
                     f"{seen['object_top1']:.1%} of {seen['samples']}", f"{seen['pattern']:.1%}"])
    return ["run", "layers", "steps at 512 px", "s", "steps a second", "object", "pattern"], rows


def image_training_note(result: Row) -> str:
    return f"unseen pairs; from {result['settings']['origin']}"


def eight_bits(result: Row) -> Table:
    """One row a model: what rounding does to weights and, beside bf16 arithmetic, to pictures."""
    rows = []
    for row in result["rows"]:
        packed, yardstick = row["eight_bits"], row["bf16"]
        rows.append([row["model"], f"{row['packed_weights'] / 1e6:.1f} M",
                     f"{row['relative_error']:.2%}", str(row["pictures"]),
                     _mean(packed["psnr"], ".1f"), _mean(packed["ssim"], ".4f"),
                     _mean(yardstick["psnr"], ".1f"), _mean(yardstick["ssim"], ".4f")])
    return ["model", "packed weights", "their relative error", "pictures", "eight bits: PSNR, dB",
            "SSIM", "bf16 arithmetic: PSNR, dB", "SSIM"], rows


def eight_bits_note(result: Row) -> str:
    return ("against the bf16 weights in float32 arithmetic, the model's own settings, "
            "mean ± 95 % confidence")


def attention_mass(result: Row) -> Table:
    """By model and layer: the share that the best key tiles hold, trained and random."""
    shares = [k for k in result["rows"][0] if k.startswith("best_")]
    pairs: dict[tuple, dict[str, Row]] = {}
    for row in result["rows"]:
        pairs.setdefault((row["model"], row["layer"]), {})[row["weights"]] = row
    rows = []
    for (model, layer), sides in pairs.items():
        trained, random = sides["trained"], sides["random"]
        cells = [model, str(layer), f"{trained['text']:.2f}" if trained["text"] > 1e-6 else ""]
        for k in shares:
            heads, others = trained[k], random[k]
            cells.append(f"{_average(heads):.2f} ({min(heads):.2f} to {max(heads):.2f})")
            cells.append(f"{_average(others):.2f}")
        rows.append(cells)
    heads = ["model", "layer", "on text"]
    for k in shares:
        heads += [f"best {float(k.removeprefix('best_')):.0%} of tiles", "random weights"]
    return heads, rows


def mass_note(result: Row) -> str:
    return (f"blocks of {result['settings']['block']} tokens; mean over heads (least to most); one "
            "conditional forward in the middle of a run, one prompt")


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def gallery(result: Row) -> Table:
    """One row a model, kind and call: how near to stock, and what the evaluator says of both."""
    rows = []
    for row in result["rows"]:
        a, b = row["stock"], row["fast"]
        rows.append([
            f"{row['model']}, {row['kind']}", f"{row['size']} x {row['size']}", f"`{row['call']}`",
            f"{row['density']:.2f}", f"{row['operations']:.0%}", _mean(row["psnr"], ".1f"),
            _mean(row["ssim"], ".3f"),
            *(f"{a[k]:.0%}, {b[k]:.0%}" if k in a else "" for k in
              ("object", "colour", "pattern", "place", "direction")),
            f"{1e3 * a['sharpness']:.0f}, {1e3 * b['sharpness']:.0f}", f"{row['distance']:.3f}",
        ])
    return ["", "pixels", "call", "density, sparse steps", "attention in all", "PSNR to stock, dB",
            "SSIM", "object: stock, FastDiff", "colour", "pattern", "place", "direction",
            "sharpness, 1/1000", "distance"], rows


def gallery_prompts(kind: str) -> Callable[[Row], Table]:
    """One line a prompt of the pictures or clips: PSNR to stock, and what the evaluator misses."""

    def made(result: Row) -> Table:
        variants = [row for row in result["rows"] if row["kind"] == kind]
        heads, rows = ["", "prompt"], []
        first = {row["model"]: row["call"] for row in reversed(variants)}
        for row in variants:
            if row["call"] == first[row["model"]]:
                heads.append(f"{row['model']}: stock misses")
            call = row["call"].removeprefix("enable_fastdiff")
            heads += [f"{call}: PSNR, dB", "misses"]
        for i, lines in enumerate(zip(*(row["each"] for row in variants), strict=True)):
            cells = [str(i + 1), lines[0]["prompt"]]
            for row, line in zip(variants, lines, strict=True):
                if row["call"] == first[row["model"]]:
                    cells.append(_missed(line["stock"]))
                cells += [f"{line['psnr']:.1f}", _missed(line["fast"])]
            rows.append(cells)
        return heads, rows

    return made


def _missed(verdicts: Row) -> str:
    return ", ".join(name.replace("_", " ") for name, right in verdicts.items() if not right)


def gallery_note(result: Row) -> str:
    row = result["rows"][0]
    knobs = ", ".join(f"{k} {row['method'][k]:g}" for k in ("density", "dense_steps"))
    return (f"{row['method']['method']}, {knobs}; "
            f"{result['settings']['count']} prompts, mean ± 95 % confidence")


def _mean(value: Row, form: str) -> str:
    half = value["ci95"]
    return f"{value['mean']:{form}}" + (f" ± {half:{form}}" if half else "")
