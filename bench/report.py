"""The results of the bench as a table, beside their targets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Row:
    """A row of the result: the measurement, its reference, and the target."""

    name: str
    ours: float | None
    unit: str
    beside: str = ""
    other: float | None = None
    limit: float | None = None
    at_least: bool = False
    as_ratio: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.ours / self.other if self.ours is not None and self.other else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target or a measurement."""
        measured = self.ratio if self.as_ratio else self.ours
        if self.limit is None or measured is None:
            return None
        return measured >= self.limit if self.at_least else measured <= self.limit


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def table(rows: list[Row]) -> str:
    lines = [("", "measured", "", "beside", "", "ratio", "wanted", "")]
    for row in rows:
        sign = ">=" if row.at_least else "<="
        wanted = "" if row.limit is None else f"{sign} {row.limit:,g}{' x' if row.as_ratio else ''}"
        verdict = {True: "met", False: "MISSED", None: "" if row.limit is None else "?"}[row.met]
        other = "" if row.other is None else number(row.other)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x"
        lines.append((row.name, number(row.ours), row.unit, row.beside, other, ratio, wanted, verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(8)]
    right = (1, 4, 5)
    shown = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    notes = [f"  {row.name}: {row.note}" for row in rows if row.note]
    return "\n".join([*shown, *(["", *notes] if notes else [])])
