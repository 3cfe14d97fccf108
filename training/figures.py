"""Pictures without a screen."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from run.errors import UserError  # noqa: E402


def save(figure: plt.Figure, path: Path) -> None:
    """Write the picture and print its path; the ending of the name decides the format, .png without one."""
    path = path if path.suffix else path.with_suffix(".png")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    print(path.resolve())
