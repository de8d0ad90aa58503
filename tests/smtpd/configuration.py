"""Variables and error texts that several tests of the configuration use, and a token that no error may contain."""

from __future__ import annotations

import re

from table_consul import config

VARIABLES = ["CONSUL_HTTP_ADDR", "CONSUL_HTTP_SSL", *(name for group in config.VARIABLES for name in group.values())]
ADDRESS_HINT = "(use http://HOST:PORT, https://HOST:PORT, unix:///PATH or file:///PATH)"
ABSOLUTE_PATH = "must be an absolute path (smtpd starts tables in /)"
CERT_AND_KEY = "(set both or neither; one file may serve as both)"
VISIBLE_ASCII = "must be visible ASCII characters, without spaces or line breaks (remove all others)"
HOST_NAME = "(use the name in Consul's certificate)"
IN_QUOTES = "must be a string (write it in quotes)"
HINT = re.compile(
    r"[(;] ?(?:add|change|check|correct|create|define|fill|grant|install|join|name|put|raise|remove|rename|run|save|see"
    r"|set|start|try:|turn off|turn it on|unset|upgrade|use|write|did you mean|does one|should the|smtpd starts) ?.*\)$"
)
"""The end of a line of `check`."""
SECRET = "b1gs33cr3t-0f-0pa1"
