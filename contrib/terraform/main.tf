# The tables of contrib/smtpd.conf.example, kept by Terraform. Each resource shows another way to share the work.

terraform {
  required_providers {
    consul = {
      source  = "hashicorp/consul"
      version = "~> 2.21"
    }
  }
}

# CONSUL_HTTP_ADDR and CONSUL_HTTP_TOKEN say where Consul is. The token needs `acl = "write"` for the policy below, and
# what contrib/policies/postmaster.hcl grants for the keys.
provider "consul" {}

# A whole folder that is Terraform's alone: keys put into it by hand are removed at the next apply, and `terraform
# destroy` empties it, which makes mail for these domains bounce (of 20 or more, after hold_deletions). It must be empty when this is first applied, or be
# imported: terraform import consul_key_prefix.domains mail/domain/
resource "consul_key_prefix" "domains" {
  path_prefix = "mail/domain/"

  subkeys = {
    "example.org"   = ""
    "*.example.org" = ""
  }
}

# Some keys of a folder that others edit too, in the UI or with table-consulctl. They are set back at each apply; all
# other keys are left alone. With delete = true a key goes when it leaves this file.
resource "consul_keys" "aliases" {
  key {
    path   = "mail/alias/postmaster"
    value  = "root"
    delete = true
  }

  key {
    path   = "mail/alias/root"
    value  = "gilles, eric@example.org"
    delete = true
  }
}

# One record of a user as JSON, for `mail/credentials/` and, with paths, for `userinfo` as well. The hash comes from
# `smtpctl encrypt`; it lies in Terraform's state, so keep that where passwords may be.
variable "gilles_hash" {
  type      = string
  sensitive = true
}

resource "consul_keys" "users" {
  key {
    path   = "mail/credentials/gilles"
    value  = jsonencode({ password = var.gilles_hash, uid = 1000, gid = 1000, home = "/home/gilles" })
    delete = true
  }
}

# What the mail servers may read, and a token for each of them. Its secret is no part of the state:
# consul acl token read -id ACCESSOR, then into the token_file of that server.
resource "consul_acl_policy" "table_consul" {
  name        = "table-consul"
  description = "Mail servers read the tables of smtpd"
  rules       = file("${path.module}/../policies/table-consul.hcl")
}

variable "mail_servers" {
  type    = set(string)
  default = ["mail1", "mail2"]
}

resource "consul_acl_token" "mail" {
  for_each    = var.mail_servers
  description = "table-consul on ${each.key}"
  policies    = [consul_acl_policy.table_consul.name]
  local       = true
}

output "accessors" {
  value = { for name, token in consul_acl_token.mail : name => token.accessor_id }
}
