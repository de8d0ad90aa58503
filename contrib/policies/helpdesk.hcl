# For people who edit aliases in the UI: write access to aliases only, and no access to hashes and passwords.
#
#   consul acl policy create -name helpdesk -rules @helpdesk.hcl
#   consul acl token create -description "help desk" -policy-name helpdesk

key_prefix "mail/alias/" {
  policy = "write"
}

key_prefix "virtuals/alias/" {
  policy = "write"
}

# Read-only, to see the domains.
key_prefix "mail/domain/" {
  policy = "read"
}
