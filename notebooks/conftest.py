"""How `pytest --nbval` compares a notebook's outputs with the stored ones: as text, but for numbers
that were measured.
"""

from pathlib import Path


def pytest_configure(config):
    if hasattr(config.option, "nbval_sanitize_with"):
        config.option.nbval_sanitize_with = config.option.nbval_sanitize_with or str(
            Path(__file__).with_name("nbval.cfg")
        )
