"""How smtpd splits the value of an alias, and what it makes of each element."""

from __future__ import annotations


def expand_line_split(line):
    """smtpd: expand.c, expand_line and expand_line_split, as they stand there; None where smtpd refuses the line."""
    line += b"\0"
    found, at = [], 0
    while True:
        buffer, esc, dq, sq = b"", 0, 0, 0
        while True:
            s = line[at : at + 1]
            if s == b"\0":
                ret = -1 if esc or dq or sq else 1 if buffer else 0
                break
            at += 1
            if esc:
                buffer += s
                esc = 0
                continue
            if s == b"\\":
                esc = 1
                continue
            if s == b"," and not dq and not sq:
                ret = 1
                break
            buffer += s
            if s == b'"' and not sq:
                dq ^= 1
            if s == b"'" and not dq:
                sq ^= 1
        if ret < 0:
            return None
        if ret == 0:
            return found
        if buffer.strip(b" \t\n\v\f\r"):
            found.append(buffer.strip(b" \t\n\v\f\r"))


def alias_type(node):
    """smtpd: to.c, text_to_expandnode, as far as it leads out of the mail system."""
    if node.lower().startswith((b":error:", b"error:")):
        return None
    if node.lower().startswith((b":include:", b"include:")):
        return "include"
    return "filter" if node[node[:1] == b'"' :].startswith(b"|") else "filename" if node.startswith(b"/") else None
