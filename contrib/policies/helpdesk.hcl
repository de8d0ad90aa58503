# For whoever edits aliases in the UI: those alone. Hashes and passwords stay out of sight.
#
#   consul acl policy create -name helpdesk -rules @helpdesk.hcl
#   consul acl token create -description "help desk" -policy-name helpdesk

key_prefix "mail/alias/" {
  policy = "write"
}

key_prefix "virtuals/alias/" {
  policy = "write"
}

# To see which domains there are.
key_prefix "mail/domain/" {
  policy = "read"
}
