# Like table-consul.hcl, for a Consul with acl.enable_key_list_policy = true: "read" lists no folder there, "list"
# grants both.
#
#   consul acl policy create -name table-consul -rules @table-consul-list.hcl
#   consul acl token create -description mail1 -policy-name table-consul
#
# One block for each table line of smtpd.conf; the table's name is the folder. With prefix = "smtpd" in the configuration
# the folders are smtpd/mail/ and so on, and one block for smtpd/ suffices. `table-consulctl policy TABLE...` prints
# this file for your configuration. Keep the final slash: without it a token for "mail" also reads
# "mail-of-another-system/".

# mail/credentials/ holds password hashes.
key_prefix "mail/" {
  policy = "list"
}

key_prefix "virtuals/" {
  policy = "list"
}

# Passwords to relay with, in clear text.
key_prefix "secrets/" {
  policy = "list"
}
