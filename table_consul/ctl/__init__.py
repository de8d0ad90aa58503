"""table-consulctl: what an operator asks, checks, fills and watches tables with. The daemon imports nothing of it."""
