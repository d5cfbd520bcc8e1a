"""The demo's result as a picture."""

from pathlib import Path
from typing import Any

_DENSE, _COMPRESSED, _BASELINE = "#8c96a3", "#0b7a75", "#d1495b"


def draw(figures: dict[str, Any], path: Path) -> None:
    """Size on disk, time and fidelity, side by side, as a PNG file.

    Args:
        figures: of the demo.
        path: of the file; its directory exists.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (size, time, fidelity) = plt.subplots(
        1, 3, figsize=(12, 3.2), layout="constrained", width_ratios=(1, 1, 1.4)
    )
    megabytes = [figures["bytes_dense"] / 1e6, figures["bytes_disk"] / 1e6]
    bars = size.barh(["float32", "compressed"], megabytes, color=[_DENSE, _COMPRESSED])
    size.bar_label(bars, [f"{value:.1f} MB" for value in megabytes], padding=4)
    size.set_xlim(0, 1.2 * megabytes[0])
    size.invert_yaxis()
    size.set_title(f"On disk: {figures['ratio_disk']:.1f}x smaller", loc="left")
    milliseconds = [figures["latency_ms_dense"], figures["latency_ms_compressed"]]
    bars = time.barh(["float32", "compressed"], milliseconds, color=[_DENSE, _COMPRESSED])
    time.bar_label(bars, [f"{value:.0f} ms" for value in milliseconds], padding=4)
    time.set_xlim(0, 1.25 * max(milliseconds))
    time.invert_yaxis()
    time.set_title(f"8 x 64 tokens: {figures['latency_ratio']:.2f} of the time", loc="left")
    plain = figures["without_distillation"]
    names = ["accuracy", "agreement with the\nuncompressed model"]
    groups = [
        ("float32", _DENSE, [figures["accuracy_dense"], 1.0]),
        ("compressed", _COMPRESSED, [figures["accuracy_compressed"], figures["agreement"]]),
        ("same, without distillation", _BASELINE, [figures["accuracy_without_distillation"], plain["agreement"]]),
    ]
    for i, (label, color, values) in enumerate(groups):
        places = [place + 0.27 * (i - 1) for place in range(len(names))]
        bars = fidelity.bar(places, [100 * value for value in values], width=0.25, color=color, label=label)
        fidelity.bar_label(bars, [f"{100 * value:.1f}" for value in values], fontsize=8)
    fidelity.set_xticks(range(len(names)), names)
    fidelity.set_ylim(50, 108)
    fidelity.set_title(f"{figures['rows_held_out']} {figures['held_out']} rows, %", loc="left")
    fidelity.legend(fontsize=8, loc="lower right")
    for axes in (size, time, fidelity):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
