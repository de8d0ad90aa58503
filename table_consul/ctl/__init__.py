"""table-consulctl, the tool to query, check, fill and monitor tables. The daemon imports none of it."""
