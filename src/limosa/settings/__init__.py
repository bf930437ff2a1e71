"""Every option of a host, with its help, default and what it relates to.

``daemon`` is read once at start (who this host is, where its files are); ``host`` is the settings page that can be
changed while the daemon works; ``toml`` reads and writes both.
"""
