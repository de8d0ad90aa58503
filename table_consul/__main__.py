"""``python -m table_consul``."""

from __future__ import annotations

from table_consul.cli import main

raise SystemExit(main())
