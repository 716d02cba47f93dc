"""Numbers as the page writes them."""


def number(value: float | None, digits: int = 4) -> str:
    """A number with a true minus sign, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign."""
    return f"{value:+,.{digits}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds as people say them: `8 s`, `4 min 5 s`, `2 h 10 min`."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def size(count: float | None) -> str:
    """Bytes in the unit that suits them."""
    if count is None:
        return "–"
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
