"""What the table of attacks has in a row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attack:
    what: str
    where: str
    held: str
    test: str
    """File and function in tests/security, as `files.test_name`."""

    @property
    def place(self) -> str:
        """Of the test, as pytest is given it."""
        return f"tests/security/test_{self.test.replace('.', '.py::', 1)}"
