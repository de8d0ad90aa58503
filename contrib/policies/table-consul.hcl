# For the mail servers: table-consul reads the tables of contrib/smtpd.conf.example, and nothing else.
#
#   consul acl policy create -name table-consul -rules @table-consul.hcl
#   consul acl token create -description mail1 -policy-name table-consul
#
# One block for each table line of smtpd.conf; the table's name is the folder. With prefix = "smtpd" in the configuration
# the folders are smtpd/mail/ and so on, and one block for smtpd/ suffices. `table-consulctl policy TABLE...` prints
# this file for your configuration. Keep the final slash: without it a token for "mail" also reads
# "mail-of-another-system/".

# mail/credentials/ holds password hashes.
key_prefix "mail/" {
  policy = "read"
}

key_prefix "virtuals/" {
  policy = "read"
}

# Passwords to relay with, in clear text.
key_prefix "secrets/" {
  policy = "read"
}
