"""Tables for the terminal."""


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines whose columns are aligned. Every row has as many cells as the first, the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
