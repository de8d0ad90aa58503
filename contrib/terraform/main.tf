# The tables of contrib/smtpd.conf.example in Terraform. Each resource shows another way to share the work.

terraform {
  required_providers {
    consul = {
      source  = "hashicorp/consul"
      version = "~> 2.21"
    }
  }
}

# Set CONSUL_HTTP_ADDR and CONSUL_HTTP_TOKEN. The token needs `acl = "write"` for the policy below, and
# contrib/policies/postmaster.hcl for the keys.
provider "consul" {}

# A folder that only Terraform writes: the next apply removes all other keys, and `terraform destroy` empties it, which
# makes mail for these domains bounce (20 or more: after hold_deletions). The folder must be empty at the first apply,
# or be imported: terraform import consul_key_prefix.domains mail/domain/
resource "consul_key_prefix" "domains" {
  path_prefix = "mail/domain/"

  subkeys = {
    "example.org"   = ""
    "*.example.org" = ""
  }
}

# Some keys of a folder that others edit too, in the UI or with table-consulctl. Each apply resets them and leaves all
# other keys alone. With delete = true, a key that is removed from this file is deleted.
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

# One record of a user as JSON, for `mail/credentials/` and, with paths, also for `userinfo`. `smtpctl encrypt` prints
# the hash. Terraform's state contains it: protect the state like passwords.
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

# The policy of the mail servers, and a token for each. The state does not contain its secret: copy the SecretID of
# `consul acl token read -id ACCESSOR` into the token_file of that server.
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
