"""What several kinds of tests share: real host daemons on loopback, and ways to break them."""
