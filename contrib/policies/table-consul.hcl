# For the mail servers: table-consul reads the tables of contrib/smtpd.conf.example, and nothing else.
#
#   consul acl policy create -name table-consul -rules @table-consul.hcl
#   consul acl token create -description mail1 -policy-name table-consul
#
# One block for each table line of smtpd.conf; the table's name is the folder. With prefix = "mail" in the configuration
# the folders are mail/aliases/ and so on, and one block for mail/ suffices. `table-consulctl policy TABLE...` prints
# this file for your configuration. Keep the final slash: without it a token for "users" also reads
# "users-of-another-system/".

key_prefix "aliases/" {
  policy = "read"
}

key_prefix "domains/" {
  policy = "read"
}

key_prefix "virtuals/" {
  policy = "read"
}

# Hashes of passwords.
key_prefix "users/" {
  policy = "read"
}

key_prefix "allowed/" {
  policy = "read"
}

# Passwords to relay with, in clear text.
key_prefix "secrets/" {
  policy = "read"
}

key_prefix "sources/" {
  policy = "read"
}

key_prefix "helos/" {
  policy = "read"
}

key_prefix "blocked/" {
  policy = "read"
}
