"""Tables and plots of the rows of `studies.theory`. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def number(value: Any) -> str:
    """Three digits, plain between 0.001 and 100,000; a dash for what is missing."""
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def table(rows: Sequence[Row], columns: dict[str, str | Callable[[Row], Any]]) -> str:
    """A Markdown table: heading -> name of the row's value, or a function of the row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [number(row.get(c) if isinstance(c, str) else c(row)) for c in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of(rows: Sequence[Row], claim: str) -> list[Row]:
    return [row for row in rows if row["claim"] == claim]


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Every table of docs/theory.md that these rows can make, by name."""
    made: dict[str, str] = {}
    if of(rows, "weights"):
        made["proposition-2"] = _proposition_2(of(rows, "weights"))
        for name, which in (("weights", "given"), ("weights-built-in", "built-in")):
            some = [row for row in of(rows, "weights-mean") if row["k"] in (10, 50) and row["which"] == which]
            made[name] = _weights(some)
    if of(rows, "distortion"):
        made["distortion"] = table(
            of(rows, "distortion-slope"),
            {
                "samples": "latents",
                "n": "n",
                "D": "dim",
                "slope -1/D": "theory_slope",
                "slope, all samples": "slope_distortion",
                "slope, held-out": "slope_heldout",
                "d implied, all samples": "implied_dim_distortion",
                "d implied, held-out": "implied_dim_heldout",
                "d by two neighbours": "two_nearest_dim",
                "participation": "participation",
            },
        )
    if of(rows, "theorem5"):
        made["theorem-5"] = table(
            [row for row in of(rows, "theorem5") if row["k"] in (1, 10, 50, 200, 400)],
            {
                "classes": "latents",
                "network": "network",
                "K": "k",
                "error, Voronoi": "error_voronoi",
                "error, uniform": "error_uniform",
                "error, K random samples": "error_random",
                "bound, L sampled": "bound_sampled",
                "bound, L certified": "bound_certificate",
            },
        )
        made["theorem-5-slopes"] = table(
            of(rows, "theorem5-slope"),
            {
                "classes": "latents",
                "network": "network",
                "sqrt(G) ~ K^": "distortion_sqrt_vs_k",
                "error, Voronoi ~ K^": "voronoi_vs_k",
                "error, uniform ~ K^": "uniform_vs_k",
                "error, random ~ K^": "random_vs_k",
                "error, Voronoi ~ sqrt(G)^": "voronoi_vs_distortion_sqrt",
            },
        )
    if of(rows, "theorem13"):
        made["theorem-13"] = table(
            of(rows, "theorem13-constant"),
            {
                "case": "case",
                "SDE": "sde",
                "delta / T": lambda r: f"{r['delta'] / r['horizon']:g}",
                "mean": "c_mean",
                "cosine": "c_cosine",
                "hinge": "c_hinge",
                "all f (W1)": "c_w1_max",
                "paths": "c_path_max",
                "near paths": "near_path_ratio",
                "C, direct": "c_direct",
                "log10 C, Eq. 30": "log10_c_printed",
                "score growth": "score_growth",
            },
        )
        made["theorem-13-w1"] = table(
            [row for row in of(rows, "theorem13") if row["delta"] == 0 and row["k"] in (1, 16, 256)],
            {
                "case": "case",
                "SDE": "sde",
                "K": "k",
                "W2 at T": "w2",
                "W1 at 0": "w1",
                "W1 / W2": "w1_over_w2",
            },
        )
        made["corollary-15"] = table(
            [row for row in of(rows, "corollary15") if abs(row["delta"] / row["horizon"] - 0.1) < 1e-9],
            {
                "case": "case",
                "SDE": "sde",
                "-1/d": "theory_vs_k",
                "W2 ~ K^": "w2_vs_k",
                "mean ~ K^": "mean_vs_k",
                "cosine ~ K^": "cosine_vs_k",
                "hinge ~ K^": "hinge_vs_k",
                "mean ~ W2^": "mean_vs_w2",
                "cosine ~ W2^": "cosine_vs_w2",
                "hinge ~ W2^": "hinge_vs_w2",
            },
        )
        made["theorem-13-worst"] = table(
            of(rows, "theorem13-worst"),
            {
                "SDE": "sde",
                "T": lambda r: f"{r['horizon']:g}",
                "delta / T": lambda r: f"{r['delta'] / r['horizon']:g}",
                "measured C": "c",
                "C, direct": "c_direct",
                "log10 C, Eq. 30": "log10_c_printed",
            },
        )
        made["paths"] = _paths(of(rows, "theorem13"))
    return made


def _weights(rows: list[Row]) -> str:
    columns: dict[str, str | Callable[[Row], Any]] = {
        "K": "k",
        "grid": "grid",
        "distortion / variance": "distortion",
        "largest weight": "max_weight",
        "W2, uniform": "w2_uniform",
        "W2, Voronoi": "w2_voronoi",
        "cut, %": "cut_pct",
        "lowest and highest set, %": lambda r: f"{r['cut_pct_low']:.1f} to {r['cut_pct_high']:.1f}",
        "reported, %": lambda r: r["paper_cut_pct"] if r["grid"] == "d4m" else "",
    }
    return table(rows, columns)


def _proposition_2(rows: list[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row["latents"] for row in rows):
        some = [row for row in rows if row["latents"] == name]
        ks = sorted({row["k"] for row in some})
        worst = max(row["prop2_relative_difference"] for row in some)
        lines.append({"latents": name, "ks": ", ".join(map(str, ks)), "grids": len(some), "worst": worst})
    return table(lines, {"samples": "latents", "K": "ks", "grids": "grids", "largest relative difference": "worst"})


def _paths(rows: list[Row]) -> str:
    """How far simulated gaps are from exact ones, in standard errors of both together."""
    lines = []
    for case, sde in dict.fromkeys((row["case"], row["sde"]) for row in rows if "paths" in row):
        some = [row for row in rows if row["case"] == case and row["sde"] == sde and "paths" in row]
        off = sorted(
            abs(row[f"path_gap_{f}"] - row[f"gap_{f}"])
            / (row[f"path_gap_{f}_se"] ** 2 + row[f"gap_{f}_se"] ** 2) ** 0.5
            for row in some
            for f in ("mean", "cosine", "hinge")
        )
        within = sum(z <= 2 for z in off) / len(off)
        lines.append({"case": case, "sde": sde, "n": len(off), "within": 100 * within, "most": off[-1]})
    columns: dict[str, str | Callable[[Row], Any]] = {"case": "case", "SDE": "sde", "pairs": "n"}
    return table(lines, columns | {"within 2 errors, %": "within", "farthest, errors": "most"})


def plots(rows: Sequence[Row], path: Path) -> None:
    """One SVG a claim, beside `path`: theory.json -> theory-distortion.svg, ..."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "theory", "svg.fonttype": "none", "font.size": 9}
    for name, draw in (("distortion", _draw_distortion), ("gradient", _draw_gradient), ("weights", _draw_weights),
                       ("diffusion", _draw_diffusion)):  # fmt: skip
        figure = draw(rows)
        if figure is not None:
            for panel in figure.axes:
                _plain_ticks(panel)
            figure.tight_layout()
            figure.savefig(path.with_name(f"{path.stem}-{name}.svg"), metadata={"Date": None})


def _plain_ticks(panel: Any) -> None:
    """No minor ticks; ordinary numbers where a logarithmic axis spans less than a decade."""
    from matplotlib.ticker import FormatStrFormatter, MaxNLocator

    panel.minorticks_off()
    for axis, (low, high) in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
        if axis.get_scale() == "log" and high < 10 * low:
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(FormatStrFormatter("%.3g"))


def _draw_distortion(rows: Sequence[Row]) -> Any:
    some = of(rows, "distortion")
    if not some:
        return None
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.8))
    for name in dict.fromkeys(row["latents"] for row in some):
        line = [row for row in some if row["latents"] == name]
        ks = [row["k"] for row in line]
        if name.startswith("cube-"):
            panels[0].plot(ks, [row["heldout"] ** 0.5 for row in line], marker="o", markersize=3, label=name)
            last, dim = line[-1], line[-1]["dim"]
            guide = [last["heldout"] ** 0.5 * (k / last["k"]) ** (-1 / dim) for k in ks[2:]]
            panels[0].plot(ks[2:], guide, color="grey", linewidth=0.8, linestyle=":")
        else:
            panels[1].plot(ks, [row["distortion"] ** 0.5 for row in line], marker="o", markersize=3, label=name)
            panels[2].plot(ks, [row["heldout"] ** 0.5 for row in line], marker="o", markersize=3, label=name)
    panels[0].set_title("uniform cubes, held-out; dotted: K^(-1/d)")
    panels[1].set_title("latents, all samples")
    panels[2].set_title("latents, held-out half")
    for panel in panels:
        panel.axhline(1.0, color="black", linewidth=0.6)
        panel.set(xscale="log", yscale="log", xlabel="K", ylabel="sqrt(distortion / variance)")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=6)
    return figure


def _draw_gradient(rows: Sequence[Row]) -> Any:
    some = of(rows, "theorem5")
    if not some:
        return None
    from matplotlib import pyplot

    states = list(dict.fromkeys((row["latents"], row["network"]) for row in some))
    figure, panels = pyplot.subplots(1, len(states), figsize=(4 * len(states), 3.8), squeeze=False)
    curves = {
        "bound, L certified": "bound_certificate",
        "bound, L sampled": "bound_sampled",
        "K random samples": "error_random",
        "centroids, uniform weights": "error_uniform",
        "centroids, Voronoi weights": "error_voronoi",
    }
    for panel, (name, network) in zip(panels[0], states, strict=True):
        line = [row for row in some if (row["latents"], row["network"]) == (name, network)]
        for label, value in curves.items():
            style = "--" if label.startswith("bound") else "-"
            panel.plot([r["k"] for r in line], [r[value] for r in line], style, marker="o", markersize=3, label=label)
        panel.axhline(1.0, color="black", linewidth=0.6)
        panel.set(title=f"{name}, {network} network", xscale="log", yscale="log", xlabel="K")
    panels[0][0].set_ylabel("error of the gradient / its norm")
    panels[0][0].legend(fontsize=6)
    return figure


def _draw_weights(rows: Sequence[Row]) -> Any:
    some = [row for row in of(rows, "weights-mean") if row["k"] in (10, 50) and row["which"] == "given"]
    if not some:
        return None
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), sharex=True, squeeze=False)
    for panel, k in zip(panels[0], (10, 50), strict=True):
        line = [row for row in some if row["k"] == k][::-1]
        cuts = [row["cut_pct"] for row in line]
        spread = [
            [row["cut_pct"] - row["cut_pct_low"] for row in line],
            [row["cut_pct_high"] - row["cut_pct"] for row in line],
        ]
        panel.barh([row["grid"] for row in line], cuts, xerr=spread, color="#8aa9c8", ecolor="black", capsize=2)
        if line:
            panel.axvline(line[0]["paper_cut_pct"], color="crimson", linestyle="--", label="reported")
            panel.legend(fontsize=7, loc="center right")
        panel.set(title=f"K = {k}", xlabel="cut of W2 by Voronoi weights, %")
    return figure


def _draw_diffusion(rows: Sequence[Row]) -> Any:
    gaps = of(rows, "theorem13")
    if not gaps:
        return None
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row["case"] for row in gaps))
    figure, panels = pyplot.subplots(2, len(cases), figsize=(4 * len(cases), 7), squeeze=False)
    colours = {"mean": "C0", "cosine": "C1", "hinge": "C2"}
    for column, case in enumerate(cases):
        top, bottom = panels[0][column], panels[1][column]
        for sde, marker, style in (("ve", "o", "-"), ("vp", "s", "--")):
            solid = sde == "ve"
            some = [r for r in gaps if r["case"] == case and r["sde"] == sde]
            tenth = [r for r in some if abs(r["delta"] / r["horizon"] - 0.1) < 1e-9]
            for f, colour in colours.items():
                top.errorbar([r["w2"] for r in tenth], [r[f"gap_{f}"] for r in tenth],
                             yerr=[r[f"gap_{f}_se"] for r in tenth], fmt=marker + style, color=colour, markersize=3,
                             linewidth=0.9, label=f if solid else None)  # fmt: skip
            last = [r for r in some if r["delta"] == 0]
            top.plot([r["w2"] for r in last], [r["w1"] for r in last], marker + style, color="black", markersize=3,
                     linewidth=0.9, label="all f (W1), delta 0" if solid else None)  # fmt: skip
            line = [
                r for r in of(rows, "theorem13-constant") if r["case"] == case and r["sde"] == sde and r["delta"] > 0
            ]
            part = [r["delta"] / r["horizon"] for r in line]
            for name, value, colour in (
                ("cosine", "c_cosine", "C1"), ("mean", "c_mean", "C0"), ("paths", "c_path_max", "C4"),
                ("near paths", "near_path_ratio", "C5"), ("C, direct", "c_direct", "black"),
                ("score growth", "score_growth", "C3"),
            ):  # fmt: skip
                shown = [(p, r[value]) for p, r in zip(part, line, strict=True) if r.get(value, 0) > 0]
                if shown:
                    bottom.plot(*zip(*shown, strict=True), marker + style, color=colour, markersize=3, linewidth=0.9,
                                label=name if solid else None)  # fmt: skip
            printed = [(p, r["log10_c_printed"]) for p, r in zip(part, line, strict=True)]
            shown = [(p, 10**power) for p, power in printed if power < 16]
            if shown:
                bottom.plot(*zip(*shown, strict=True), marker + ":", color="crimson", markersize=3,
                            label="Eq. 30, up to 1e16" if solid else None)  # fmt: skip
        top.set(title=f"{case} (dashed: vp)", xlabel="W2(mu_T, nu_T)", ylabel="|E f gap| at delta = T/10")
        bottom.set(xlabel="delta / T", ylabel="constant")
        for panel in (top, bottom):
            panel.set(xscale="log", yscale="log")
    panels[0][0].legend(fontsize=6)
    panels[1][0].legend(fontsize=6)
    return figure
