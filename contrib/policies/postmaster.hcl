# For whoever fills the tables, with `table-consulctl import`, the UI or Terraform: all of them, to read and write.
#
#   consul acl policy create -name postmaster -rules @postmaster.hcl
#
# Who may write these decides where mail goes, who logs in and who relays; docs/operating.md tells what each means.

key_prefix "mail/" {
  policy = "write"
}

key_prefix "virtuals/" {
  policy = "write"
}

key_prefix "secrets/" {
  policy = "write"
}
