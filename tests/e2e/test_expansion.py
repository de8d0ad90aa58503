"""smtpd accepts and rejects the same aliases as `table-consulctl lint`."""

from __future__ import annotations

import pytest

from tests.ctl import expansions
from tests.e2e import table_files, test_mail, until


@pytest.mark.parametrize(
    ("conf", "table", "domain"),
    [(test_mail.LOCAL, expansions.LOCAL, "@localhost"), (test_mail.VIRTUAL, expansions.VIRTUAL, "@example.org")],
    ids=["alias", "virtual"],
)
def test_smtpd_rejects_the_aliases_that_lint_reports(consul, smtpd, conf, table, domain):
    entries = {f"consul/alias/{key}": value for key, value in table.aliases.items()}
    consul.kv_txn({**entries, "consul/domain/example.org": "", "consul/domain/example.net": ""})
    server = smtpd(conf, table_files(consul))
    recipients = {
        key: f"{'any' if key.startswith('@') else ''}{key}{'' if '@' in key else domain}" for key in table.aliases
    }
    until(lambda: server.send("gilles@localhost", "any@example.net").popitem()[1][0] in (250, 550), True)
    found = {key: server.send(recipient)[recipient][0] for key, recipient in recipients.items()}
    assert {key for key, code in found.items() if code != 250} == table.rejected, found
    assert {found[key] for key in table.rejected} == {524}
