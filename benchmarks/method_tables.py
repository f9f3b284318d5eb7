"""Tables of benchmarks/methods.py and benchmarks/architectures.py, for tables.py."""

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


def _mean(value: Row | None, form: str) -> str:
    if value is None:
        return ""
    half = value["ci95"]
    return f"{value['mean']:{form}}" + (f" ± {half:{form.strip('+')}}" if half else "")
