"""How tests are parametrised over cases."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import QUICK, Case


def over(cases: list[Case], works: tuple[str, ...] | None = None) -> Any:
    """Decorator: every work of every case; --quick keeps those of QUICK."""
    return pytest.mark.parametrize(
        ("case", "work"),
        [
            pytest.param(case, work, id=f"{case}-{work}", marks=() if case in QUICK else pytest.mark.full)
            for case in cases
            for work in works or case.works
        ],
    )
