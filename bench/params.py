"""How tests are parametrised over cases."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from bench.cases import QUICK, Case


def over(cases: list[Case], works: tuple[str, ...] | None = None, quick: Collection[Case] = QUICK) -> Any:
    """Decorator: every work of every case, or those of these works; --quick keeps some cases."""
    return pytest.mark.parametrize(
        ("case", "work"),
        [
            pytest.param(case, work, id=f"{case}-{work}", marks=() if case in quick else pytest.mark.full)
            for case in cases
            for work in case.works
            if works is None or work in works
        ],
    )
