# For people who fill the tables with `table-consulctl import`, the UI or Terraform: read and write access to all.
#
#   consul acl policy create -name postmaster -rules @postmaster.hcl
#
# Anyone with write access to these folders controls where mail goes, who logs in and who relays: see docs/operating.md.

key_prefix "mail/" {
  policy = "write"
}

key_prefix "virtuals/" {
  policy = "write"
}

key_prefix "secrets/" {
  policy = "write"
}
