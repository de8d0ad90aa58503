"""The real parts that tests and the demo run against: a Consul agent or three, and an OpenSMTPD of each dialect.

Everything here is made from Debian's packages, kept in a cache folder outside the checkout, and gone when the test run
ends. It speaks to Consul and to smtpd with the standard library alone, never with the code under test.
"""
