"""smtpd's split of an alias value, and its parse of each element."""

from __future__ import annotations


def expand_line_split(line):
    """smtpd: expand.c, expand_line and expand_line_split, transcribed; None if smtpd rejects the line."""
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


ALNUM = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def text_to_expandnode(node):
    """smtpd: to.c, text_to_expandnode and the functions it calls; None if smtpd rejects the alias."""
    lower = node.lower()
    for prefix in (b":error:", b"error:"):
        if lower.startswith(prefix):
            text = node[len(prefix) :]
            digits = text[:1] in (b"4", b"5") and text[1:3].isdigit() and text[3:4] == b" "
            if 5 <= len(text) < 1024 and digits and text[4] in ALNUM:
                return "error"
            break
    for prefix in (b":include:", b"include:"):
        if lower.startswith(prefix):
            if node[len(prefix) :].startswith(b"/") and len(node[len(prefix) :]) < 1024:
                return "include"
            break
    quoted = node[:1] == b'"'
    if node[quoted : quoted + 1] == b"|" and len(node[quoted + 1 :]) < 1024 and (not quoted or node[2:].endswith(b'"')):
        return "filter"
    if node.startswith(b"/") and len(node) < 1024:
        return "filename"
    at = node.find(b"@")
    if len(node) >= 3 and 0 < at < len(node) - 1:
        if not node[:at].translate(None, ALNUM + b"!#$%*/?|^{}`~&'+-=_.") and not node[at + 1 :].translate(
            None, ALNUM + b"-."
        ):
            return "address"
        node = node[:at]  # alias_is_address ends the text there
    return "username" if len(node) < 256 and not node.translate(None, ALNUM + b"_.-+") else None


def alias_type(node):
    """smtpd: to.c, text_to_expandnode, for commands, files and includes."""
    if node.lower().startswith((b":error:", b"error:")):
        return None
    if node.lower().startswith((b":include:", b"include:")):
        return "include"
    return "filter" if node[node[:1] == b'"' :].startswith(b"|") else "filename" if node.startswith(b"/") else None
