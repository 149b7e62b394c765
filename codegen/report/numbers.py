"""Numbers for people: three or four significant digits, a fitting prefix, always the unit."""

from __future__ import annotations

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((2.0**30, "Gi"), (2.0**20, "Mi"), (2.0**10, "Ki"))
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def quantity(value: float | None, unit: str) -> str:
    """``value`` in ``unit`` (cycles, s, pJ, MACs, params, B, top-1) as text; a dash for None."""
    if value is None:
        return "-"
    if unit == "cycles":
        return f"{value:,.0f} cycles"
    if unit == "top-1":
        return f"{100 * value:.2f} %"
    if unit == "s":
        return _small(value, "s")
    if unit == "pJ":
        return _small(value * 1e-12, "J") if value >= 1e3 else f"{value:.4g} pJ"
    if unit == "B":
        for factor, prefix in _BINARY:
            if value >= factor:
                return f"{value / factor:.4g} {prefix}B"
        return f"{value:.0f} B"
    for factor, prefix in _SI:
        if value >= factor:
            return f"{value / factor:.4g}{prefix} {unit}".strip()
    return f"{value:.0f} {unit}".strip()


def ratio(after: float | None, before: float | None) -> str:
    """``after`` as a percentage of ``before``; a dash where there is none."""
    if after is None or not before:
        return "-"
    return f"{100 * after / before:.1f} %"


def change(after: float, before: float | None, unit: str) -> str:
    """What became of a number: accuracies differ by points, everything else by a ratio."""
    if unit == "top-1" and before is not None:
        return f"{100 * (after - before):+.2f} points"
    return ratio(after, before)


def duration(seconds: float) -> str:
    """Seconds as 0.4 s, 12 s, 3 min 20 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _small(value: float, unit: str) -> str:
    for factor, prefix in _SMALL:
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"
