"""``python -m limosa.transport.relay DESCRIPTOR``: what a host daemon starts; see ``process``."""

import sys

from limosa.quickly import import_msgspec_quickly

import_msgspec_quickly()

from limosa.transport.relay.process import main  # noqa: E402 - after the line above

main(sys.argv[1:])
