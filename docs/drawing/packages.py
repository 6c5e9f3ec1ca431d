"""Draws the packages and which imports which, from the import statements: `make drawing`.

An arrow is left out where a longer way of arrows leads to the same package. An import against the order is red.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"
WIDTH, HEIGHT = 172, 44  # of a box, in pixels
COLUMN, ROW = 220, 76  # from one box to the next
MARGIN = 16
PLACES = {  # package: (column, row, contents); each imports only packages below it
    "cli": (1, 0, "the command nova"),
    "nova_worlds": (1, 1, "toy worlds and judges"),
    "bench": (1, 2, "nova bench"),
    "serving": (0, 3, "server, page, live streams"),
    "training": (1, 3, "recipes, loss, trainer"),
    "evaluation": (2, 4, "benchmarks, own ones too"),
    "data": (1, 4, "encoded datasets"),
    "pipeline": (1, 5, "requests to results"),
    "fast": (0, 6, "kernels, CUDA graphs"),
    "text": (2, 6, "text encoders"),
    "sampling": (0, 7, "sets, steps, guidance"),
    "io": (2, 7, "media and files"),
    "model": (0, 8, "the network"),
    "autoencoders": (1, 8, "pixels to latents, back"),
    "common": (1, 9, "errors, checks, devices"),
}


def package_imports(source: Path = SOURCE) -> dict[str, set[str]]:
    """The packages that each package imports, also inside functions, but not for type checkers alone."""
    found: dict[str, set[str]] = {}
    for path in sorted(source.rglob("*.py")):
        package = _package_of(path.relative_to(source).with_suffix("").as_posix().replace("/", "."))
        if package is None:
            continue
        modules = _imports(ast.parse(path.read_text(encoding="utf-8")))
        imported = {name for module in modules if (name := _package_of(module)) is not None}
        found.setdefault(package, set()).update(imported - {package})
    return found


def _package_of(module: str) -> str | None:
    """The box that a module belongs to; None for other libraries and for the root of nova_video."""
    first, *rest = module.split(".")
    if first == "nova_worlds":
        return first
    return rest[0] if first == "nova_video" and rest and not rest[0].startswith("__") else None


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)


def arrows(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """(package, imported) pairs that no longer way of pairs leads through."""
    row = {name: place[1] for name, place in PLACES.items()}
    down = {name: {other for other in imports[name] if row[other] > row[name]} for name in imports}
    return sorted(
        (name, other)
        for name, others in imports.items()
        for other in others
        if other not in down[name] or not any(other in _reach(down, way) for way in down[name])
    )


def _reach(down: dict[str, set[str]], name: str) -> set[str]:
    """Every package that `name` imports, directly or through others."""
    return {found for other in down[name] for found in ({other} | _reach(down, other))}


def draw_packages(source: Path = SOURCE) -> str:
    """The drawing as SVG."""
    imports = package_imports(source)
    width, height = 2 * MARGIN + 2 * COLUMN + WIDTH, 2 * MARGIN + 9 * ROW + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"',
        ' font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
        "<title>The packages; an arrow points to what a package imports</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for color in ("#5b6b7b", "#c62828"):
        parts.append(
            f'<marker id="{color[1:]}" viewBox="0 0 8 8" refX="8" refY="4" orient="auto"'
            f' markerWidth="8" markerHeight="8"><path d="M0 0 8 4 0 8z" fill="{color}"/></marker>'
        )
    for name, other in arrows(imports):
        (x, y), (to_x, to_y) = _corner(name), _corner(other)
        is_down = PLACES[other][1] > PLACES[name][1]
        start, end = (y + HEIGHT, to_y) if is_down else (y, to_y + HEIGHT)
        color = "#5b6b7b" if is_down else "#c62828"
        aside = 0 if is_down else 20  # so that a red arrow does not hide another one
        lean = WIDTH // 4 * ((to_x > x) - (to_x < x))  # arrows to the side leave and arrive off the middle
        start_x, end_x = x + WIDTH // 2 + lean + aside, to_x + WIDTH // 2 - lean + aside
        parts.append(
            f'<line x1="{start_x}" y1="{start}" x2="{end_x}" y2="{end}"'
            f' stroke="{color}" stroke-width="1.5" marker-end="url(#{color[1:]})"/>'
        )
    for name, (*_, contents) in PLACES.items():
        x, y = _corner(name)
        middle = x + WIDTH // 2
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef3f8" stroke="#5b6b7b"/>'
            f'<text x="{middle}" y="{y + 19}" font-size="15" font-weight="bold" fill="#1b2733">{name}</text>'
            f'<text x="{middle}" y="{y + 36}" font-size="12" fill="#445566">{contents}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _corner(name: str) -> tuple[int, int]:
    """Upper left corner of a box, in pixels."""
    column, row, _ = PLACES[name]
    return MARGIN + column * COLUMN, MARGIN + row * ROW


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw_packages(), encoding="utf-8")
