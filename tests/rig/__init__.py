"""Real programs for tests and the demo: Consul agents, and an OpenSMTPD of each dialect.

They are made from Debian's packages in a cache folder outside the checkout, and end with the test run. The rig talks to
Consul and to smtpd with the standard library only, never with the code under test.
"""
