"""Every option of a host, with its help, default and what it relates to.

``daemon`` is read once at start (who this host is, where its files are); ``host`` is the settings page that can be
changed while the daemon works; ``address`` reads where a host is reached; ``toml`` reads and writes files.
"""
