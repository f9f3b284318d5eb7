"""Tables and readings of benchmarks/methods.py and benchmarks/architectures.py, for tables.py."""

OURS, FLOOR = "tile-sparse", "stock, other kernel"
# a method that keeps this much more or less than asked says so
LOOSE = 1.1

Row = dict
Table = tuple[list[str], list[list[str]]]


def methods(result: Row) -> Table:
    """One row a method: likeness to stock with confidence, density, difference to ours."""
    rows = []
    for row in result["rows"]:
        time = row["forward"]
        rows.append([
            row["variant"] + (f" (control: {row['control']})" if row["control"] else ""),
            *(f"{row[k]:.3f}" if k in row else "" for k in
              ("density_sparse_steps", "density_all_steps")),
            _mean(row["psnr"], ".2f"), _mean(row.get("psnr_over_tile-sparse"), "+.2f"),
            _mean(row["ssim"], ".4f"), _mean(row["features"], ".3f"),
            "" if time is None else f"{time['seconds'] * 1e3:.1f}",
            "" if time is None else f"{time['p20'] * 1e3:.1f} to {time['p80'] * 1e3:.1f}",
        ])
    return ["method", "density, sparse steps", "all steps", "PSNR, dB", "over tile-sparse, dB",
            "SSIM", "features", "ms a forward", "p20 to p80"], rows


def methods_note(result: Row) -> str:
    settings = result["settings"]
    clips, stock = result["rows"][0]["clips"], settings["stock_forward"]
    return (f"{clips} clips each, {settings['call']['num_inference_steps']} steps, mean ± 95 % "
            f"confidence, differences in pairs; stock {stock['seconds'] * 1e3:.1f} ms a forward; "
            f"features: {settings['features']}")


def architectures(result: Row) -> Table:
    """One row a model and variant: seconds a forward, gain over the best dense kernel."""
    rows = []
    for row in result["rows"]:
        part = f" ({row['layers']} of {row['of_layers']} layers)"
        name = row["model"] + ("" if row["layers"] == row["of_layers"] else part)
        if "failed" in row:
            rows.append([name, row["variant"], f"does not run: {row['failed'][:80]}", *[""] * 6])
            continue
        each, peak = row["layer_seconds"], row["peak_memory_gib"]
        rows.append([
            name, row["variant"], f"{row['density']:.3f}", f"{row['density_all_steps']:.3f}",
            f"{row['seconds'] * 1e3:.0f}", f"{row['p20'] * 1e3:.0f} to {row['p80'] * 1e3:.0f}",
            f"{row['speedup']:.2f}x", f"{sum(each) / len(each) * 1e3:.2f}" if each else "",
            "" if peak is None else f"{peak:.1f}",
        ])
    return ["model", "variant", "density, sparse steps", "all steps", "ms a forward", "p20 to p80",
            "over best dense", "ms a layer's attention", "peak GiB"], rows


def reading(result: Row) -> list[str]:
    """Who is ahead of whom in pairs of equal prompt and seed, in words, from the file alone."""
    settings = result["settings"]
    ahead, behind, level = [], [], []
    for row in sorted(result["rows"], key=lambda row: -row["psnr"]["mean"]):
        over = row.get(f"psnr_over_{OURS}")
        if row["variant"] == FLOOR or over is None or over["ci95"] is None:
            continue
        side = ahead if over["mean"] + over["ci95"] < 0 else (
            behind if over["mean"] - over["ci95"] > 0 else level)
        words = f"{_name(row, settings)} by {abs(over['mean']):.2f} ± {over['ci95']:.2f} dB"
        side.append(words if side is not level else
                    f"{_name(row, settings)} ({over['mean']:+.2f} ± {over['ci95']:.2f} dB)")
    ours = next(row for row in result["rows"] if row["variant"] == OURS)
    how = f"{ours['options']['select_by']}, tail {'on' if ours['options']['tail'] else 'off'}"
    lines = [f"At density {settings['density']:g}, over {result['rows'][0]['clips']} pairs, "
             f"`{OURS}` with {how}:", ""]
    lines += [f"- `{OURS}` is {where}: {'; '.join(found)}." for where, found in (
        ("ahead of", ahead), ("behind", behind), ("not told apart from", level)) if found]
    return lines


def _name(row: Row, settings: Row) -> str:
    """The variant with what a reader should hold against the comparison."""
    told = [row["control"]] if row["control"] else []
    kept = row.get("density_sparse_steps")
    if kept is not None and not 1 / LOOSE < kept / settings["density"] < LOOSE:
        told.append(f"keeps {kept:.3f}")
    steps, fewer = row.get("num_inference_steps"), settings["fewer_steps"]
    if steps is not None:
        told.append(f"{steps / settings['call']['num_inference_steps']:.0%} of stock's time, "
                    f"share {fewer['share_is']}")
    return row["variant"] + (f" ({', '.join(told)})" if told else "")


def speed_reading(result: Row) -> list[str]:
    """By model: who is faster than ours and who is slower, in words, from the file alone."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["model"] == model and "failed" not in row
                and not row["variant"].startswith("dense")]
        ours = next((row for row in rows if row["variant"] == OURS), None)
        if ours is None:
            continue
        fair, apart = [], []
        for row in rows:
            loose = row["density"] > LOOSE * row["asked_density"]
            note = f", keeps {row['density']:.2f}" if loose else ""
            if row is not ours:
                (apart if loose else fair).append(f"{row['variant']} {row['speedup']:.2f}x{note}")
        parts = [f"`{OURS}` {ours['speedup']:.2f}x at density {ours['asked_density']:g}"]
        parts += [f"others at that density: {', '.join(fair)}"] if fair else []
        parts += [f"keeping more: {', '.join(apart)}"] if apart else []
        lines.append(f"- {ours['title']}: {'; '.join(parts)}.")
    return lines


def _mean(value: Row | None, form: str) -> str:
    if value is None:
        return ""
    half = value["ci95"]
    return f"{value['mean']:{form}}" + (f" ± {half:{form.strip('+')}}" if half else "")
