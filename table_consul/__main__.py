"""The program table-consul, also as ``python -m table_consul``."""

from __future__ import annotations

from table_consul.fallback import run


def main() -> int:
    """Run the program, or answer smtpd with errors if it cannot be loaded; returns the exit status."""
    return run("table_consul.cli")


if __name__ == "__main__":
    raise SystemExit(main())
