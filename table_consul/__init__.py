"""OpenSMTPD table backend that answers from Consul's key-value store."""

from __future__ import annotations

__version__ = "1.0.0"
