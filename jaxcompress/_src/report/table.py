"""Reports as rows of text, for any table that can show text."""

import math
from typing import NamedTuple

from jaxcompress._src.report.size import LeafSize, SizeReport, SizeTotal


class Table(NamedTuple):
    """Rows of text under a header.

    Attributes:
        header: one title for each column.
        rows: as many texts each.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def leaf_table(report: SizeReport) -> Table:
    """One row for each leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress._src.report.table import leaf_table
        >>> from jaxcompress.report import size_report
        >>> print(format_table(leaf_table(size_report({"kernel": jnp.eye(4)}))))
        leaf    kind     shape  weights  nonzero  stored  bits/weight
        kernel  float32  4x4         16    25.0%    64 B        32.00
    """
    header = ("leaf", "kind", "shape", "weights", "nonzero", "stored", "bits/weight")
    return Table(header, tuple(_leaf_row(leaf) for leaf in report.leaves))


def total_table(report: SizeReport) -> Table:
    """One row for each group, one for all, and the size on disk if it is known.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress._src.report.table import total_table
        >>> from jaxcompress.report import size_report
        >>> print(format_table(total_table(size_report({"kernel": jnp.ones((50, 10), "bfloat16")}))))
        group    leaves  weights  nonzero  dense (float32)  stored  bits/weight  ratio
        kernel        1      500   100.0%           2.0 kB  1.0 kB        16.00  2.00x
        total         1      500   100.0%           2.0 kB  1.0 kB        16.00  2.00x
    """
    header = ("group", "leaves", "weights", "nonzero", f"dense ({report.baseline})", "stored", "bits/weight", "ratio")
    rows = [_total_row(total) for total in (*report.groups, report.total)]
    if report.disk_bytes is not None:
        total = report.total
        bits = _number(8 * report.disk_bytes / total.weights if total.weights else math.nan)
        ratio = _number(total.dense_bytes / report.disk_bytes if report.disk_bytes else math.nan, "x")
        sizes = format_bytes(total.dense_bytes), format_bytes(report.disk_bytes)
        rows.append(("on disk", "", "", "", *sizes, bits, ratio))
    return Table(header, tuple(rows))


def format_table(table: Table) -> str:
    """The table as text, numbers aligned to the right."""
    columns = list(zip(table.header, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [at > 0 and table.header[at] not in ("kind", "shape") for at in range(len(columns))]
    lines = [
        "  ".join(text.rjust(width) if is_right else text.ljust(width) for text, width, is_right in cells).rstrip()
        for row in (table.header, *table.rows)
        for cells in [zip(row, widths, right, strict=True)]
    ]
    return "\n".join(lines)


def format_bytes(count: int) -> str:
    """Bytes in decimal units: 1 kB is 1000 bytes.

    Example:
        >>> format_bytes(999), format_bytes(1000), format_bytes(90_868_000)
        ('999 B', '1.0 kB', '90.9 MB')
    """
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    # Not 1000: 999.96 is shown with one digit, and would read 1000.0.
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def format_milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, three digits or more.

    Example:
        >>> format_milliseconds(0.0123456), format_milliseconds(1.23456)
        ('12.3', '1,235')
    """
    value = 1e3 * seconds
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _leaf_row(leaf: LeafSize) -> tuple[str, ...]:
    stored = format_bytes(leaf.stored_bytes) if leaf.tied_to is None else f"tied to {leaf.tied_to}"
    nonzero = _share(leaf.nonzeros, leaf.weights)
    shape = "x".join(map(str, leaf.shape)) or "scalar"
    return leaf.path, leaf.kind, shape, f"{leaf.weights:,}", nonzero, stored, _number(leaf.bits_per_weight)


def _total_row(total: SizeTotal) -> tuple[str, ...]:
    return (
        total.name,
        str(total.leaves),
        f"{total.weights:,}",
        _share(total.nonzeros, total.weights),
        format_bytes(total.dense_bytes),
        format_bytes(total.stored_bytes),
        _number(total.bits_per_weight),
        _number(total.compression, "x"),
    )


def _share(part: int | None, whole: int) -> str:
    return "-" if part is None or not whole else f"{100 * part / whole:.1f}%"


def _number(value: float, unit: str = "") -> str:
    return f"{value:.2f}{unit}" if math.isfinite(value) else "-"
