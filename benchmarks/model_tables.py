"""Tables of the shipped models: ability, the evaluator, attention mass, the gallery; for tables.py.

Each takes a result and returns the heads and the rows of one table.
"""

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
