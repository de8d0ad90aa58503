# Like table-consul.hcl, for a Consul with acl.enable_key_list_policy = true: "read" lists no folder there, "list"
# grants both.
#
#   consul acl policy create -name table-consul -rules @table-consul-list.hcl
#   consul acl token create -description mail1 -policy-name table-consul
#
# One block for each table line of smtpd.conf; the table's name is the folder. With prefix = "mail" in the configuration
# the folders are mail/aliases/ and so on, and one block for mail/ suffices. `table-consulctl policy TABLE...` prints
# this file for your configuration. Keep the final slash: without it a token for "users" also reads
# "users-of-another-system/".

key_prefix "aliases/" {
  policy = "list"
}

key_prefix "domains/" {
  policy = "list"
}

key_prefix "virtuals/" {
  policy = "list"
}

# Hashes of passwords.
key_prefix "users/" {
  policy = "list"
}

key_prefix "allowed/" {
  policy = "list"
}

# Passwords to relay with, in clear text.
key_prefix "secrets/" {
  policy = "list"
}

key_prefix "sources/" {
  policy = "list"
}

key_prefix "helos/" {
  policy = "list"
}

key_prefix "blocked/" {
  policy = "list"
}
