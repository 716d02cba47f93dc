"""Matplotlib figures as inline SVG that takes its colours from the page and carries no style of its own.

A page with a strict content security policy ignores `style` attributes, and a figure with fixed colours is wrong in
either light or dark. So every declaration becomes an attribute, and every colour of `COLOURS` a class.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"

ROLES = ("ink", "faint", "grid", "before", "after", "query", "document", *(f"series-{n}" for n in range(8)))
"""What a colour stands for; the page's style sheet has `.fill-ROLE` and `.stroke-ROLE` for each."""

COLOURS: Mapping[str, str] = {role: f"#0000{number:02x}" for number, role in enumerate(ROLES, 1)}
"""Role -> the colour that stands for it while a figure is drawn."""

_ROLE_OF = {colour: role for role, colour in COLOURS.items()}

FONT_SIZE = 12.5

SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "embtune",
    "svg.image_inline": True,
    "font.family": "DejaVu Sans",  # comes with Matplotlib; the page's own font is drawn where its glyphs were
    "font.size": FONT_SIZE,
    "text.parse_math": False,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["faint"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": FONT_SIZE,
    "axes.titlelocation": "left",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["faint"],
    "ytick.color": COLOURS["faint"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelsize": FONT_SIZE - 1,
    "ytick.labelsize": FONT_SIZE - 1,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
"""What all figures share, for `matplotlib.rc_context`."""


def to_svg(figure: Figure, name: str, title: str, titles: Mapping[str, Sequence[str]] | None = None) -> str:
    """One `<svg>` element.

    Args:
        name: unique in its page; begins all ids within.
        title: what the figure shows, for those who do not see it.
        titles: id of a group of markers (`Artist.set_gid`) -> a text for each marker, in order.
    """
    stream = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    # What was drawn comes from Matplotlib, not from outside: the parser meets no hostile file here.
    root = ElementTree.fromstring(stream.getvalue())
    for extra in [
        child for child in root if child.tag.endswith("metadata") or child.find(f"{{{_SVG}}}style") is not None
    ]:
        root.remove(extra)
    kept = {*(titles or {}), *(use[_LINK][1:] for element in root.iter() if _LINK in (use := element.attrib))}
    for element in root.iter():
        _name_own(element, name, kept)
        _unstyle(element)
    for group, texts in (titles or {}).items():
        _label_markers(root, f"{name}-{group}", texts)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title", "class": "plot", "focusable": "false"}
    heading = ElementTree.Element(f"{{{_SVG}}}title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    text = ElementTree.tostring(root, encoding="unicode")
    return re.sub(r"\s*\n\s*", "", text)


def _name_own(element: ElementTree.Element, name: str, kept: Collection[str]) -> None:
    """Make ids and what points to them unique in the page; ids that nothing points to go."""
    own = element.attrib.pop("id", None)
    if own in kept or element.tag.endswith("clipPath"):
        element.set("id", f"{name}-{own}")
    if _LINK in element.attrib:
        element.set("href", f"#{name}-{element.attrib.pop(_LINK)[1:]}")
    clip = element.get("clip-path")
    if clip:
        element.set("clip-path", clip.replace("url(#", f"url(#{name}-"))


def _unstyle(element: ElementTree.Element) -> None:
    declarations = {
        key.strip(): value.strip()
        for key, _, value in (part.partition(":") for part in element.attrib.pop("style", "").split(";"))
        if value
    }
    declarations |= {key: element.attrib.pop(key) for key in ("fill", "stroke") if key in element.attrib}
    classes = []
    for key, value in declarations.items():
        if key in ("fill", "stroke") and value in _ROLE_OF:
            classes.append(f"{key}-{_ROLE_OF[value]}")
        elif key == "font":
            size = re.search(r"([\d.]+)px", value)
            element.set("font-size", size[1] if size else str(FONT_SIZE))
        else:
            element.set(key, value)
    if classes:
        element.set("class", " ".join(classes))


def _label_markers(root: ElementTree.Element, group: str, texts: Sequence[str]) -> None:
    markers = [
        use for part in root.iter(f"{{{_SVG}}}g") if part.get("id") == group for use in part.iter(f"{{{_SVG}}}use")
    ]
    for number, (marker, text) in enumerate(zip(markers, texts, strict=True)):
        marker.set("data-point", str(number))
        ElementTree.SubElement(marker, f"{{{_SVG}}}title").text = text
