"""Who may speak with whom: certificates, TLS contexts, identities, and throw-away credentials for migration streams.

``ca`` is the authority a person runs, ``certificate`` what its certificates look like, ``tls`` the only place that
makes SSL contexts, ``identity`` turns a peer's certificate or Unix credentials into a name and a role, ``stream``
makes the credentials of one migration. ``docs/design/004-security.md`` tells why.
"""
